"""Jigsaw puzzles: in which order were nine tiles of the image laid out?"""

from functools import lru_cache
from itertools import permutations as orders
from math import ceil, factorial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from visiontasks.contracts import Level, UsageError
from visiontasks.heads.pretraining.method import Pyramid, mlp, pooled
from visiontasks.heads.pretraining.pretext import Recognition
from visiontasks.layers.draws import draws

SIDE = 3
TILES = SIDE * SIDE
GREY, SPREAD = 128.0, 64.0  # mean of every tile's channels, and standard deviation of its values from it


class Jigsaw(Recognition):
    """Says from nine tiles, each seen by itself, which of a set of permutations they were laid out by.

    Noroozi and Favaro 2016, arXiv 1603.09246: the image is cut into 3 x 3 cells, from each of which a smaller tile is
    taken at a random place, so that edges do not tell what was beside what, and each tile gets the same mean colour and
    deviation. A tile's side is the largest multiple of the backbone's coarsest stride that leaves a share `gap` of the
    cell; the paper has 64 of 75 pixels. width is that of a tile's features, hidden that of what joins them.
    Shapes: a pyramid of 9 B tiles to (B, permutations). Raises UsageError where cells are too small for the stride,
    permutations are not 2 to 9!, or gap is not a share below 1.
    """

    order: Tensor

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        permutations: int = 1000,
        width: int = 512,
        hidden: int = 4096,
        gap: float = 0.125,
    ) -> None:
        super().__init__()
        if not 0 <= gap < 1:
            raise UsageError(f"gap={gap} is no share of a cell that a tile can leave: type head.gap=0.125.")
        self.register_buffer("order", torch.tensor(distant_permutations(permutations)))  # (P, 9)
        self.stride = levels[-1].stride
        self.gap = gap
        self.tile = nn.Sequential(nn.Linear(levels[-1].channels, width), nn.ReLU())
        self.classifier = mlp([TILES * width, hidden, permutations], norm=False)

    def prepare(self, views: list[Tensor], keys: Tensor) -> tuple[list[Tensor], Any]:
        images = views[0]  # (B, 3, H, W)
        cells = [length // SIDE for length in images.shape[-2:]]
        sides = [self._side(cell, min(images.shape[-2:])) for cell in cells]
        drawn = draws(keys, 1 + 2 * TILES)  # (B, 19)
        label = (drawn[:, 0] * len(self.order)).long()  # (B,)
        room = torch.tensor([cell - side + 1 for cell, side in zip(cells, sides, strict=True)], device=keys.device)
        places = (drawn[:, 1:].view(-1, TILES, 2) * room).long()  # (B, 9, 2) rows and columns within cells
        tiles = levelled(cut(images, corners(cells, keys.device) + places, sides))  # (B, 9, 3, h, w)
        order = self.order[label].long()  # (B, 9)
        return [tiles.gather(1, order.view(-1, TILES, 1, 1, 1).expand_as(tiles)).flatten(0, 1)], label

    def _side(self, cell: int, shortest: int) -> int:
        """How long a tile is in a cell."""
        side = int(cell * (1 - self.gap)) // self.stride * self.stride
        if side > 0:
            return side
        needed = self.stride * ceil(SIDE * ceil(self.stride / (1 - self.gap)) / self.stride)
        raise UsageError(
            f"Images of {shortest} pixels make tiles of less than {self.stride}, the backbone's coarsest stride: "
            f"type data.image_size={needed} or more, or a backbone of a smaller stride."
        )

    def forward(self, features: Pyramid) -> Tensor:
        tiles = self.tile(pooled(features))  # (9 B, width)
        return self.classifier(tiles.view(-1, TILES * tiles.shape[1]))  # type: ignore[no-any-return]

    def picture(self, inputs: list[Tensor], outputs: list[Tensor], targets: Any) -> tuple[list[Tensor], str]:
        """The tiles as they were laid out, and where they are said to belong."""
        (order,) = self.order[outputs[0].argmax(dim=1)].long()  # (9,)
        right = (order == self.order[targets[0]]).sum().item()
        return [laid_out(inputs[0]), laid_out(inputs[0][order.argsort()])], f"{right} of {TILES} in place"


def corners(cells: list[int], device: torch.device) -> Tensor:
    """The upper left corners (9, 2) of cells so high and wide, rows and columns, row by row."""
    steps = torch.arange(SIDE, device=device)
    return torch.cartesian_prod(steps, steps) * torch.tensor(cells, device=device)


def cut(images: Tensor, corner: Tensor, sides: list[int]) -> Tensor:
    """Tiles (B, N, C, h, w) of images (B, C, H, W), from corners (B, N, 2) on."""
    rows, columns = (
        corner[:, :, axis, None] + torch.arange(side, device=corner.device)  # (B, N, side)
        for axis, side in enumerate(sides)
    )
    image = torch.arange(len(images), device=corner.device).view(-1, 1, 1, 1)
    return images.permute(0, 2, 3, 1)[image, rows[:, :, :, None], columns[:, :, None]].permute(0, 1, 4, 2, 3)


def levelled(tiles: Tensor) -> Tensor:
    """Tiles (..., C, h, w) whose channels have the mean GREY; unless nearly even, their values deviate by SPREAD."""
    around = tiles - tiles.float().mean(dim=(-2, -1), keepdim=True)  # (..., C, h, w)
    deviation = around.square().mean(dim=(-3, -2, -1), keepdim=True).sqrt()  # (..., 1, 1, 1)
    return GREY + SPREAD * around / deviation.clamp(min=1)


def laid_out(tiles: Tensor, gap: int = 1) -> Tensor:
    """Nine tiles (9, C, h, w) row by row on white, (C, 3 (h + gap), 3 (w + gap))."""
    framed = F.pad(tiles, (0, gap, 0, gap), value=255)  # (9, C, h + gap, w + gap)
    rows = framed.view(SIDE, SIDE, *framed.shape[1:]).permute(2, 0, 3, 1, 4)  # (C, 3, h + gap, 3, w + gap)
    return rows.flatten(3, 4).flatten(1, 2)


@lru_cache(maxsize=4)
def distant_permutations(count: int) -> NDArray[np.uint8]:
    """Permutations of nine tiles that differ in many places, (count, 9), the same each time.

    Greedily, as in algorithm 1 of Noroozi and Favaro 2016, which takes what differs most on average from those before:
    here what differs most from the nearest of them, and of such what does on average. So 100 differ in 6 places or more
    and 1000 in 5 or more, by the average alone in 4 and 2. Raises UsageError where count is not 2 to 9!.
    """
    if not 2 <= count <= factorial(TILES):
        raise UsageError(f"Nine tiles have {factorial(TILES)} permutations, not {count}: type head.permutations=100.")
    every = np.array(list(orders(range(TILES))), np.uint8).T.copy()  # (9, 9!)
    alike = np.zeros(every.shape[1], np.int64)  # places in which one agrees with those chosen, all together
    nearest = np.zeros(every.shape[1], np.int64)  # and with the one that it agrees with most
    chosen = [0]
    while len(chosen) < count:
        agreed = np.sum(every == every[:, chosen[-1], None], axis=0, dtype=np.uint8)
        alike += agreed
        np.maximum(nearest, agreed, out=nearest)
        chosen.append(int(np.argmin(nearest * (TILES * count + 1) + alike)))
    return every[:, chosen].T.copy()
