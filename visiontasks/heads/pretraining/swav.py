"""SwAV: views of an image predict each other's prototypes."""

from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from visiontasks.contracts import Level
from visiontasks.heads.pretraining.method import Method, Projector, Pyramid, drop_gradients, mlp
from visiontasks.layers.distributed import world_size
from visiontasks.layers.queue import Queue
from visiontasks.losses import Prototypes, swav


class SwAV(Method):
    """A projection of two layers and prototypes, which the first two crops are dealt evenly.

    Caron et al. 2020, arXiv 2006.09882: crops of one size go through the backbone, and all of them through the
    projection, as one batch. queue is how many earlier embeddings of each of the two crops are dealt along, once there
    are so many: the paper takes 3840 for batches of 256 images, and none for large ones. frozen is the share of the
    training during which the prototypes do not learn, in the paper the first epoch. Shapes: a pyramid to (B, dim).
    """

    augment: ClassVar[str] = "swav"
    most: ClassVar[int | None] = None
    together: ClassVar[bool] = True

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        hidden: int = 2048,
        dim: int = 128,
        prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        iterations: int = 3,
        queue: int = 0,
        frozen: float = 0.0025,
    ) -> None:
        super().__init__()
        self.projector = Projector(mlp([levels[-1].channels, hidden, dim]))
        self.prototypes = Prototypes(dim, prototypes)
        self.queues = nn.ModuleList(Queue(dim, queue) for _ in range(2 if queue else 0))
        self.length = queue
        self.criterion = partial(swav, temperature=temperature, epsilon=epsilon, iterations=iterations)
        self.frozen = frozen
        self.known: Tensor
        self.register_buffer("known", torch.zeros((), dtype=torch.long))  # embeddings that the queues have been given

    def forward(self, features: Pyramid) -> Tensor:
        return self.projector(features)  # type: ignore[no-any-return]

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:  # noqa: ARG002
        return self.criterion(self.prototypes(torch.stack(outputs)), past=self._past())

    @torch.no_grad()
    def _past(self) -> Tensor | None:
        """What the prototypes say of the queues, (2, Q, K); None while they are not full."""
        if not self.queues or self.known < self.length:
            return None
        return self.prototypes(torch.stack([queue() for queue in self._queues()]))  # type: ignore[no-any-return]

    def observe(self, outputs: list[Tensor], targets: Any) -> None:  # noqa: ARG002
        for queue, rows in zip(self._queues(), outputs, strict=False):
            queue.push(rows)
        self.known += len(outputs[0]) * world_size()

    def _queues(self) -> list[Queue]:
        return cast(list[Queue], list(self.queues))

    def before_step(self) -> None:
        if self.progress < self.frozen:
            drop_gradients(self.prototypes)

    def after_step(self) -> None:
        self.prototypes.normalise()
