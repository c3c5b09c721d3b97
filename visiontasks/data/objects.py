"""Augmentation of images with objects: boxes, labels and masks follow the pixels, and no sliver of a box is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import IGNORE, Sample, UsageError
from visiontasks.data.annotations import tight_boxes
from visiontasks.data.augment import Range
from visiontasks.data.colour import ColourMatrix
from visiontasks.data.scaled_crop import Shape, Size, resized, resized_mask, sides

GREY = 114  # what the padding shows, near the mean of photographs
LEAST_SIDE = 1.0  # pixels of the smallest box that is still a training target
_SPLIT = (0.35, 0.65)  # where the four images of a mosaic meet, in shares of the side
_BLEND = 32.0  # both parameters of the Beta distribution of MixUp's weight: near one half


def scale_and_crop_objects(
    *,
    size: Size,
    mirror: bool,
    boxes: bool = True,  # noqa: ARG001
    scale: Range = (0.6, 1.6),
    visible: float = 0.2,
    brightness: float = 0.3,
    contrast: float = 0.3,
    saturation: float = 0.3,
    hue: float = 0.05,
    mosaic: float = 0.0,
    mixup: float = 0.0,
    copy_paste: float = 0.0,
    fill: int = GREY,
) -> ObjectAugment:
    """Scale at random, cut or pad to the size around a random object, mirror half the time, jitter the colours.

    `scale` is a factor on the largest scale at which the whole image fits; its logarithm is uniform. An object remains
    where at least `visible` of its box's area, and a pixel each way, is left; a box that is off its mask by more than
    a pixel, as after a cut, becomes tight around what is left of the mask.
    `mosaic`, `mixup` and `copy_paste` are the probabilities of joining in other training images: four in a random grid
    (Bochkovskiy et al. 2020, arXiv 2004.10934), the blend of two with the objects of both (Zhang et al. 2019,
    arXiv 1902.04103), and some objects of another pasted by their masks (Ghiasi et al. 2020, arXiv 2012.07177).
    Raises UsageError where a probability is outside 0 to 1 or scale is no range.
    """
    if not 0 < scale[0] <= scale[1]:
        raise UsageError(f"scale={list(scale)} is no range of factors: type augment.train.scale=[0.6,1.6]")
    for name, value in (("mosaic", mosaic), ("mixup", mixup), ("copy_paste", copy_paste)):
        if not 0 <= value <= 1:
            raise UsageError(f"{name}={value} is no probability: type augment.train.{name}=0.5")
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    return ObjectAugment(
        size=sides(size),
        mirror=mirror,
        scale=(scale[0], scale[1]),
        visible=visible,
        colour=[ColourMatrix(**strengths)] if any(strengths.values()) else [],
        mosaic=mosaic,
        mixup=mixup,
        copy_paste=copy_paste,
        fill=fill,
    )


def resize_to_fit(*, size: Size, mirror: bool = False, boxes: bool = False, fill: int = GREY) -> Fit:  # noqa: ARG001
    """Resize to the largest scale at which the whole image fits, and pad below and to the right: for evaluation.

    Samples gain "scale" (float32) and "size" (2,) int64, the original height and width: boxes / scale are in the file's
    own pixels. `mirror` and `boxes` are taken, and not used, so that all factories are called alike.
    """
    return Fit(size=sides(size), fill=fill)


class Placement(NamedTuple):
    """Which window of an image is shown, how large, and where."""

    window: tuple[int, int, int, int]  # left, top, right, bottom in the image
    shape: Shape  # of the window when resized
    corner: tuple[int, int]  # left, top in the result


class _Own(A.Compose):  # type: ignore[misc]
    """A Compose that moves the objects itself; albumentations' steps touch colours alone."""

    moves_boxes = True


