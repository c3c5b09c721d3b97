"""Callbacks that one setting switches on: while it is null or false they give None, and the run goes without them."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    StochasticWeightAveraging,
    TQDMProgressBar,
    WeightAveraging,
)
from torch.optim.swa_utils import get_ema_multi_avg_fn


def progress_bar(*, enabled: bool = True, refresh_rate: int = 20) -> TQDMProgressBar | None:
    """Shows the batches of an epoch going by, moving every `refresh_rate` of them."""
    return TQDMProgressBar(refresh_rate=refresh_rate) if enabled else None


def early_stopping(
    *, monitor: str, mode: str, patience: int | None = None, min_delta: float = 0.0
) -> EarlyStopping | None:
    """Stops when the monitored figure has not improved for `patience` validations."""
    if patience is None:
        return None
    return _EarlyStopping(monitor=monitor, mode=mode, patience=patience, min_delta=min_delta)


class _EarlyStopping(EarlyStopping):
    """Lightning's, which would train on where a run that it had stopped is resumed."""

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        if self.wait_count >= self.patience:
            trainer.should_stop = True


class Average(WeightAveraging):
    """An exponential moving average of the weights that stands still while steps are left out.

    What never changes stays what it is to the bit, such as frozen weights and the shapes of anchors: it moves by a
    share of the difference, where Lightning's EMAWeightAveraging adds two shares and rounds.
    """

    def __init__(self, *, decay: float) -> None:
        super().__init__(multi_avg_fn=get_ema_multi_avg_fn(decay))  # type: ignore[no-untyped-call]

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        if not pl_module.step_skipped:
            super().on_train_batch_end(trainer, pl_module, *rest)


def ema(*, decay: float | None = None) -> Average | None:
    """Keeps an exponential moving average of the weights, which validation, test and checkpoints use."""
    return None if decay is None else Average(decay=decay)


def swa(*, lr: float | None = None, start: float = 0.8) -> StochasticWeightAveraging | None:
    """Averages the weights of the last epochs at a constant rate (Izmailov et al. 2018, arXiv 1803.05407)."""
    return None if lr is None else StochasticWeightAveraging(swa_lrs=lr, swa_epoch_start=start)
