"""Callbacks that one setting switches on: while it is null or false they give None, and the run goes without them."""

from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)


def early_stopping(
    *, monitor: str, mode: str, patience: int | None = None, min_delta: float = 0.0
) -> EarlyStopping | None:
    """Stops when the monitored figure has not improved for `patience` validations."""
    if patience is None:
        return None
    return EarlyStopping(monitor=monitor, mode=mode, patience=patience, min_delta=min_delta)


def ema(*, decay: float | None = None) -> EMAWeightAveraging | None:
    """Keeps an exponential moving average of the weights, which validation, test and checkpoints use."""
    return None if decay is None else EMAWeightAveraging(decay=decay)


def swa(*, lr: float | None = None, start: float = 0.8) -> StochasticWeightAveraging | None:
    """Averages the weights of the last epochs at a constant rate (Izmailov et al. 2018, arXiv 1803.05407)."""
    return None if lr is None else StochasticWeightAveraging(swa_lrs=lr, swa_epoch_start=start)


def learning_rate_finder(*, enabled: bool = False, steps: int = 100) -> LearningRateFinder | None:
    """Sets the learning rate from a short range test before training (Smith 2015, arXiv 1506.01186)."""
    return LearningRateFinder(num_training_steps=steps, attr_name="lr") if enabled else None


def batch_size_finder(*, enabled: bool = False, steps: int = 3, start: int = 8) -> BatchSizeFinder | None:
    """Doubles the batch size before training until the memory is full."""
    return BatchSizeFinder(steps_per_trial=steps, init_val=start, batch_arg_name="batch_size") if enabled else None
