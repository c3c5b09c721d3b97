"""Stages of a backbone that begin to learn in the middle of a run."""

from collections.abc import Sequence
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from visiontasks.contracts import UsageError
from visiontasks.layers.freezing import keep_frozen_in_eval
from visiontasks.transfer import Stage


class Unfreezing(Callback):
    """Lets each stage of the backbone learn from its epoch on, and says once which learns when and how fast.

    What is frozen at an epoch follows from the number of the epoch alone, so that a run resumed at any point goes on as
    it was. Every stage that will ever learn is in the optimiser from the start: its groups never change, checkpoints of
    any epoch fit, and what has no gradient is neither decayed nor given moments, so that a stage joins with fresh ones.
    DistributedDataParallel synchronises what requires a gradient when it is made, so it is made anew at each change.
    """

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = stages
        self.said = False

    def setup(self, trainer: Trainer, module: Any, stage: str) -> None:
        """Lets all that will learn be seen by the optimiser and by what checks gradients."""
        if stage != "fit":
            return
        if any(each.start != 0 for each in self.stages):
            self._check(trainer)
        self._require(module, [each for each in self.stages if each.start is not None], gradient=True)

    def _check(self, trainer: Trainer) -> None:
        waits = any(each.start for each in self.stages)
        if waits and not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise UsageError(
                f"{type(trainer.strategy).__name__} cannot let stages learn later: type transfer=full, discriminative, "
                "last_stages or frozen, or trainer.strategy=ddp."
            )
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise UsageError(
                "callbacks.swa estimates the batch-norm statistics anew, of frozen stages too: type transfer=full, or "
                "callbacks.ema.decay=0.999 in its place."
            )

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and not self.said:
            print(f"transfer   {'; '.join(self._lines(trainer, module))}", flush=True)
        self.said = True
        self._apply(trainer, module)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._apply(trainer, module)

    def _apply(self, trainer: Trainer, module: Any) -> None:
        before = {parameter for parameter in module.parameters() if parameter.requires_grad}
        for stage in self.stages:
            if stage.start is not None:
                self._require(module, [stage], gradient=trainer.current_epoch >= stage.start)
        module.backbone.train(module.backbone.training)
        keep_frozen_in_eval(module.backbone)
        after = {parameter for parameter in module.parameters() if parameter.requires_grad}
        if before != after and isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy.model = module
            trainer.strategy.configure_ddp()

    def _require(self, module: Any, stages: Sequence[Stage], *, gradient: bool) -> None:
        parameters = dict(module.backbone.named_parameters())
        for name in (name for stage in stages for name in stage.parameters):
            parameters[name].requires_grad_(gradient)

    def _lines(self, trainer: Trainer, module: Any) -> list[str]:
        groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
        rates = {parameter: _full_rate(group) for group in groups for parameter in group["params"]}
        parameters = dict(module.backbone.named_parameters())
        lines = [
            _line(
                f"stage {index}", stage.start, rates.get(parameters[stage.parameters[0]]) if stage.parameters else None
            )
            for index, stage in enumerate(self.stages, start=1)
        ]
        inside = set(parameters.values())
        return [*lines, _line("head", 0, max(rate for parameter, rate in rates.items() if parameter not in inside))]


def _full_rate(group: dict[str, Any]) -> float:
    """A group's learning rate after warm-up."""
    return float(group.get("max_lr", group.get("initial_lr", group["lr"])))


def _line(name: str, start: int | None, rate: float | None) -> str:
    if start is None or rate is None:
        return f"{name} frozen"
    return f"{name} at {rate:.2g}" + (f" from epoch {start}" if start else "")
