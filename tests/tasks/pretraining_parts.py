"""A tiny backbone, tiny methods and batches of noise, for the tests of pretraining."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from visiontasks import heads
from visiontasks.contracts import Backbone, Batch, Level

SMALL: dict[str, dict[str, Any]] = {
    "SimCLR": {"dim": 16},
    "MoCo": {"dim": 16, "queue": 32},
    "MoCoV3": {"hidden": 16, "dim": 12},
    "BYOL": {"hidden": 16, "dim": 12},
    "SimSiam": {"dim": 16, "hidden": 8},
    "BarlowTwins": {"dim": 16},
    "VICReg": {"dim": 16},
    "SwAV": {"hidden": 16, "dim": 8, "prototypes": 10},
    "DINO": {"hidden": 16, "dim": 12, "outputs": 20},
}
PRETEXTS: dict[str, dict[str, Any]] = {
    "Rotation": {},
    "Jigsaw": {"permutations": 20, "width": 8, "hidden": 32, "gap": 0.0},
    "Colorization": {"width": 16},
    "Inpainting": {"width": 16},
}
SIDE = 12


class Tiny(Backbone):
    """A convolution with batch norm for each of two levels."""

    levels = (Level(6, 2), Level(8, 4))
    in_channels = 3
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        pairs = ((3, 6), (6, 8))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()) for a, b in pairs
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        first = self.stages[0](images)
        return [first, self.stages[1](first)]


def maker(name: str, **options: Any) -> Any:
    """What makes a tiny method of a backbone's levels."""
    return partial(getattr(heads, name), **((SMALL | PRETEXTS)[name] | options))


def batch(index: Iterable[int], *, views: int = 2) -> Batch:
    """Images and views of noise, each a function of its position alone."""
    rows = list(index)
    pixels = torch.stack([noise(row, views + 1) for row in rows])  # (B, V + 1, 3, H, W)
    return {"image": pixels[:, 0], "views": list(pixels[:, 1:].unbind(1)), "index": torch.tensor(rows)}


def noise(row: int, count: int) -> Tensor:
    """Views that share colour, and differ in each pixel."""
    random = torch.Generator().manual_seed(row)
    colour = torch.randint(40, 200, (1, 3, 1, 1), generator=random)
    grain = torch.randint(0, 50, (count, 3, SIDE, SIDE), generator=random)
    return (colour + grain).to(torch.uint8)
