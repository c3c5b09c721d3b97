"""Differentiable augmentation of the images that a critic sees, real and generated alike."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.errors import UsageError

DRAWS = 7  # numbers that an image needs
_SHIFT = 1 / 8  # of the side, either way
_HOLE = 1 / 2  # of the side


def diffaugment(images: Tensor, numbers: Tensor, policy: Sequence[str]) -> Tensor:
    """Images altered as the policy says: any of colour, translation and cutout, in that order.

    Zhao et al. 2020, arXiv 2006.10738. Shapes: images (B, C, H, W) in -1..1; numbers (B, DRAWS) from 0 to below 1, a
    row for each image.
    """
    for name, alter in _PARTS.items():
        images = alter(images, numbers) if name in policy else images
    return images


def check_policy(policy: Sequence[str]) -> tuple[str, ...]:
    """The policy; raises UsageError where it names what there is not."""
    unknown = sorted(set(policy) - set(_PARTS))
    if unknown:
        raise UsageError(f"head.diffaugment={list(policy)} has no {unknown[0]}: give any of {', '.join(_PARTS)}.")
    return tuple(policy)


def _colour(images: Tensor, numbers: Tensor) -> Tensor:
    brightness, saturation, contrast = (numbers[:, at].view(-1, 1, 1, 1) for at in range(3))
    images = images + (brightness - 0.5)
    grey = images.mean(dim=1, keepdim=True)
    images = (images - grey) * (2 * saturation) + grey
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * (contrast + 0.5) + mean


def _translation(images: Tensor, numbers: Tensor) -> Tensor:
    """Moves by whole pixels; black comes into view."""
    height, width = images.shape[-2:]
    down, across = (
        _whole(numbers[:, at], 2 * int(side * _SHIFT + 0.5) + 1) - int(side * _SHIFT + 0.5)
        for at, side in ((3, height), (4, width))
    )
    rows = torch.arange(height, device=images.device) + down[:, None]  # (B, H) where each row comes from
    columns = torch.arange(width, device=images.device) + across[:, None]  # (B, W)
    padded = F.pad(images, (1, 1, 1, 1))  # a black pixel around
    rows, columns = (rows + 1).clamp(0, height + 1), (columns + 1).clamp(0, width + 1)
    picked = torch.arange(len(images), device=images.device)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[picked, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2)


def _cutout(images: Tensor, numbers: Tensor) -> Tensor:
    """Blackens a hole whose centre may lie anywhere."""
    inside = []
    for at, side in ((5, images.shape[2]), (6, images.shape[3])):
        hole = int(side * _HOLE + 0.5)
        first = _whole(numbers[:, at], side + (1 - hole % 2)) - hole // 2
        places = torch.arange(side, device=images.device)
        inside.append((places >= first[:, None]) & (places < (first + hole)[:, None]))  # (B, side)
    holes = inside[0][:, None, :, None] & inside[1][:, None, None, :]  # (B, 1, H, W)
    return images.masked_fill(holes, 0)


def _whole(numbers: Tensor, choices: int) -> Tensor:
    """Whole numbers from 0 to below `choices`."""
    return (numbers * choices).long().clamp(max=choices - 1)


_PARTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "colour": _colour,
    "translation": _translation,
    "cutout": _cutout,
}
