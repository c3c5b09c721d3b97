"""What goes wrong in silence in the first steps of a training: a callback that watches them, and its verdicts."""

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from visiontasks.contracts import Verdict
from visiontasks.tasks.base import Task
from visiontasks.tasks.classification import Classification
from visiontasks.tasks.segmentation import Segmentation

_LISTED = 3
_FAR = 0.5  # share of the loss of chance by which a first loss may differ from it


class Group(NamedTuple):
    """A parameter group of an optimiser."""

    tensors: int
    rate: float
    decay: float


class Examination(Callback):
    """Watches the first steps of a training: losses, gradients, what is frozen, the optimisers and the time.

    It should be the last of the callbacks, for it looks at what is frozen after the others have frozen it.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.groups: list[Group] = []
        self.used: set[str] = set()
        self.learning: set[str] = set()
        self.frozen: dict[str, Tensor] = {}
        self.moved: list[str] = []
        self.seconds: list[float] = []
        self.images = 0
        self._began = 0.0

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.frozen = {name: value.detach().clone() for name, value in frozen(module).items()}
            self.learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
            groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
            self.groups = [
                Group(
                    len(group["params"]),
                    float(group.get("initial_lr", group["lr"])),
                    float(group.get("weight_decay", 0.0)),
                )
                for group in groups
            ]
        self.images = len(batch["index"])
        self._began = time.perf_counter()

    def on_after_backward(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self.used |= {name for name, parameter in module.named_parameters() if parameter.grad is not None}

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        module: LightningModule,  # noqa: ARG002
        outputs: Any,
        batch: Any,  # noqa: ARG002
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self.losses.append(float("nan") if loss is None else float(loss))
        self.seconds.append(time.perf_counter() - self._began)

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        now = frozen(module)
        self.moved = [name for name, before in self.frozen.items() if name in now and not _equal(before, now[name])]

    def images_per_second(self) -> float:
        """Of the steps after the first, which warms up."""
        steps = self.seconds[1:] or self.seconds
        return self.images * len(steps) / max(sum(steps), 1e-9)


def frozen(module: nn.Module) -> dict[str, Tensor]:
    """By name, what in the backbone should never change: parameters without gradient, and statistics beside them."""
    backbone: nn.Module = getattr(module, "backbone", module)
    found: dict[str, Tensor] = {name: value for name, value in backbone.named_parameters() if not value.requires_grad}
    for prefix, child in backbone.named_modules():
        own = list(child.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            found |= {f"{prefix}.{name}".lstrip("."): buffer for name, buffer in child.named_buffers(recurse=False)}
    return found


def frozen_parts(seen: Examination) -> Verdict:
    """Whether what is frozen has stayed as it was, batch-norm statistics included."""
    if not seen.frozen:
        return Verdict("frozen", "ok", "nothing in the backbone is frozen")
    if seen.moved:
        told = (
            f"{len(seen.moved)} of {len(seen.frozen)} frozen tensors of the backbone moved in {len(seen.losses)} steps"
        )
        return Verdict("frozen", "fault", f"{told}: {_some(seen.moved)}; freeze with eval() too, as transfer= does")
    return Verdict("frozen", "ok", f"all {len(seen.frozen)} frozen tensors of the backbone stayed to the bit")


def unused_parameters(seen: Examination) -> Verdict:
    """Whether everything that is to learn has had a gradient."""
    unused = sorted(seen.learning - seen.used)
    if unused:
        told = f"{len(unused)} of {len(seen.learning)} tensors that should learn never had a gradient"
        return Verdict("gradients", "fault", f"{told}: {_some(unused)}; they never learn, and stop DDP")
    return Verdict("gradients", "ok", f"all {len(seen.learning)} tensors that should learn had a gradient")


def learning_rates(seen: Examination) -> Verdict:
    """The full learning rate and weight decay of each parameter group."""
    table = ", ".join(f"{group.tensors} tensors at {group.rate:.3g} (decay {group.decay:.3g})" for group in seen.groups)
    wrong = [group for group in seen.groups if not (math.isfinite(group.rate) and group.rate > 0)]
    if wrong or not seen.groups:
        return Verdict("rates", "fault", f"{table or 'no group'}: a rate that is not above 0 learns nothing")
    return Verdict("rates", "ok", table)


def first_loss(seen: Examination, task: Task) -> Verdict:
    """Whether the losses are finite, and the first one that of chance, where that is known."""
    wrong = [step for step, loss in enumerate(seen.losses) if not math.isfinite(loss)]
    if wrong or not seen.losses:
        return Verdict("loss", "fault", f"the loss is not finite at step {wrong[0] if wrong else 0}: {seen.losses[:4]}")
    chance, first = chance_loss(task), seen.losses[0]
    if chance is None:
        return Verdict(
            "loss", "ok", f"{first:.4g} at step 0, finite in {len(seen.losses)} steps; no chance level is known"
        )
    told = f"{first:.4g} at step 0, where chance gives {chance:.4g}"
    if abs(first - chance) > _FAR * chance:
        return Verdict(
            "loss", "warning", f"{told}: are the labels, the loss or the head's first weights as they should?"
        )
    return Verdict("loss", "ok", told)


def chance_loss(task: Task) -> float | None:
    """The loss of predictions that know nothing: ln K of K classes, ln 2 of labels; None where it is not known."""
    if isinstance(task, Classification):
        return math.log(2) if task.multi_label else math.log(max(2, len(task.classes)))
    if isinstance(task, Segmentation) and task.loss_weights == {"cross_entropy": 1.0} and not task.auxiliary_weight:
        return math.log(max(2, len(task.classes)))
    return None


def overfits(losses: Sequence[float]) -> Verdict:
    """Whether the loss of one batch, learnt again and again, falls."""
    if not losses or not all(map(math.isfinite, losses)):
        return Verdict("overfits", "fault", f"the loss of one batch learnt {len(losses)} times is not finite")
    last = min(losses[-3:])
    told = f"one batch learnt {len(losses)} times: from {losses[0]:.4g} to {last:.4g}"
    if last > 0.9 * losses[0]:
        return Verdict("overfits", "warning", f"{told}, hardly less: is the learning rate wrong, or a part cut off?")
    return Verdict("overfits", "ok", told)


def who_waits(loader: float, step: float, *, workers: int, gpu: bool) -> Verdict:
    """Which of loader and step waits for the other; both in images a second."""
    told = f"the loader gives {loader:,.0f} images a second ({workers} workers), the step takes {step:,.0f}"
    if loader >= 1.2 * step:
        return Verdict("speed", "ok", f"{told}: the loader never keeps it waiting")
    hint = f"type data.num_workers={max(2, 2 * workers)} or data.cache=ram" if gpu else "type data.cache=ram"
    return Verdict("speed", "warning", f"{told}: the step waits for the loader; {hint}")


def _equal(before: Tensor, after: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(before.cpu()), torch.nan_to_num(after.detach().cpu()))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_LISTED]) + (", ..." if len(listed) > _LISTED else "")
