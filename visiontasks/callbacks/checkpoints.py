"""The two checkpoints that every run keeps: checkpoints/last.ckpt to go on from, checkpoints/best.ckpt to use."""

from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint


def last_checkpoint(*, folder: str, every_n_train_steps: int | None = None) -> list[ModelCheckpoint]:
    """Saves the whole state of the run as last.ckpt after every epoch, and every so many steps where asked."""
    by_epoch = ModelCheckpoint(_folder(folder), "last", every_n_epochs=1, enable_version_counter=False)
    if every_n_train_steps is None:
        return [by_epoch]
    by_step = ModelCheckpoint(
        _folder(folder), "last", every_n_train_steps=every_n_train_steps, enable_version_counter=False
    )
    return [by_epoch, by_step]


def best_checkpoint(*, folder: str, monitor: str, mode: str) -> ModelCheckpoint:
    """Saves the weights, without the optimiser's state, as best.ckpt whenever the monitored figure is the best yet."""
    return ModelCheckpoint(
        _folder(folder), "best", monitor=monitor, mode=mode, save_weights_only=True, enable_version_counter=False
    )


def _folder(run: str) -> Path:
    return Path(run) / "checkpoints"