class ObjectAugment(_Own):
    """What `scale_and_crop_objects` makes; where `mixes`, it takes the entry "others": the samples to join in.

    Deterministic given its two generators, which visiontasks.data.randomness keys for each sample.
    """

    def __init__(
        self,
        *,
        size: Shape,
        mirror: bool,
        scale: tuple[float, float],
        visible: float,
        colour: list[Any],
        mosaic: float,
        mixup: float,
        copy_paste: float,
        fill: int,
    ) -> None:
        super().__init__(colour)
        self.size = size
        self.mirror = mirror
        self.scale = scale
        self.visible = visible
        self.chances = {"mosaic": mosaic, "mixup": mixup, "copy_paste": copy_paste}
        self.mixes = any(self.chances.values())
        self.fill = fill

    def __call__(self, *args: Any, force_apply: bool = False, **data: Any) -> dict[str, Any]:
        """Transform a sample; every box left is finite, inside, and a pixel wide and high."""
        others: Sequence[Sample] = data.pop("others", ())
        if len(others) and data.keys() & {"label", "mask"}:
            raise UsageError(
                "mosaic, mixup and copy_paste join objects, and these samples have more: type 0 for all three"
            )
        bare = {} if "bboxes" in data else {"bboxes": np.zeros((0, 4), np.float32)}
        sample = self._scene(cast(Sample, data | bare), others)
        if self._happens("mixup", others):
            sample = blended(
                sample, self._scene(self._other(others), others), self.random_generator.beta(_BLEND, _BLEND)
            )
        if self._happens("copy_paste", others):
            sample = self._pasted(sample, self._view(self._other(others), self.size))
        coloured = super().__call__(*args, force_apply=force_apply, image=sample["image"])
        return {key: value for key, value in (sample | coloured).items() if key not in bare}

    def _happens(self, name: str, others: Sequence[Sample]) -> bool:
        return bool(len(others)) and bool(self.random_generator.random() < self.chances[name])

    def _other(self, others: Sequence[Sample]) -> Sample:
        return others[int(self.random_generator.integers(len(others)))]

    def _scene(self, sample: Sample, others: Sequence[Sample]) -> Sample:
        if not self._happens("mosaic", others):
            return self._view(sample, self.size)
        down, across = (round(float(self.random_generator.uniform(*_SPLIT)) * side) for side in self.size)
        heights, widths = (down, self.size[0] - down), (across, self.size[1] - across)
        samples = [sample, *(self._other(others) for _ in range(3))]
        shapes = [(height, width) for height in heights for width in widths]
        return tiled([self._view(part, shape) for part, shape in zip(samples, shapes, strict=True)])

    def _view(self, sample: Sample, size: Shape) -> Sample:
        shown = placed(sample, self._placement(sample, size), size, fill=self.fill, visible=self.visible)
        return mirrored(shown) if self.mirror and self.random_generator.random() < 0.5 else shown

    def _placement(self, sample: Sample, size: Shape) -> Placement:
        generator, boxes = self.random_generator, sample["bboxes"]
        shape = sample["image"].shape[:2]
        low, high = np.log(self.scale)
        zoom = min(size[0] / shape[0], size[1] / shape[1]) * float(np.exp(generator.uniform(low, high)))
        box = boxes[int(generator.integers(len(boxes)))] if len(boxes) else np.array([0, 0, shape[1], shape[0]])
        top, bottom, rows, down = self._axis(shape[0], size[0], zoom, float(box[1]), float(box[3]))
        left, right, columns, across = self._axis(shape[1], size[1], zoom, float(box[0]), float(box[2]))
        return Placement((left, top, right, bottom), (rows, columns), (across, down))

    def _axis(self, full: int, size: int, zoom: float, low: float, high: float) -> tuple[int, int, int, int]:
        """Along one axis: start and end of the window, its length when resized, and where it begins in the result.

        A window shorter than the image holds the object from `low` to `high`, or lies within it.
        """
        length = max(1, min(full, round(size / zoom)))
        if length == full:
            resized = max(1, min(size, round(full * zoom)))
            return 0, full, resized, int(self.random_generator.integers(size - resized + 1))
        first, last = sorted((math.ceil(high) - length, math.floor(low)))
        first, last = (min(max(start, 0), full - length) for start in (first, last))
        start = int(self.random_generator.integers(first, last + 1))
        return start, start + length, size, 0

    def _pasted(self, sample: Sample, other: Sample) -> Sample:
        if "masks" not in sample:
            raise UsageError(
                "copy_paste needs masks, which this task does not ask for: type augment.train.copy_paste=0 or take a "
                "task with masks"
            )
        chosen = np.flatnonzero(self.random_generator.random(len(other["bboxes"])) < 0.5)
        return pasted(sample, rows_of(other, chosen), visible=self.visible)


