"""Class scores of images by windows, mirrored and rescaled copies, around any function of normalised images."""

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

Scores = Callable[[Tensor], Tensor]  # images (B, C, H, W) to class scores (B, K, H, W)


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) at another size, bilinear; those that have it already are passed on."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def padded(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W) whose right and lower edges are repeated until both sides are multiples of a stride."""
    bottom, right = (-side % multiple for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def windowed(scores: Scores, images: Tensor, *, window: tuple[int, int], overlap: float) -> Tensor:
    """Class probabilities (B, K, H, W): the mean over all windows, spread evenly, that a pixel lies in.

    Neighbouring windows share at least `overlap` of their side; an image smaller than the window is one window.
    """
    rows, columns = images.shape[-2:]
    height, width = min(window[0], rows), min(window[1], columns)
    corners = [(top, left) for top in starts(rows, height, overlap) for left in starts(columns, width, overlap)]
    count = images.new_zeros(rows, columns, dtype=torch.float32)
    total: Tensor | float = 0.0
    for top, left in corners:
        place = (..., slice(top, top + height), slice(left, left + width))
        answer = scores(images[place]).float().softmax(dim=1)  # (B, K, height, width)
        total = total + F.pad(answer, (left, columns - left - width, top, rows - top - height))
        count[place] += 1
    return total / count


def starts(length: int, window: int, overlap: float) -> list[int]:
    """Where windows begin so that they cover a length evenly, neighbours sharing at least `overlap` of a window."""
    steps = -(-(length - window) // max(1, int(window * (1 - overlap))))
    return [round(step * (length - window) / max(1, steps)) for step in range(steps + 1)]


def augmented(scores: Scores, images: Tensor, *, scales: Sequence[float], flips: bool) -> Tensor:
    """Class probabilities (B, K, H, W): the mean over the images at all scales, and mirrored where asked."""
    size = images.shape[-2:]

    def answer(scale: float, mirrored: bool) -> Tensor:
        scaled = resized(images, [max(1, round(side * scale)) for side in size])
        given = scores(scaled.flip(-1)).flip(-1) if mirrored else scores(scaled)
        return resized(given.float(), size).softmax(dim=1)

    views = list(product(scales, (False, True) if flips else (False,)))
    return reduce(torch.add, (answer(*view) for view in views)) / len(views)
