"""What the classic pretexts share: one view, altered so that how it was altered, or what was taken, can be asked."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontasks.heads.pretraining.method import Method
from visiontasks.layers.distributed import mean_over_processes
from visiontasks.losses import cross_entropy


class Pretext(Method):
    """Learns from one view of each image by itself."""

    fewest: ClassVar[int] = 1
    most: ClassVar[int | None] = 1
    augment: ClassVar[str] = "one_view"
    in_batch: ClassVar[bool] = False
    pictured: ClassVar[bool] = True


class Recognition(Pretext):
    """Says which of a few things was done to an image; `pretext_accuracy` is the share of right answers."""

    figures: ClassVar[tuple[str, ...]] = ("pretext_accuracy",)

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        return mean_over_processes(*cross_entropy(outputs[0], targets))

    def measure(self, outputs: list[Tensor], targets: Any) -> Tensor:
        right = outputs[0].argmax(dim=1) == targets  # (N,)
        return torch.stack((right.sum(), right.new_tensor(len(right), dtype=torch.long))).float()[None]
