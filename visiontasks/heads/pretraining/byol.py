"""BYOL and SimSiam: predict what is said of the other view, without comparing images with each other."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontasks.contracts import Level
from visiontasks.heads.pretraining.method import Method, Projector, Pyramid, mlp, pair
from visiontasks.losses import negative_cosine


class BYOL(Method):
    """A projection and a prediction of two layers each; the targets are a teacher's projections.

    Grill et al. 2020, arXiv 2006.07733; the momentum is that of their 1000 epochs, 0.99 for 300. Each view goes through
    the network as a batch of its own. Shapes: a pyramid to (B, dim).
    """

    augment: ClassVar[str] = "byol"
    in_batch: ClassVar[bool] = False

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        hidden: int = 4096,
        dim: int = 256,
        momentum: float = 0.996,
        final_momentum: float = 1.0,
    ) -> None:
        super().__init__()
        self.projector = Projector(mlp([levels[-1].channels, hidden, dim]))
        self.predictor = mlp([dim, hidden, dim])
        self.momentum, self.final_momentum = momentum, final_momentum

    def forward(self, features: Pyramid) -> Tensor:
        return self.predictor(self.projector(features))  # type: ignore[no-any-return]

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        """The squared distance of unit vectors, both ways."""
        (first, second), (first_target, second_target) = pair(outputs), pair(targets)
        return 4 + 2 * negative_cosine(first, second_target) + 2 * negative_cosine(second, first_target)


class SimSiam(Method):
    """A projection of three layers and a prediction through a narrow one; the targets are its own projections.

    Chen and He 2020, arXiv 2011.10566. hidden is the width of the prediction's hidden layer. Each view goes through the
    network as a batch of its own. Shapes: a pyramid to (B, 2, dim), predictions and projections.
    """

    augment: ClassVar[str] = "moco"
    in_batch: ClassVar[bool] = False

    def __init__(self, *, levels: tuple[Level, ...], dim: int = 2048, hidden: int = 512) -> None:
        super().__init__()
        self.projector = Projector(mlp([levels[-1].channels, dim, dim, dim], last_norm=True, affine=False))
        self.predictor = mlp([dim, hidden, dim])

    def forward(self, features: Pyramid) -> Tensor:
        projections = self.projector(features)  # (B, D)
        return torch.stack((self.predictor(projections), projections), dim=1)

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:  # noqa: ARG002
        (first, first_target), (second, second_target) = (said.unbind(1) for said in pair(outputs))
        return (negative_cosine(first, second_target) + negative_cosine(second, first_target)) / 2
