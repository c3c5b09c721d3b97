"""Barlow Twins and VICReg: two views alike, and no two dimensions."""

from functools import partial
from typing import Any, ClassVar

from torch import Tensor

from visiontasks.contracts import Level
from visiontasks.heads.pretraining.method import Method, Projector, Pyramid, mlp, pair
from visiontasks.losses import barlow_twins, vicreg


class _Expanded(Method):
    """A projection of three wide layers, the last without the bias that both losses take away."""

    augment: ClassVar[str] = "byol"

    def __init__(self, *, levels: tuple[Level, ...], dim: int) -> None:
        super().__init__()
        self.projector = Projector(mlp([levels[-1].channels, dim, dim, dim], bias=False))

    def forward(self, features: Pyramid) -> Tensor:
        return self.projector(features)  # type: ignore[no-any-return]


class BarlowTwins(_Expanded):
    """The cross-correlation of the two views over the global batch is to be the identity.

    Zbontar et al. 2021, arXiv 2103.03230. dim is the width of all three layers; each view goes through the network as a
    batch of its own. Shapes: a pyramid to (B, dim).
    """

    def __init__(self, *, levels: tuple[Level, ...], dim: int = 8192, redundancy: float = 5e-3) -> None:
        super().__init__(levels=levels, dim=dim)
        self.redundancy = redundancy

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:  # noqa: ARG002
        return barlow_twins(*pair(outputs), redundancy=self.redundancy)


class VICReg(_Expanded):
    """The two views are to be near each other, each dimension spread out and no two correlated over the global batch.

    Bardes, Ponce and LeCun 2021, arXiv 2105.04906. dim is the width of all three layers; each view goes through the
    network as a batch of its own. Shapes: a pyramid to (B, dim).
    """

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        dim: int = 8192,
        invariance: float = 25.0,
        variance: float = 25.0,
        covariance: float = 1.0,
    ) -> None:
        super().__init__(levels=levels, dim=dim)
        self.criterion = partial(vicreg, invariance=invariance, variance=variance, covariance=covariance)

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:  # noqa: ARG002
        return self.criterion(*pair(outputs))
