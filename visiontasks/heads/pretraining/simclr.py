"""SimCLR: find the other view of an image among all other views of the batch."""

from typing import Any, ClassVar

from torch import Tensor

from visiontasks.contracts import Level
from visiontasks.heads.pretraining.method import Method, Projector, Pyramid, mlp, pair
from visiontasks.losses import nt_xent


class SimCLR(Method):
    """A projection of two layers, batch norm after each as in the authors' code, and NT-Xent over the global batch.

    Chen et al. 2020, arXiv 2002.05709: both views go through the network as one batch. hidden is the width of the
    hidden layer, None for the backbone's. Shapes: a pyramid to (B, dim).
    """

    together: ClassVar[bool] = True

    def __init__(
        self, *, levels: tuple[Level, ...], hidden: int | None = None, dim: int = 128, temperature: float = 0.1
    ) -> None:
        super().__init__()
        width = levels[-1].channels
        self.projector = Projector(mlp([width, hidden or width, dim], last_norm=True))
        self.temperature = temperature

    def forward(self, features: Pyramid) -> Tensor:
        return self.projector(features)  # type: ignore[no-any-return]

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:  # noqa: ARG002
        return nt_xent(*pair(outputs), temperature=self.temperature)
