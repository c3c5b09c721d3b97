"""What a run keeps in checkpoints/: last.ckpt to go on from, previous.ckpt in case it is damaged, best.ckpt to use."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from visiontasks.callbacks.metrics_file import MetricsFile
from visiontasks.durable import save_archive, verify
from visiontasks.layers.distributed import announced, anywhere, share_first, world_size
from visiontasks.layers.lifetime import launched

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
_STOP = "visiontasks/stop"  # what processes tell each other: the step at which all of them end


class DurableCheckpoints(TorchCheckpointIO):
    """Writes checkpoints that are whole or not there, keeps the last one before the last, and reads no damaged one.

    Places that are no local files, such as s3://..., are left to Lightning.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        file = Path(path)
        save_archive(checkpoint, file, keep_as=file.with_name(PREVIOUS) if file.name == LAST else None)

    def load_checkpoint(
        self,
        path: Any,
        map_location: Callable[..., Any] | None = lambda storage, _: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        if "://" not in str(path):
            verify(Path(path))
        return super().load_checkpoint(path, map_location, weights_only)


class LastCheckpoint(Callback):
    """Saves the whole state of a run as last.ckpt, where it can be gone on with as if it had never stopped.

    That is between two batches with nothing accumulated: before each validation, which is then done again, before the
    first batch of an epoch that follows none, every `every_n_train_steps` steps of the optimiser where asked, and when
    training ends. A SIGTERM or Ctrl-C saves after the step that is under way and ends the process with the code 128 +
    signal; a second Ctrl-C ends it at once. What Lightning does on SLURM's signal to requeue stays as it is.

    It brings back what Lightning does not: the figures that callbacks and schedulers monitor, and the rows of
    metrics.csv as they were. Before a validation every process takes the buffers of the first, batch norm statistics
    above all, as a resumed run would. It comes before callbacks that change the weights when training ends.
    """

    def __init__(self, *, folder: str, every_n_train_steps: int | None = None) -> None:
        self.file = _folder(folder) / LAST
        self.every = every_n_train_steps
        self.signal: int | None = None
        self._saved: dict[str, Any] = {"step": 0, "figures": {}, "rows": 0}

    def state_dict(self) -> dict[str, Any]:
        return self._saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._saved = dict(state_dict)

    def on_fit_start(self, trainer: Trainer, module: Any) -> None:  # noqa: ARG002
        for logger in _metrics_files(trainer):
            logger.keep(self._saved["rows"])
        self._bring_back_figures(trainer)  # where nothing is left to train, training does not start

    def on_train_start(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        self._bring_back_figures(trainer)  # a sanity check forgets them
        trainer.fit_loop._restarting = False  # else an epoch's end would leave out schedulers that monitor a figure
        self._listen()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if not module.resumable(batch_idx):
            return
        stopping = self._stopping(trainer.global_step)
        if stopping or self._due(trainer.global_step, first=batch_idx == 0):
            self._save(trainer, _between_batches(trainer))
        if stopping:
            self._leave(trainer)

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        share_first([*module.buffers(), *_averaged_buffers(trainer)])
        behind = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        if module.resumable(behind) and self._saved["step"] != trainer.global_step:
            self._save(trainer, _before_validation(trainer))

    def on_validation_batch_start(
        self,
        trainer: Trainer,
        module: Any,  # noqa: ARG002
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        if self.signal is not None and 0 < self._saved["step"] == trainer.global_step:
            self._leave(trainer)

    def on_train_end(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        self._save(trainer, _between_epochs(trainer))
        if anywhere(self.signal is not None):
            self._leave(trainer)

    def on_test_start(self, trainer: Any, module: Any) -> None:  # noqa: ARG002
        """Has a SIGTERM end the process at once: there is nothing to save, and Lightning would exit with 0."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _bring_back_figures(self, trainer: Any) -> None:
        trainer._logger_connector._callback_metrics.update(self._saved["figures"])

    def _stopping(self, step: int) -> bool:
        """Whether it is time to stop: one process does so at once, several together at the step after the next.

        The others begin that one only when this process has made the one before, and so have heard of it.
        """
        if world_size() == 1:
            return self.signal is not None
        last = announced(_STOP, step + 1 if self.signal is not None else None)
        return last is not None and step >= last

    def _due(self, step: int, *, first: bool) -> bool:
        saved = self._saved["step"]
        asked = self.every is not None and step // self.every != saved // self.every
        return bool(step != saved and (first or asked))

    def _save(self, trainer: Any, counters: Any) -> None:
        for logger in trainer.loggers:
            logger.save()
        figures = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
        rows = sum(logger.rows() for logger in _metrics_files(trainer)) if trainer.is_global_zero else 0
        self._saved = {"step": trainer.global_step, "figures": figures, "rows": rows}
        with counters:
            trainer.save_checkpoint(self.file)

    def _listen(self) -> None:
        """Takes over the signals to stop until Lightning, at the end, puts back what was there before it."""

        def stop(number: int, _: FrameType | None) -> None:
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        self.signal = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)
            signal.signal(signal.SIGINT, stop)

    def _leave(self, trainer: Any) -> None:
        """Ends the process; what Lightning launched ends with 0, or it would kill the first process meanwhile."""
        number = self.signal or signal.SIGTERM
        if trainer.is_global_zero:
            print(
                f"stopped    by {signal.Signals(number).name}: type resume={self.file.parents[1]} to go on", flush=True
            )
        raise SystemExit(0 if launched() else 128 + number)


@contextmanager
def _counters(trainer: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The loop over an epoch and its counters of batches of training and of validation, to be changed for a while."""
    loop = trainer.fit_loop.epoch_loop
    training, validation = loop.batch_progress, loop.val_loop.batch_progress
    before = training.state_dict(), validation.state_dict(), loop._batches_that_stepped
    try:
        validation.load_state_dict(_counted(0, 0))
        yield loop, training, validation
    finally:
        training.load_state_dict(before[0])
        validation.load_state_dict(before[1])
        loop._batches_that_stepped = before[2]


@contextmanager
def _between_batches(trainer: Any) -> Iterator[None]:
    """Within it the loops say that a batch with its validation is done and the next one has not begun.

    The counters do not tell Lightning how far it came (total.started is one less), so that it trains next; of all its
    ways to go on this one neither validates nor steps a scheduler again. It adds one to the batches that stepped.
    """
    with _counters(trainer) as (loop, training, _):
        state = _counted(training.total.processed, training.current.processed)
        state["total"]["started"] -= 1
        training.load_state_dict(state)
        loop._batches_that_stepped -= 1
        yield


@contextmanager
def _before_validation(trainer: Any) -> Iterator[None]:
    """Within it the loops say that a validation was begun, which Lightning begins again."""
    with _counters(trainer) as (_, training, validation):
        last = training.is_last_batch
        training.load_state_dict(_counted(training.total.processed, training.current.processed, last=last))
        state = _counted(0, 0)
        state["total"] |= {"ready": 1, "started": 1}
        validation.load_state_dict(state)
        yield


@contextmanager
def _between_epochs(trainer: Any) -> Iterator[None]:
    """Within it the loops say that no batch of the next epoch has begun."""
    with _counters(trainer) as (_, training, _):
        training.load_state_dict(_counted(training.total.processed, 0))
        yield


def _counted(total: int, current: int, *, last: bool = False) -> dict[str, Any]:
    """The state of a loop's counter with so many batches behind it."""
    stages = ("ready", "completed", "started", "processed")
    return {"total": dict.fromkeys(stages, total), "current": dict.fromkeys(stages, current), "is_last_batch": last}


def _metrics_files(trainer: Any) -> list[MetricsFile]:
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsFile)]


def _averaged_buffers(trainer: Any) -> list[Tensor]:
    """The buffers of the moving averages of the weights."""
    averaging = [callback for callback in trainer.callbacks if isinstance(callback, WeightAveraging)]
    models = [callback._average_model for callback in averaging if callback._average_model is not None]
    return [buffer for model in models for buffer in model.buffers()]


class _BestCheckpoint(ModelCheckpoint):
    """Lightning's, which would forget the best figure of a run whose folder has moved.

    It saves weights alone, but for weights in shards, whose strategy loads none without the optimiser.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.save_weights_only = not isinstance(trainer.strategy, ModelParallelStrategy)
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        file = str(Path(str(self.dirpath)) / "best.ckpt")
        if state_dict["best_model_path"] and Path(file).is_file():
            score = state_dict["best_model_score"]
            own = {"dirpath": self.dirpath, "best_model_path": file, "kth_best_model_path": file}
            state_dict = state_dict | own | {"best_k_models": {file: score}}
        super().load_state_dict(state_dict)
        self.current_score = state_dict["current_score"]


def last_checkpoint(*, folder: str, every_n_train_steps: int | None = None) -> LastCheckpoint:
    """Saves the whole state of the run as last.ckpt around every epoch, and every so many steps where asked."""
    return LastCheckpoint(folder=folder, every_n_train_steps=every_n_train_steps)


def best_checkpoint(*, folder: str, monitor: str, mode: str) -> ModelCheckpoint:
    """Saves the weights, without the optimiser's state, as best.ckpt whenever the monitored figure is the best yet."""
    return _BestCheckpoint(_folder(folder), "best", monitor=monitor, mode=mode, enable_version_counter=False)


def _folder(run: str) -> Path:
    return Path(run) / "checkpoints"
