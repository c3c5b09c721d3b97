"""Class scores of images by windows, mirrored and rescaled copies, around any function of normalised images."""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.errors import UsageError
from visiontasks.layers.blocks import resized

Scores = Callable[[Tensor], Tensor]  # images (B, C, H, W) to class scores (B, K, H, W)


def padded(images: Tensor, multiple: int) -> Tensor:
    """Images (B, C, H, W) whose right and lower edges are repeated until both sides are multiples of a stride."""
    bottom, right = (-side % multiple for side in images.shape[-2:])
    return F.pad(images, (0, right, 0, bottom), mode="replicate") if bottom or right else images


def window_sides(window: int | Sequence[int] | None, overlap: float) -> tuple[int, int] | None:
    """Height and width of windows that share `overlap` of their sides; None looks at images whole.

    Raises UsageError where there are no such windows.
    """
    if not 0 <= overlap < 1:
        raise UsageError(f"task.overlap={overlap} is no share of a window: give 0 or more and less than 1.")
    if window is None:
        return None
    sides = [window, window] if isinstance(window, int) else list(window)
    if len(sides) != 2 or min(sides) < 1:
        raise UsageError(f"task.window={window} is no size in pixels: give one side, or [height,width].")
    return sides[0], sides[1]


def windows(size: Sequence[int], window: tuple[int, int], overlap: float) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the windows of an image, spread evenly, neighbours sharing at least `overlap` of a side.

    An image smaller than the window is one window.
    """
    sides = [min(own, side) for own, side in zip(window, size, strict=True)]
    tops, lefts = (starts(length, side, overlap) for length, side in zip(size, sides, strict=True))
    for top, left in product(tops, lefts):
        yield slice(top, top + sides[0]), slice(left, left + sides[1])


def windowed(scores: Scores, images: Tensor, *, window: tuple[int, int], overlap: float) -> Tensor:
    """Class probabilities (B, K, H, W): the mean over all windows that a pixel lies in."""
    height, width = images.shape[-2:]
    count = images.new_zeros(height, width, dtype=torch.float32)
    total: Tensor | float = 0.0
    for rows, columns in windows((height, width), window, overlap):
        answer = scores(images[..., rows, columns]).float().softmax(dim=1)  # (B, K, rows, columns)
        total = total + F.pad(answer, (columns.start, width - columns.stop, rows.start, height - rows.stop))
        count[rows, columns] += 1
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
