"""Ready-made augmentations: each function returns an albumentations.Compose for images of one size."""

from collections.abc import Sequence
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import IGNORE, UsageError
from visiontasks.data.colour import ColourMatrix
from visiontasks.data.scaled_crop import ScaledCrop, ShortSide, Size, resized, sides

Range = Sequence[float]  # (least, most)
Colour = Literal["matrix", "sequential"]

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13  # PIL's filter of that name
_GREY = (124, 116, 104)  # the mean colour of ImageNet


def crop_and_colour(
    *,
    size: Size,
    mirror: bool,
    boxes: bool = False,
    scale: Range = (0.5, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    rotation: float = 0.0,
    shear: float = 0.0,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    colour: Colour = "matrix",
) -> A.Compose:
    """Cut a random window, resize it, mirror it half the time where `mirror`, and jitter its colours.

    `scale` is the window's share of the image's area, `ratio` its width over its height (Szegedy et al. 2014,
    arXiv 1409.4842, section 6). `rotation` and `shear` are the largest angles in degrees, 0 for none.
    `colour="sequential"` jitters step by step as torchvision does, in five times the time; see `ColourMatrix`.
    Raises UsageError where `colour` is another word.
    """
    steps = [
        RandomWindow(size=sides(size), scale=tuple(scale), ratio=tuple(ratio)),
        *mirrored(mirror),
        *_turned(rotation=rotation, shear=shear, boxes=boxes),
        *coloured(colour, brightness=brightness, contrast=contrast, saturation=saturation, hue=hue),
    ]
    return compose(steps, boxes=boxes)


def resize_and_crop(*, size: Size, mirror: bool = False, boxes: bool = False, fraction: float = 1.0) -> A.Compose:  # noqa: ARG001
    """Cut the largest central window of the wanted shape and resize it: the evaluation transform, without randomness.

    `fraction` is the window's share of that side: 0.875 is the "256, then 224" of the ImageNet recipes. An image that
    already has the size comes back unchanged. `mirror` is taken, and not used, so that all factories are called alike.
    """
    return compose([CentreWindow(size=sides(size), fraction=fraction)], boxes=boxes)


def scale_and_crop(
    *,
    size: Size,
    mirror: bool,
    boxes: bool = False,
    scale: Range = (0.5, 2.0),
    short_side: int | None = None,
    rotation: float = 0.0,
    brightness: float = 0.4,
    contrast: float = 0.4,
    saturation: float = 0.4,
    hue: float = 0.1,
    colour: Colour = "matrix",
) -> A.Compose:
    """Scale by a random factor, cut a random window or pad to the size, mirror half the time, jitter the colours.

    The recipe of semantic segmentation (Chen et al. 2017, arXiv 1706.05587, section 4.1): the shape of things is kept,
    and where the image ends the mask says 255 = ignore. `scale` is a factor on the image as it is, or, with
    `short_side`, on the scale at which its short side has that length. `rotation` is the largest angle in degrees.
    Raises UsageError where scale is no range of factors, or `colour` is a word that is not known.
    """
    if not 0 < scale[0] <= scale[1]:
        raise UsageError(f"scale={list(scale)} is no range of factors: type augment.train.scale=[0.5,2.0]")
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    colours = coloured(colour, **strengths)
    jitter = colours.pop() if colour == "matrix" and colours else None
    factors = (scale[0], scale[1])
    steps = [
        ScaledCrop(sides(size), factors, short_side=short_side, mirror=mirror, jitter=jitter, fill=_GREY),
        *_turned(rotation=rotation, shear=0.0, boxes=boxes, fill=_GREY),
        *colours,
    ]
    return compose(steps, boxes=boxes)


def native(*, size: Size, mirror: bool = False, boxes: bool = False, short_side: int | None = None) -> A.Compose:  # noqa: ARG001
    """Leave the image as it is, or with `short_side` resize it to that: evaluation at the images' own sizes.

    `size` and `mirror` are taken, and not used, so that all factories are called alike.
    """
    return compose([ShortSide(short_side)] if short_side else [], boxes=boxes)


def pad_and_crop(*, size: Size, mirror: bool, boxes: bool = False, pad: int = 4, fill: int = 0) -> A.Compose:
    """Pad every side by `pad` pixels, cut a random window of the size, and mirror it half the time where `mirror`.

    The CIFAR recipe of He et al. 2015 (arXiv 1512.03385, section 4.2). An image of another size is resized first.
    """
    height, width = sides(size)
    steps = [
        CentreWindow(size=(height, width)),
        A.Pad(padding=pad, fill=fill, fill_mask=_mask_fill(boxes)),
        A.RandomCrop(height=height, width=width),
        *mirrored(mirror),
    ]
    return compose(steps, boxes=boxes)


def light_geometry(
    *,
    size: Size,
    mirror: bool = False,  # noqa: ARG001
    boxes: bool = False,
    shift: float = 0.1,
    scale: Range = (0.9, 1.1),
    rotation: float = 10.0,
    shear: float = 5.0,
    brightness: float = 0.2,
    contrast: float = 0.2,
    fill: int = 0,
) -> A.Compose:
    """Shift, scale, turn and shear a little and vary the exposure, for digits and letters: it never mirrors.

    `shift` is the largest share of the side, `rotation` and `shear` the largest angles in degrees, `fill` the grey of
    what comes into view. An image of another size is resized first.
    """
    affine = A.Affine(
        translate_percent=(-shift, shift),
        scale=tuple(scale),
        rotate=(-rotation, rotation),
        shear=(-shear, shear),
        fill=fill,
        fill_mask=_mask_fill(boxes),
        p=1.0,
    )
    exposure = ColourMatrix(brightness=brightness, contrast=contrast, saturation=0.0, hue=0.0)
    return compose([CentreWindow(size=sides(size)), affine, exposure], boxes=boxes)


def rand_augment(
    *,
    size: Size,
    mirror: bool,
    boxes: bool = False,
    scale: Range = (0.5, 1.0),
    operations: int = 2,
    strength: float = 0.5,
) -> A.Compose:
    """Cut a random window, mirror it half the time where `mirror`, then adjust it a few times, all at one strength.

    After RandAugment (Cubuk et al. 2019, arXiv 1909.13719): `operations` of the fourteen adjustments are drawn with
    replacement, one of them being to do nothing; `strength`, 0 to 1, is the paper's magnitude over 10. The amounts are
    drawn uniformly up to that strength, either way where there are two (the paper found random and fixed ones equal).
    Raises UsageError where `strength` is outside 0 to 1.
    """
    if not 0 <= strength <= 1:
        raise UsageError(f"strength={strength} is not between 0 and 1: type augment.train.strength=0.5")
    crop = RandomWindow(size=sides(size), scale=tuple(scale))
    adjustments = _tones(strength) + _colours(0.9 * strength) + _moves(strength, fill_mask=_mask_fill(boxes))
    return compose([crop, *mirrored(mirror), A.RandomOrder(adjustments, n=operations, replace=True)], boxes=boxes)


def _tones(strength: float) -> list[A.BasicTransform]:
    return [
        A.NoOp(p=1.0),
        A.AutoContrast(p=1.0),
        A.Equalize(p=1.0),
        A.Posterize(num_bits=(8 - round(4 * strength), 8), p=1.0),
        A.Solarize(threshold_range=(1 - strength, 1.0), p=1.0),
    ]


def _colours(amount: float) -> list[A.BasicTransform]:
    still = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    jitters = [ColourMatrix(**still | {name: amount}) for name in ("brightness", "contrast", "saturation")]
    return [*jitters, Sharpness(amount)]


def _moves(strength: float, *, fill_mask: int) -> list[A.BasicTransform]:
    angle, slant, shift = 30 * strength, 17 * strength, 0.45 * strength  # a shear of 0.3 is 17 degrees
    amounts: list[dict[str, Any]] = [
        {"rotate": (-angle, angle)},
        {"shear": {"x": (-slant, slant), "y": (0, 0)}},
        {"shear": {"x": (0, 0), "y": (-slant, slant)}},
        {"translate_percent": {"x": (-shift, shift), "y": (0, 0)}},
        {"translate_percent": {"x": (0, 0), "y": (-shift, shift)}},
    ]
    return [A.Affine(**amount, fill=128, fill_mask=fill_mask, p=1.0) for amount in amounts]


class Sharpness(A.ImageOnlyTransform):  # type: ignore[misc]
    """Blend the image with its smoothed copy: towards it, or as far away, by at most `amount`."""

    def __init__(self, amount: float, p: float = 1.0) -> None:
        super().__init__(p=p)
        self.amount = amount

    def get_params(self) -> dict[str, Any]:
        """Draw the blend."""
        return {"blend": self.py_random.uniform(-self.amount, self.amount)}

    def apply(self, img: NDArray[np.uint8], blend: float, **_: Any) -> NDArray[np.uint8]:
        """Return a new (H, W, C) image."""
        kernel = blend * _SMOOTH
        kernel[1, 1] += 1 - blend
        return cv2.filter2D(img, -1, kernel)  # type: ignore[no-any-return]


def compose(steps: list[Any], *, boxes: bool) -> A.Compose:
    """Chain the steps; with `boxes` for samples that have `bboxes` in pixels and `labels`, and maybe instance masks."""
    if not boxes:
        return A.Compose(steps)
    return ObjectCompose(steps, bbox_params=A.BboxParams(format="pascal_voc", label_fields=["rows"]))


class ObjectCompose(A.Compose):  # type: ignore[misc]
    """A Compose for samples with `bboxes` and `labels`, in which label and instance mask leave together with their box.

    The objects are followed by row: albumentations 2.0.8 passes labels through float32, leaves the masks of lost boxes
    in place, and cannot stack masks where there are none.
    """

    def __call__(self, *args: Any, force_apply: bool = False, **data: Any) -> dict[str, Any]:
        """Transform a sample; those objects remain whose box is still at least one pixel wide and high."""
        rows = np.arange(len(data["labels"]))
        if "masks" in data and not len(rows):
            data["masks"] = []
        moved: dict[str, Any] = super().__call__(*args, force_apply=force_apply, rows=rows, **data)
        kept = np.asarray(moved.pop("rows"), dtype=np.int64)
        if "masks" in moved:
            masks = np.asarray(moved["masks"], dtype=np.uint8)
            moved["masks"] = masks.reshape(-1, *moved["image"].shape[:2])[kept]  # (N, H, W)
        each = {key: moved[key][kept] for key in ("labels", "crowd", "area") if key in moved}
        return moved | each | {"bboxes": moved["bboxes"].astype(np.float32)}


class RandomWindow(A.RandomResizedCrop):  # type: ignore[misc]
    """RandomResizedCrop that reads only the window's pixels and averages them where it shrinks it to half or less."""

    def apply(self, img: NDArray[np.uint8], crop_coords: tuple[int, int, int, int], **_: Any) -> NDArray[np.uint8]:
        """Return the window as a new image of the wanted size."""
        left, top, right, bottom = crop_coords
        return resized(img[top:bottom, left:right], self.size)


class CentreWindow(RandomWindow):
    """The largest central window of the wanted shape, times `fraction`, resized."""

    def __init__(self, size: tuple[int, int], fraction: float = 1.0, p: float = 1.0) -> None:
        super().__init__(size=size, p=p)
        self.fraction = fraction

    def get_params_dependent_on_data(self, params: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """Place the window."""
        rows, columns = params["shape"][:2]
        shrink = min(rows / self.size[0], columns / self.size[1]) * self.fraction
        height, width = (max(1, round(side * shrink)) for side in self.size)
        top, left = (rows - height) // 2, (columns - width) // 2
        return {"crop_coords": (left, top, left + width, top + height)}


def mirrored(mirror: bool) -> list[A.HorizontalFlip]:
    """Mirroring half the time, or nothing."""
    return [A.HorizontalFlip(p=0.5)] if mirror else []


def _turned(*, rotation: float, shear: float, boxes: bool, fill: int | tuple[int, int, int] = 0) -> list[A.Affine]:
    if rotation == shear == 0:
        return []
    angles = {"rotate": (-rotation, rotation), "shear": (-shear, shear)}
    return [A.Affine(**angles, fill=fill, fill_mask=_mask_fill(boxes), p=1.0)]


def coloured(colour: Colour, *, p: float = 1.0, **strengths: float) -> list[A.ImageOnlyTransform]:
    """The colour jitter of that name with probability `p`; none where all strengths are 0.

    Raises UsageError where `colour` is another word.
    """
    jitters = {"matrix": ColourMatrix, "sequential": A.ColorJitter}
    if colour not in jitters:
        raise UsageError(f"colour={colour} is neither matrix nor sequential: type augment.train.colour=matrix")
    return [jitters[colour](**strengths, p=p)] if any(strengths.values()) else []


def _mask_fill(boxes: bool) -> int:
    """255 = ignore in a semantic mask; 0 = not this object in the instance masks that come with boxes."""
    return 0 if boxes else IGNORE