class Fit(_Own):
    """What `resize_to_fit` makes: no randomness, no object lost."""

    def __init__(self, *, size: Shape, fill: int) -> None:
        super().__init__([])
        self.size = size
        self.fill = fill

    def __call__(self, *args: Any, force_apply: bool = False, **data: Any) -> dict[str, Any]:  # noqa: ARG002
        """Transform a sample with or without boxes; all its objects remain, however small they become."""
        height, width = data["image"].shape[:2]
        scale = min(self.size[0] / height, self.size[1] / width)
        # Padded before it is resized, so that one scale holds along both axes to the last pixel of a square
        canvas = (max(height, round(self.size[0] / scale)), max(width, round(self.size[1] / scale)))
        fitted = data | {"image": resized(_padded(data["image"], canvas, fill=self.fill), self.size)}
        if "mask" in data:
            fitted["mask"] = resized_mask(_padded(data["mask"], canvas, fill=IGNORE), self.size)
        if "masks" in data:
            masks = [resized_mask(_padded(mask, canvas, fill=0), self.size) for mask in data["masks"]]
            fitted["masks"] = np.array(masks, np.uint8).reshape(-1, *self.size)
        if "bboxes" in data:
            fitted["bboxes"] = (data["bboxes"] * scale).astype(np.float32)
        return fitted | {"scale": np.float32(scale), "size": np.array([height, width], np.int64)}


def placed(sample: Sample, place: Placement, size: Shape, *, fill: int, visible: float) -> Sample:
    """The window on a canvas of `size`, with the objects of which enough is left; only the window is resized."""
    left, top, right, bottom = place.window
    across, down = place.corner
    canvas = np.full((*size, 3), fill, np.uint8)
    inside = np.s_[down : down + place.shape[0], across : across + place.shape[1]]
    canvas[inside] = resized(sample["image"][top:bottom, left:right], place.shape)
    moved = sample | Sample(image=canvas)
    if "mask" in sample:
        moved["mask"] = np.full(size, IGNORE, np.uint8)
        moved["mask"][inside] = resized_mask(sample["mask"][top:bottom, left:right], place.shape)
    scale = np.array([place.shape[1] / (right - left), place.shape[0] / (bottom - top)] * 2)
    whole = (sample["bboxes"] - np.array([left, top] * 2)) * scale + np.array([across, down] * 2)  # (N, 4)
    edges = [across + place.shape[1], down + place.shape[0]]
    clipped = np.clip(whole, [across, down] * 2, edges * 2).astype(np.float32)
    kept = np.flatnonzero(_enough(clipped) & (_area(clipped) >= visible * _area(whole)))
    moved = rows_of(moved | Sample(bboxes=clipped), kept)
    if "masks" not in sample:
        return moved
    masks = np.zeros((len(kept), *size), np.uint8)
    for mask, given in zip(masks, moved["masks"], strict=True):
        mask[inside] = resized_mask(given[top:bottom, left:right], place.shape)
    return tightened(moved | Sample(masks=masks))


def tightened(sample: Sample) -> Sample:
    """Give objects whose box is off their mask by more than a pixel its tight box; drop those that show too little."""
    tight = tight_boxes(sample["masks"])
    off = np.abs(tight - sample["bboxes"]).max(1, initial=0) > 1
    boxes = np.where(off[:, None], tight, sample["bboxes"])
    kept = np.flatnonzero(_enough(tight) & _enough(boxes))
    return rows_of(sample | Sample(bboxes=boxes), kept)


