"""Context encoders: what is in the holes of the image?"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.contracts import Level, UsageError
from visiontasks.heads.fpn import FPN
from visiontasks.heads.pretraining.method import Pyramid
from visiontasks.heads.pretraining.pretext import Pretext
from visiontasks.layers.blocks import resized
from visiontasks.layers.distributed import mean_over_processes
from visiontasks.layers.draws import draws
from visiontasks.losses.pretext import weighted_square


class Inpainting(Pretext):
    """Fills holes of the image from the two coarsest levels.

    Pathak et al. 2016, arXiv 1604.07379, without the adversarial term. The holes are `blocks` squares at random places,
    which may overlap, or one in the centre; a square's side is the share `side` of the image's shorter side, 0.5 in the
    paper for the one in the centre. The backbone sees them in the mean colour of the rest. Squared errors count in the
    holes, and `overlap_weight` times as much in a seam around them, the share `overlap` of the side wide, which the
    backbone sees. An FPN of such a width makes the pixels. Shapes: a pyramid to (B, 3, H, W), -1 for black and 1 for
    white. Raises UsageError where blocks are neither 1 or more nor centre, or side is not between 0 and 1.
    """

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        width: int = 128,
        blocks: int | Literal["centre"] = 4,
        side: float = 0.25,
        overlap: float = 0.055,
        overlap_weight: float = 10.0,
    ) -> None:
        super().__init__()
        if blocks != "centre" and (isinstance(blocks, str) or blocks < 1):
            raise UsageError(f"blocks={blocks} makes no holes: type head.blocks=4 or head.blocks=centre.")
        if not 0 < side < 1:
            raise UsageError(f"side={side} is no share of an image that a hole can have: type head.side=0.25.")
        self.used = min(2, len(levels))
        self.scale = levels[-self.used].stride
        values = 3 * self.scale**2
        self.decoder = FPN(levels=levels[-self.used :], num_classes=values, pyramid_width=width, width=width)
        self.blocks, self.side = blocks, side
        self.overlap, self.overlap_weight = overlap, overlap_weight

    def prepare(self, views: list[Tensor], keys: Tensor) -> tuple[list[Tensor], Any]:
        images = views[0].float()  # (B, 3, H, W)
        size = (images.shape[2], images.shape[3])
        side, seam = (max(least, round(share * min(size))) for least, share in ((1, self.side), (0, self.overlap)))
        corner = self._corners(keys, size, side)  # (B, N, 2)
        hole = covered(corner, side, size)  # (B, 1, H, W)
        around = covered(corner - seam, side + 2 * seam, size) & ~hole  # (B, 1, H, W)
        left = (images * ~hole).sum(dim=(2, 3), keepdim=True) / (~hole).sum(dim=(2, 3), keepdim=True).clamp(min=1)
        return [torch.where(hole, left, images)], (images / 127.5 - 1, hole + self.overlap_weight * around)

    def _corners(self, keys: Tensor, size: tuple[int, int], side: int) -> Tensor:
        """The upper left corners (B, N, 2) of the holes, rows and columns."""
        room = torch.tensor(size, device=keys.device) - side  # (2,)
        if self.blocks == "centre":
            return (room // 2).expand(len(keys), 1, 2)
        return (draws(keys, 2 * self.blocks).view(len(keys), -1, 2) * (room + 1)).long()

    def forward(self, features: Pyramid) -> Tensor:
        return F.pixel_shuffle(self.decoder(features[-self.used :]), self.scale)

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        pixels, weight = targets
        return mean_over_processes(*weighted_square(resized(outputs[0], pixels.shape[-2:]), pixels, weight))

    def picture(self, inputs: list[Tensor], outputs: list[Tensor], targets: Any) -> tuple[list[Tensor], str]:
        """What was seen, and the same with its holes and their seams filled."""
        pixels, weight = targets
        said = torch.where(weight > 0, resized(outputs[0], pixels.shape[-2:]), pixels)
        return [inputs[0][0], 127.5 * (said[0] + 1)], ""


def covered(corner: Tensor, side: int, size: tuple[int, int]) -> Tensor:
    """Where one of some squares lies, (B, 1, H, W); corners (B, N, 2) may be outside."""
    down, across = (
        (place >= corner[..., axis, None]) & (place < corner[..., axis, None] + side)  # (B, N, length)
        for axis, place in enumerate(torch.arange(length, device=corner.device) for length in size)
    )
    return (down[..., None] & across[:, :, None]).any(dim=1, keepdim=True)
