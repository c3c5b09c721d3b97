"""Steps whose loss or gradients are not finite: left out, named, and too many of them the end of a run."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.optim import Optimizer

from visiontasks.contracts import UsageError
from visiontasks.layers.distributed import collected, world_size
from visiontasks.layers.finite import drop_gradients, gradients_finite

SHOWN = 3  # files in a printed line
FILE = "non_finite.jsonl"


class Seen(NamedTuple):
    """A batch since the last step of the optimiser."""

    index: Any  # (B,) of the training images, where the batch has it
    loss: Any  # (), where the step returned one


class NonFinite(Callback):
    """Leaves out a step whose loss or gradients are NaN or infinite, and ends a run after `stop_after` in a row.

    Gradients are looked at when they have been averaged over processes, so that all leave out the same steps, without
    asking each other; only where a strategy shards them do they exchange one number a step. A step that is left out
    changes no weight, moment or average (`step_skipped` of the module says so to what follows the weights), and
    buffers, such as the statistics of batch norms, are put back to what they were before its first batch. Schedules and
    the count of steps go on. A task that steps itself leaves steps out and puts buffers back by itself, and says so by
    `step_skipped`. Under float16's loss scaling the scaler itself leaves out the step, and lowers its scale.
    Each is printed, and its files are listed in the run folder's non_finite.jsonl: those of the batches whose loss was
    not finite, or, where all were, of every batch of the step. With `stop_after` None it never ends a run.
    Raises UsageError, in every process, after `stop_after` of them in a row.
    """

    def __init__(self, *, stop_after: int | None = 10) -> None:
        if stop_after is not None and stop_after < 1:
            raise UsageError(f"callbacks.non_finite.stop_after={stop_after}: give 1 or more, or null to never stop.")
        self.stop_after = stop_after
        self.skipped = 0
        self.in_a_row = 0
        self._seen: list[Seen] = []
        self._bad: bool | None = None  # None until the optimiser has its turn
        self._buffers: list[Tensor] = []
        self._before: list[Tensor] = []

    @property
    def warnings(self) -> dict[str, str]:
        """What summary.json says of it."""
        line = f"{self.skipped} steps were left out: loss or gradients not finite, see {FILE}"
        return {"non_finite": line} if self.skipped else {}

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        kept = {} if module.steps_itself else module.state_dict(keep_vars=True)
        self._buffers = [
            value for value in kept.values() if isinstance(value, Tensor) and not isinstance(value, nn.Parameter)
        ]
        self._before = [value.detach().clone() for value in self._buffers]
        self._seen, self._bad = [], None

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        if not self._seen and self._buffers:
            torch._foreach_copy_(self._before, self._buffers)

    def on_before_optimizer_step(self, trainer: Trainer, module: LightningModule, optimizer: Optimizer) -> None:
        bad = bool(module.step_skipped) if module.steps_itself else not self._finite(trainer, optimizer)
        module.step_skipped = bad  # type: ignore[assignment]
        self._bad = bad or bool(self._bad)
        if not bad:
            return
        if self._buffers:
            torch._foreach_copy_(self._buffers, self._before)
        if getattr(trainer.precision_plugin, "scaler", None) is None:  # which wants to see what it skips
            drop_gradients(optimizer)

    def _finite(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """The one place where the host waits for the device."""
        finite = gradients_finite(optimizer)
        if world_size() > 1 and not isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            everywhere = finite.to(torch.int32)
            dist.all_reduce(everywhere, dist.ReduceOp.MIN)
            return bool(everywhere)
        return bool(finite)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        given = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._seen.append(Seen(batch.get("index") if isinstance(batch, dict) else None, given))
        if self._bad is None:
            return
        bad = self._bad or bool(module.step_skipped)
        self.in_a_row = self.in_a_row + 1 if bad else 0
        if bad:
            self._tell(trainer)
        self._seen, self._bad = [], None

    def _tell(self, trainer: Trainer) -> None:
        self.skipped += 1
        parts = collected([(_names(trainer, seen.index), _number(seen.loss)) for seen in self._seen])
        batches = [batch for part in parts for batch in part]
        blamed = [(names, loss) for names, loss in batches if not _is_finite(loss)] or batches
        files = [name for names, _ in blamed for name in names]
        losses = [loss for _, loss in blamed]
        if trainer.is_global_zero:
            line = {"step": trainer.global_step, "losses": list(map(str, losses)), "files": files}
            with (Path(trainer.default_root_dir) / FILE).open("a") as lines:
                lines.write(json.dumps(line) + "\n")
            print(_line(trainer.global_step, losses, files), flush=True)
        if self.stop_after is not None and self.in_a_row >= self.stop_after:
            raise UsageError(self._end(files))

    def _end(self, files: list[str]) -> str:
        return (
            f"{self.in_a_row} steps in a row had a loss or gradients that are not finite and were left out, the last "
            f"with {_some(files)}: look at the files in {FILE}, lower optimizer.lr, type trainer.gradient_clip_val=1 "
            "or trainer.precision=32, or callbacks.non_finite.stop_after=null to go on."
        )


def _names(trainer: Trainer, index: Any) -> list[str]:
    """What the data module calls the images of a batch."""
    data: Any = getattr(trainer, "datamodule", None)
    if index is None or not hasattr(data, "train_name"):
        return []
    return [data.train_name(position) for position in index.tolist()]


def _number(loss: Any) -> float | None:
    return float(loss) if isinstance(loss, Tensor) else None


def _is_finite(loss: float | None) -> bool:
    return loss is not None and loss - loss == 0


def _line(step: int, losses: list[float | None], files: list[str]) -> str:
    said = ", ".join(sorted({str(loss) for loss in losses}))
    whose = "gradients" if all(map(_is_finite, losses)) else f"loss {said}"
    return f"skipped    step {step}: {whose} not finite; {_some(files)}"


def _some(files: list[str]) -> str:
    more = ", ..." if len(files) > SHOWN else ""
    return f"{len(files)} images ({', '.join(files[:SHOWN])}{more})" if files else "images without names"
