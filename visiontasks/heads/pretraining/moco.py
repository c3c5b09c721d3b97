"""MoCo: find an image's key, which a slowly moving teacher gives, among the keys of many others."""

from typing import Any, ClassVar

from torch import Tensor

from visiontasks.contracts import Level
from visiontasks.heads.pretraining.method import Method, Projector, Pyramid, mlp, pair
from visiontasks.layers.queue import Queue
from visiontasks.losses import info_nce, symmetric_info_nce


class MoCo(Method):
    """A projection of two layers; the other images are a queue of the last keys.

    He et al. 2019, arXiv 1911.05722, as version 2, Chen et al. 2020, arXiv 2003.04297: the student sees the first view
    and the teacher the second. The paper shuffles images over GPUs so that batch norm tells neither which belong
    together; here batch norm is over all processes. hidden is the width of the hidden layer, None for the backbone's,
    queue the number of keys. Shapes: a pyramid to (B, dim).
    """

    augment: ClassVar[str] = "moco"
    in_batch: ClassVar[bool] = False
    student_views: ClassVar[slice] = slice(0, 1)
    teacher_views: ClassVar[slice] = slice(1, 2)

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        hidden: int | None = None,
        dim: int = 128,
        queue: int = 65536,
        temperature: float = 0.2,
        momentum: float = 0.999,
        final_momentum: float = 0.999,
    ) -> None:
        super().__init__()
        width = levels[-1].channels
        self.projector = Projector(mlp([width, hidden or width, dim], norm=False))
        self.queue = Queue(dim, queue)
        self.temperature = temperature
        self.momentum, self.final_momentum = momentum, final_momentum

    def forward(self, features: Pyramid) -> Tensor:
        return self.projector(features)  # type: ignore[no-any-return]

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        return info_nce(outputs[0], targets[0], self.queue(), temperature=self.temperature)

    def observe(self, outputs: list[Tensor], targets: Any) -> None:  # noqa: ARG002
        self.queue.push(targets[0])


class MoCoV3(Method):
    """A projection and a prediction of two layers each, with batch norms; the other images are those of the batch.

    Chen, Xie and He 2021, arXiv 2104.02057, as in the authors' code for ResNet-50; temperature is 0.2 there for vision
    transformers. Each view goes through the network as a batch of its own. Shapes: a pyramid to (B, dim).
    """

    augment: ClassVar[str] = "byol"

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        hidden: int = 4096,
        dim: int = 256,
        temperature: float = 1.0,
        momentum: float = 0.99,
        final_momentum: float = 1.0,
    ) -> None:
        super().__init__()
        self.projector = Projector(mlp([levels[-1].channels, hidden, dim], last_norm=True, affine=False))
        self.predictor = mlp([dim, hidden, dim], last_norm=True, affine=False)
        self.temperature = temperature
        self.momentum, self.final_momentum = momentum, final_momentum

    def forward(self, features: Pyramid) -> Tensor:
        return self.predictor(self.projector(features))  # type: ignore[no-any-return]

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        return symmetric_info_nce(*pair(outputs), *pair(targets), temperature=self.temperature)
