"""DINO: small crops predict what a teacher says of large ones."""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visiontasks.contracts import Level
from visiontasks.heads.pretraining.method import Method, Projector, Pyramid, drop_gradients
from visiontasks.layers.embeddings import unit
from visiontasks.losses import Centre, dino


class DINO(Method):
    """A projection of three layers and a linear one of unit weights; the teacher's answers are centred and sharpened.

    Caron et al. 2021, arXiv 2104.14294: crops of one size go through the backbone, and all of them through the
    projection, as one batch. teacher_temperature rises to final_temperature during `warmup`, a share of the training
    that was 30 of 300 epochs; an evaluation takes the final one. frozen is the share during which the last layer does
    not learn, in the paper the first epoch. Shapes: a pyramid to (B, outputs).
    """

    augment: ClassVar[str] = "dino"
    most: ClassVar[int | None] = None
    together: ClassVar[bool] = True
    in_batch: ClassVar[bool] = False

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        hidden: int = 2048,
        dim: int = 256,
        outputs: int = 65536,
        student_temperature: float = 0.1,
        teacher_temperature: float = 0.04,
        final_temperature: float = 0.07,
        warmup: float = 0.1,
        centre_momentum: float = 0.9,
        frozen: float = 0.01,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
    ) -> None:
        super().__init__()
        layers = nn.Sequential(*_layers(levels[-1].channels, hidden, dim), UnitLinear(dim, outputs))
        self.projector = Projector(layers)
        self.last = len(layers) - 1
        self.centre = Centre(outputs, centre_momentum)
        self.student_temperature = student_temperature
        self.temperatures = (teacher_temperature, final_temperature)
        self.warmup = warmup
        self.frozen = frozen
        self.momentum, self.final_momentum = momentum, final_momentum

    def forward(self, features: Pyramid) -> Tensor:
        return self.projector(features)  # type: ignore[no-any-return]

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        return dino(
            torch.stack(outputs),
            torch.stack(targets),
            self.centre.centre,
            teacher_temperature=self.teacher_temperature(),
            student_temperature=self.student_temperature,
        )

    def teacher_temperature(self) -> float:
        """What the teacher's answers are divided by."""
        first, final = self.temperatures
        share = min(1.0, self.progress / self.warmup) if self.training and self.warmup > 0 else 1.0
        return first + (final - first) * share

    def observe(self, outputs: list[Tensor], targets: Any) -> None:  # noqa: ARG002
        self.centre.update(torch.stack(targets))

    def before_step(self) -> None:
        if self.progress < self.frozen:
            drop_gradients(self.projector.get_submodule(f"layers.{self.last}"))


class UnitLinear(nn.Module):
    """Cosines between inputs and learnt directions: weight normalisation with all lengths kept at 1.

    Salimans and Kingma 2016, arXiv 1602.07868. Shapes: (B, D) to (B, K).
    """

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, rows: Tensor) -> Tensor:
        return unit(rows) @ unit(self.weight).T


def _layers(width: int, hidden: int, dim: int) -> list[nn.Module]:
    """Three linear layers with GELU between them, their weights drawn as in the authors' code."""
    linears = [nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, dim)]
    for linear in linears:
        nn.init.trunc_normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return [linears[0], nn.GELU(), linears[1], nn.GELU(), linears[2]]
