"""Branches of convolutions that all levels of a pyramid share."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_APART = 2  # finest levels that are large enough to be convolved one by one


def branch(layers: nn.Module, maps: list[Tensor]) -> list[Tensor]:
    """Gives the maps of all levels behind 3x3 convolutions with ReLU, and group norm between them where there is one.

    Shapes: maps (B, C, h, w) to as many of the same sizes.
    """
    convolutions = [layer for layer in layers.modules() if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in layers.modules() if isinstance(layer, nn.GroupNorm)]
    for index, convolution in enumerate(convolutions):
        maps = convolved(convolution, maps)
        maps = [level.relu() for level in (map(norms[index], maps) if norms else maps)]
    return maps


def convolved(layer: nn.Conv2d, maps: list[Tensor]) -> list[Tensor]:
    """Convolves every level, the coarse ones side by side as one map with columns of zeros between them.

    On a CPU the gradient of the weights costs as much on a map of four places as on one of a hundred.

    Shapes: maps (B, C, h, w), not growing, to (B, D, h, w) by a 3x3 convolution that keeps the size.
    """
    fine, coarse = maps[:_APART], maps[_APART:]
    if len(coarse) < 2:
        return [layer(level) for level in maps]
    height = coarse[0].shape[-2]
    joined = torch.cat([F.pad(level, (0, 1, 0, height - level.shape[-2])) for level in coarse], dim=3)
    parts = torch.split(layer(joined), [level.shape[-1] + 1 for level in coarse], dim=3)
    own = [part[..., : level.shape[-2], :-1] for part, level in zip(parts, coarse, strict=True)]
    return [*(layer(level) for level in fine), *own]


def by_anchor(maps: list[Tensor], columns: int) -> Tensor:
    """Orders maps (B, A * columns, h, w) by level, place and anchor, (B, P, columns)."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, columns) for level in maps], dim=1)
