"""Scale an image, then crop or pad it, by reading and resizing only what ends in the crop."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import albumentations as A
import cv2
import numpy as np
from albumentations.core.type_definitions import Targets
from numpy.typing import NDArray

from visiontasks.contracts import IGNORE
from visiontasks.data.colour import ColourMatrix

Shape = tuple[int, int]  # height, width
Size = int | Sequence[int]  # one side of a square, or (height, width)
Pixels = NDArray[np.uint8]


class Span(NamedTuple):
    """One axis of a scaled crop: pixels start to stop of the image become pixels first to last of the crop."""

    start: int
    stop: int
    first: int
    last: int


class View(NamedTuple):
    """What a scaled crop shows."""

    rows: Span
    columns: Span
    mirrored: bool

    @property
    def shape(self) -> Shape:
        """Height and width of the part of the crop that shows the image."""
        return self.rows.last - self.rows.first, self.columns.last - self.columns.first

    def cut(self, pixels: Pixels) -> Pixels:
        """The part of an image or mask (H, W, ...) that is shown, not a copy."""
        return pixels[self.rows.start : self.rows.stop, self.columns.start : self.columns.stop]


def drawn_span(length: int, *, wanted: int, scale: float, generator: random.Random) -> Span:
    """Scale an axis of `length` pixels and draw the place of a crop of `wanted` pixels in it.

    Where the scaled image is shorter than the crop, the place of the image in the crop is drawn instead.
    """
    full = max(1, round(length * scale))
    offset = generator.randint(min(0, full - wanted), max(0, full - wanted))  # of the crop in the scaled image
    low, high = max(0, offset), min(full, offset + wanted)
    start = min(round(low * length / full), length - 1)
    return Span(start, max(start + 1, round(high * length / full)), low - offset, high - offset)


class ScaledCrop(A.DualTransform):  # type: ignore[misc]
    """Scale the image by a factor drawn from `scale`, cut a random window of `size` or pad to it, mirror it, colour it.

    With `short_side` the factor is one on the scale at which the image's short side has that length. Half are mirrored,
    where `mirror`; `jitter` colours what is shown of the image. The window is cut from the original and resized alone:
    to within a pixel it is the crop that the whole image, resized, would have given.
    Padding is `fill` in images, 255 in a semantic mask and 0 in instance masks; masks are never interpolated.
    """

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(
        self,
        size: Shape,
        scale: tuple[float, float],
        *,
        short_side: int | None = None,
        mirror: bool = False,
        jitter: ColourMatrix | None = None,
        fill: tuple[int, int, int] = (124, 116, 104),
        p: float = 1.0,
    ) -> None:
        super().__init__(p=p)
        self.size = size
        self.scale = scale
        self.short_side = short_side
        self.mirror = mirror
        self.jitter = jitter
        self.padding = fill

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Draw the scale, the window, the side and the colours."""
        shape = params["shape"][:2]
        whole = self.short_side / min(shape) if self.short_side else 1.0
        scale = whole * self.py_random.uniform(*self.scale)
        rows, columns = (
            drawn_span(length, wanted=wanted, scale=scale, generator=self.py_random)
            for length, wanted in zip(shape, self.size, strict=True)
        )
        mirrored = self.mirror and self.py_random.random() < 0.5
        return {"view": View(rows, columns, mirrored), "colours": self._colours()}

    def apply(self, img: Pixels, view: View, colours: dict[str, Any], **_: Any) -> Pixels:
        """Return a new (h, w, 3) image; it is coloured and mirrored while it is small, before or after resizing."""
        window = view.cut(img)
        if view.shape[0] * view.shape[1] <= window.shape[0] * window.shape[1]:
            window = resized(window, view.shape)
        if self.jitter:
            window = self.jitter.apply(window, **colours)
        if view.mirrored:
            window = cv2.flip(window, 1)
        return self._padded(resized(window, view.shape), view, self.padding)

    def apply_to_mask(self, mask: Pixels, view: View, outside: int = IGNORE, **_: Any) -> Pixels:
        """Return a new (h, w) mask."""
        window = resized_mask(view.cut(mask), view.shape)
        return self._padded(cv2.flip(window, 1) if view.mirrored else window, view, (outside,))

    def apply_to_masks(self, masks: Pixels, view: View, **_: Any) -> Pixels:
        """Return new instance masks, (N, h, w)."""
        return np.stack([self.apply_to_mask(mask, view, outside=0) for mask in masks])

    def apply_to_bboxes(self, bboxes: NDArray[Any], view: View, **params: Any) -> NDArray[Any]:
        """Move boxes, in shares of the image's sides, to shares of the crop's; they may reach beyond it."""
        moved = bboxes.copy()
        axes = zip(params["shape"][:2], self.size, (view.rows, view.columns), (1, 0), strict=True)
        for length, wanted, span, place in axes:
            factor = (span.last - span.first) / (span.stop - span.start)
            sides = bboxes[:, [place, place + 2]] * length
            moved[:, [place, place + 2]] = ((sides - span.start) * factor + span.first) / wanted
        if view.mirrored:
            moved[:, [0, 2]] = 1 - moved[:, [2, 0]]
        return moved

    def _colours(self) -> dict[str, Any]:
        if self.jitter is None:
            return {}
        self.jitter.py_random = self.py_random
        return self.jitter.get_params()

    def _padded(self, window: Pixels, view: View, padding: tuple[int, ...]) -> Pixels:
        if window.shape[:2] == self.size:
            return window
        above, left = view.rows.first, view.columns.first
        below, right = self.size[0] - view.rows.last, self.size[1] - view.columns.last
        edges = (above, below, right, left) if view.mirrored else (above, below, left, right)
        return cv2.copyMakeBorder(window, *edges, cv2.BORDER_CONSTANT, value=padding)  # type: ignore[no-any-return]


class ShortSide(A.DualTransform):  # type: ignore[misc]
    """Resize so that the short side has a given length."""

    _targets = (Targets.IMAGE, Targets.MASK, Targets.BBOXES)

    def __init__(self, side: int, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.side = side

    def apply(self, img: Pixels, **_: Any) -> Pixels:
        """Return the resized (h, w, 3) image."""
        return resized(img, self._shape(img))

    def apply_to_mask(self, mask: Pixels, **_: Any) -> Pixels:
        """Return the resized (h, w) mask."""
        return resized_mask(mask, self._shape(mask))

    def apply_to_bboxes(self, bboxes: NDArray[Any], **_: Any) -> NDArray[Any]:
        """Return the boxes: shares of the image's sides do not change."""
        return bboxes

    def _shape(self, pixels: Pixels) -> Shape:
        height, width = pixels.shape[:2]
        scale = self.side / min(height, width)
        return round(height * scale), round(width * scale)


def sides(size: Size) -> Shape:
    """Height and width."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resized(image: Pixels, shape: Shape) -> Pixels:
    """Resize an (H, W, 3) image: linear, and where it shrinks to half or less the mean of all pixels.

    From a factor of two on linear interpolation skips pixels; averaging sees them all, and costs 10 times as much.
    """
    if image.shape[:2] == tuple(shape):
        return image
    halved = min(image.shape[0] / shape[0], image.shape[1] / shape[1]) >= 2
    return cv2.resize(image, shape[::-1], interpolation=cv2.INTER_AREA if halved else cv2.INTER_LINEAR)  # type: ignore[no-any-return]


def resized_mask(mask: Pixels, shape: Shape) -> Pixels:
    """Resize an (H, W) mask: each pixel takes the value at its centre."""
    if mask.shape == tuple(shape):
        return mask
    return cv2.resize(mask, shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)  # type: ignore[no-any-return]
