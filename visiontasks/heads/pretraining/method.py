"""What a method of learning without labels promises the task that trains it, and the parts that methods share."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from visiontasks.contracts import Level, UsageError

Pyramid = list[Tensor]  # (B, C, H, W) a level, fine to coarse


class Method(nn.Module):
    """Learns from views of images: what the network says of one view has to fit what is known or said of another.

    In a training step the task calls `prepare`, gives each input to the backbone and its pyramid to `forward`, then
    calls `loss` and `observe`; around each step of the optimiser it calls `before_step` and `after_step`. Where
    `momentum` is a number there is a teacher: a copy of the backbone and of `projector` that follows both by a moving
    average, and what it says of views are the targets.
    """

    serves: ClassVar[str] = "pretraining"
    fewest: ClassVar[int] = 2  # views of an image
    most: ClassVar[int | None] = 2  # None: any number
    augment: ClassVar[str] = "simclr"  # the choice of augment that gives such views
    together: ClassVar[bool] = False  # views of one size go through the network, and its batch norms, as one batch
    in_batch: ClassVar[bool] = True  # images of one batch are compared, so that accumulation does not enlarge it
    student_views: ClassVar[slice] = slice(None)
    teacher_views: ClassVar[slice] = slice(2)
    figures: ClassVar[tuple[str, ...]] = ()  # what `measure` measures
    pictured: ClassVar[bool] = False  # `picture` shows more than the views

    momentum: float | None = None  # of the teacher; None: there is none
    final_momentum: float = 1.0  # what it rises to along half a cosine
    progress: float = 0.0  # the share of the training that is behind; set by the task before each step
    projector: "Projector"  # which a teacher copies too

    def check(self, views: int) -> None:
        """Raises UsageError where images come in a number of views that the method cannot take."""
        most = views if self.most is None else self.most
        if self.fewest <= views <= most:
            return
        wanted = f"{self.fewest}" if self.most == self.fewest else f"{self.fewest} or more"
        raise UsageError(
            f"head={type(self).__name__} learns from {wanted} views of an image and augment.train makes {views}: "
            f"type augment={self.augment}."
        )

    def prepare(self, views: list[Tensor], keys: Tensor) -> tuple[list[Tensor], Any]:  # noqa: ARG002
        """What the backbone is to see, and what is known of it.

        Shapes: views, a list of uint8 (B, 3, h, w); keys (B,) int64, one an image and an epoch, for
        `heads.pretraining.draws.draws`. Returns images on the scale of 0 to 255, of any number and size, in the same
        layout, and targets as `loss` takes them.
        """
        return views, None

    def forward(self, features: Pyramid) -> Tensor:
        """What the student says of an input, (B, ...)."""
        raise NotImplementedError

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        """A scalar whose gradient, averaged over processes, is that of the global batch.

        outputs are what the student said of each input; targets are what the teacher said of `teacher_views`, a list
        of tensors without gradient, or without a teacher what `prepare` gave.
        """
        raise NotImplementedError

    def observe(self, outputs: list[Tensor], targets: Any) -> None:
        """Keeps what later steps need of a batch, such as a queue; called without gradients after its loss."""

    def measure(self, outputs: list[Tensor], targets: Any) -> Tensor:  # noqa: ARG002
        """Sums and counts (F, 2) of the `figures` of an evaluation batch."""
        return outputs[0].new_zeros(len(self.figures), 2)

    def picture(self, inputs: list[Tensor], outputs: list[Tensor], targets: Any) -> tuple[list[Tensor], str]:
        """What one image was made to and what was said of it, images (3, h, w) from 0 to 255, and a title."""
        raise NotImplementedError

    def before_step(self) -> None:
        """Changes gradients before the optimiser uses them."""

    def after_step(self) -> None:
        """Changes weights after the optimiser has."""


class MakeMethod(Protocol):
    """Makes a method for a backbone's levels."""

    def __call__(self, *, levels: tuple[Level, ...]) -> Method: ...


class Projector(nn.Module):
    """Layers on the coarsest map, averaged over its places.

    Shapes: a pyramid whose last map is (B, C, H, W) to (B, D).
    """

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, features: Pyramid) -> Tensor:
        return self.layers(pooled(features))  # type: ignore[no-any-return]  # (B, D)


def pooled(features: Pyramid) -> Tensor:
    """The coarsest map averaged over its places, (B, C)."""
    return features[-1].mean(dim=(2, 3))


def mlp(
    widths: Sequence[int], *, norm: bool = True, last_norm: bool = False, affine: bool = True, bias: bool = True
) -> nn.Sequential:
    """Make linear layers between such widths with ReLU between them.

    norm puts a batch norm before each ReLU, last_norm one at the end, with weights of its own where affine; bias is
    that of the last layer. A layer before a batch norm has none, which the norm would take away again.
    """
    layers: list[nn.Module] = []
    for inner, outer in list(pairwise(widths))[:-1]:
        layers += [nn.Linear(inner, outer, bias=not norm), *([nn.BatchNorm1d(outer)] if norm else []), nn.ReLU(True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=bias and not last_norm))
    return nn.Sequential(*layers, *([nn.BatchNorm1d(widths[-1], affine=affine)] if last_norm else []))


def pair(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """What was said of the first and the second view."""
    first, second = rows
    return first, second


@torch.no_grad()
def drop_gradients(module: nn.Module) -> None:
    """Leaves the optimiser nothing to change in a module."""
    for parameter in module.parameters():
        parameter.grad = None