def mirrored(sample: Sample) -> Sample:
    """Exchange left and right."""
    boxes, width = sample["bboxes"].copy(), sample["image"].shape[1]
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    flipped = sample | Sample(image=np.ascontiguousarray(sample["image"][:, ::-1]), bboxes=boxes)
    if "mask" in sample:
        flipped["mask"] = np.ascontiguousarray(sample["mask"][:, ::-1])
    if "masks" in sample:
        flipped["masks"] = np.ascontiguousarray(sample["masks"][:, :, ::-1])
    return flipped


def tiled(parts: Sequence[Sample]) -> Sample:
    """Join four samples, above left, above right, below left, below right, whose sides agree, into one."""
    above, below = (np.concatenate([parts[row]["image"], parts[row + 1]["image"]], axis=1) for row in (0, 2))
    image = np.concatenate([above, below])
    down, across = parts[0]["image"].shape[:2]
    corners = [(0, 0), (across, 0), (0, down), (across, down)]
    moved = []
    for part, (left, top) in zip(parts, corners, strict=True):
        shifted = part | Sample(bboxes=part["bboxes"] + np.array([left, top] * 2, np.float32))
        if "masks" in part:
            height, width = part["image"].shape[:2]
            masks = np.zeros((len(part["masks"]), *image.shape[:2]), np.uint8)
            masks[:, top : top + height, left : left + width] = part["masks"]
            shifted["masks"] = masks
        moved.append(shifted)
    return joined(moved[0] | Sample(image=image), moved)


def blended(sample: Sample, other: Sample, share: float) -> Sample:
    """`share` of one image and the rest of the other, with the objects of both."""
    image = cv2.addWeighted(sample["image"], share, other["image"], 1 - share, 0)
    return joined(sample | Sample(image=image), [sample, other])


def pasted(sample: Sample, other: Sample, *, visible: float) -> Sample:
    """Lay the other's objects over the sample; of those below remain the ones of which `visible` can still be seen."""
    cover = other["masks"].max(0, initial=0)  # (H, W)
    image = np.where(cover[..., None] > 0, other["image"], sample["image"])
    masks = sample["masks"] * (1 - cover)
    before, after = (given.sum((1, 2), dtype=np.int64) for given in (sample["masks"], masks))
    seen = np.flatnonzero((after > 0) & (after >= visible * before))
    below = tightened(rows_of(sample | Sample(masks=masks), seen))
    return joined(sample | Sample(image=image), [below, other])


def joined(base: Sample, parts: Sequence[Sample]) -> Sample:
    """The base with the objects of all parts."""
    together = {key: np.concatenate([part[key] for part in parts]) for key in _row_keys(base)}  # type: ignore[literal-required]
    return cast(Sample, {**base, **together})


def rows_of(sample: Sample, rows: NDArray[np.int64]) -> Sample:
    """The sample with these of its objects alone."""
    kept = {key: sample[key][rows] for key in _row_keys(sample)}  # type: ignore[literal-required]
    return cast(Sample, {**sample, **kept})


def _padded(image: NDArray[np.uint8], shape: Shape, *, fill: int) -> NDArray[np.uint8]:
    """The image with padding below and to the right."""
    below, right = shape[0] - image.shape[0], shape[1] - image.shape[1]
    if below == right == 0:
        return image
    return cv2.copyMakeBorder(image, 0, below, 0, right, cv2.BORDER_CONSTANT, value=(fill, fill, fill))  # type: ignore[no-any-return]


def _row_keys(sample: Sample) -> list[str]:
    return [key for key in ("bboxes", "labels", "masks", "crowd", "area") if key in sample]


def _enough(boxes: NDArray[Any]) -> NDArray[np.bool_]:
    enough: NDArray[np.bool_] = (boxes[:, 2:] - boxes[:, :2] >= LEAST_SIDE).all(1)
    return enough


def _area(boxes: NDArray[Any]) -> NDArray[Any]:
    area: NDArray[Any] = np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)
    return area
