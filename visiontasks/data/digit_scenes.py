"""The embedded data set: scenes of real handwritten digits on real photographs, with every kind of annotation."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import Sample, UsageError
from visiontasks.data.module import SPLITS, DataModule
from visiontasks.data.sampling import held_out
from visiontasks.data.source import CacheKind, Source

Pixels = NDArray[np.float32]

_REGIONS = {"train": (0.0, 0.5), "val": (0.5, 0.75), "test": (0.75, 1.0)}  # of the photographs' width
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_CROP = (48, 160)  # least and largest side of a crop, in their pixels
_CONTRAST = 95.0  # least difference in luma between a digit and what lies around it
_OVERLAP = 0.12  # largest share of the smaller of two boxes that lies in the other
_INK = 0.5  # opacity from which a pixel belongs to the digit
_TEMPLATE = 64  # side of an enlarged digit


class DigitScenes(DataModule):
    """Scenes of real handwritten digits on crops of real photographs, drawn from (seed, split, index) alone.

    Digits and photographs are scikit-learn's (load_digits, load_sample_images), so nothing is downloaded. Train, val
    and test share no digit and no part of a photograph. Annotations: bboxes and labels, masks (N, H, W) of each
    digit's visible pixels, mask (0 background, class i is i + 1; the nearer digit covers the farther), and label: the
    class where `digits=(1, 1)`, ten zeros and ones where `multi_label`.

    `digits` is the least and the largest number in a scene, `digit_size` of their larger side as shares of the image's
    (crowded scenes keep to the lower end, so that digits hardly overlap). `plain=True` draws them white on black.
    Raises UsageError where the options contradict themselves.
    """

    provides = frozenset({"label", "mask", "masks", "bboxes", "labels"})
    mirror = False
    background = True
    remedies: ClassVar = {"label": "data.digits=[1,1] or data.multi_label=true"}

    def __init__(
        self,
        *,
        digits: tuple[int, int] = (1, 6),
        digit_size: tuple[float, float] = (0.3, 0.7),
        multi_label: bool = False,
        plain: bool = False,
        train_size: int = 3000,
        val_size: int = 500,
        test_size: int = 1000,
        image_size: int = 64,
        cache: CacheKind | None = "ram",
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, cache=cache, **options)
        self.side = _side(image_size)
        self.digits = _range("data.digits", digits, least=1, most=100)
        self.digit_size = _range("data.digit_size", digit_size, least=0.05, most=0.95)
        self.multi_label = multi_label
        self.plain = plain
        self.split_sizes = {"train": train_size, "val": val_size, "test": test_size}
        if not multi_label and self.digits != (1, 1):
            self.provides = type(self).provides - {"label"}

    def source(self, split: str) -> Source:
        """Scenes, each rendered when it is asked for."""
        return Scenes(
            split,
            size=self.split_sizes[split],
            image_size=self.side,
            digits=self.digits,
            digit_size=self.digit_size,
            multi_label=self.multi_label,
            plain=self.plain,
            keys=self.keys,
            seed=self.seed,
        )

    def read_classes(self) -> tuple[str, ...]:
        """Names of the digits that scikit-learn has, "0" to "9"."""
        return tuple(str(name) for name in _digits().names)


class Scenes:
    """A source of `size` scenes; see DigitScenes for the options."""

    def __init__(
        self,
        split: str,
        *,
        size: int,
        image_size: int,
        digits: tuple[int, int],
        digit_size: tuple[float, float],
        multi_label: bool,
        plain: bool,
        keys: frozenset[str],
        seed: int,
    ) -> None:
        self.split = split
        self.size = size
        self.image_size = image_size
        self.digits = digits
        self.digit_size = digit_size
        self.multi_label = multi_label
        self.plain = plain
        self.keys = keys
        self.seed = seed

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        """The scene's place: digit_scenes/SEED/SPLIT/INDEX."""
        return f"digit_scenes/{self.seed}/{self.split}/{index:06d}"

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.size:
            raise IndexError(index)
        generator = np.random.default_rng([self.seed, SPLITS.index(self.split), index])
        canvas = self._canvas(generator)
        digits = self._placed(generator)
        for digit in digits:
            _draw(canvas, digit, np.full(3, 255.0, np.float32) if self.plain else _colour(canvas, digit, generator))
        return self._annotated(canvas, digits, index)

    def _canvas(self, generator: np.random.Generator) -> Pixels:
        if self.plain:
            return np.zeros((self.image_size, self.image_size, 3), np.float32)
        return _background(self.split, self.image_size, generator)

    def _placed(self, generator: np.random.Generator) -> list[_Digit]:
        """Digits at places where they hardly overlap; where they do not all fit, smaller ones."""
        count = int(generator.integers(self.digits[0], self.digits[1] + 1))
        for shrink in 0.9 ** np.arange(12):
            digits = self._attempt(count, float(shrink), generator)
            if len(digits) == count:
                break
        return digits

    def _attempt(self, count: int, shrink: float, generator: np.random.Generator) -> list[_Digit]:
        low, high = self.digit_size
        high = max(low, min(high, 1.1 / np.ceil(np.sqrt(count))))
        digits: list[_Digit] = []
        for side in generator.uniform(low, high, count) * shrink * self.image_size:
            opacity, label = _handwritten(self.split, float(side), generator)
            corner = _free_corner([digit.box for digit in digits], opacity.shape, self.image_size, generator)
            if corner is not None:
                digits.append(_Digit(opacity, label, *corner))
        return digits

    def _annotated(self, canvas: Pixels, digits: list[_Digit], index: int) -> Sample:
        masks = _visible(digits, self.image_size)  # (N, H, W)
        labels = np.array([digit.label for digit in digits], np.int64)
        sample = Sample(image=np.clip(canvas + 0.5, 0, 255).astype(np.uint8), index=index)
        if "label" in self.keys:
            present = np.isin(np.arange(10), labels).astype(np.float32)
            sample["label"] = present if self.multi_label else int(labels[0])
        if "bboxes" in self.keys:
            sample["bboxes"] = np.array([_tight(mask) for mask in masks], np.float32)
        if "labels" in self.keys:
            sample["labels"] = labels
        if "masks" in self.keys:
            sample["masks"] = masks
        if "mask" in self.keys:
            sample["mask"] = (masks * (labels + 1)[:, None, None]).sum(0).astype(np.uint8)
        return sample


class _Handwriting(NamedTuple):
    templates: NDArray[np.float32]  # (N, S, S) opacity
    labels: NDArray[np.int64]  # (N,)
    names: NDArray[np.int64]  # (K,)


class _Digit(NamedTuple):
    opacity: Pixels  # (h, w)
    label: int
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        height, width = self.opacity.shape
        return self.left, self.top, self.left + width, self.top + height


@cache
def _digits() -> _Handwriting:
    from sklearn.datasets import load_digits

    loaded = load_digits()
    templates = np.stack([_enlarged(image) for image in loaded.images.astype(np.float32) / 16])
    return _Handwriting(templates, loaded.target.astype(np.int64), loaded.target_names)


@cache
def _members(split: str) -> tuple[NDArray[np.int64], ...]:
    """Positions of the split's digits, class by class; the same whatever the seed, so that no run leaks."""
    labels = _digits().labels
    rest, test = held_out(labels, fraction=0.2, seed=0)
    train, val = held_out(labels[rest], fraction=0.125, seed=0)
    own = {"train": rest[train], "val": rest[val], "test": test}[split]
    return tuple(own[labels[own] == label] for label in np.unique(labels))


@cache
def _photographs(split: str) -> tuple[NDArray[np.uint8], ...]:
    from sklearn.datasets import load_sample_images

    left, right = _REGIONS[split]
    images = load_sample_images().images  # (427, 640, 3) each
    return tuple(image[:, round(left * image.shape[1]) : round(right * image.shape[1])] for image in images)


def _enlarged(image: Pixels) -> Pixels:
    """An 8 x 8 digit as smooth opacity of _TEMPLATE pixels a side: cubic enlargement, then a soft threshold."""
    padded = np.pad(image, 1)
    large = cv2.resize(padded, (_TEMPLATE, _TEMPLATE), interpolation=cv2.INTER_CUBIC)
    large = cv2.GaussianBlur(large, (0, 0), _TEMPLATE / 40)
    ramp = np.clip((large - 0.3) / 0.26, 0, 1)
    opacity: Pixels = ramp * ramp * (3 - 2 * ramp)
    return opacity


def _background(split: str, size: int, generator: np.random.Generator) -> Pixels:
    """A square crop of a photograph, mirrored half the time, dimmed and a little softened."""
    photographs = _photographs(split)
    photograph = photographs[generator.integers(len(photographs))]
    side = int(generator.integers(_CROP[0], _CROP[1] + 1))
    top, left = (int(generator.integers(0, length - side + 1)) for length in photograph.shape[:2])
    crop = photograph[top : top + side, left : left + side]
    crop = crop[:, ::-1] if generator.random() < 0.5 else crop
    small = cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA if side > size else cv2.INTER_LINEAR)
    gain, contrast = generator.uniform(0.35, 0.75), generator.uniform(0.6, 0.9)
    mean = small.mean((0, 1), dtype=np.float32)
    canvas: Pixels = (small - mean) * np.float32(contrast * gain) + mean * np.float32(gain)
    return canvas  # (H, W, 3)


def _handwritten(split: str, side: float, generator: np.random.Generator) -> tuple[Pixels, int]:
    """The opacity of a random digit, turned and stretched a little, its larger side about `side` pixels."""
    members = _members(split)
    label = int(generator.integers(len(members)))
    template = _digits().templates[members[label][generator.integers(len(members[label]))]]
    angle, slant = np.deg2rad(generator.uniform(-12, 12)), generator.uniform(-0.12, 0.12)
    stretch = generator.uniform(0.88, 1.14)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[stretch, slant], [0, 1 / stretch]]) * (side / (0.8 * _TEMPLATE))  # ink fills 0.8 of it
    reach = int(np.ceil(side * 1.5))
    shift = reach / 2 - matrix @ np.full(2, _TEMPLATE / 2)
    opacity = cv2.warpAffine(template, np.column_stack([matrix, shift]), (reach, reach))
    left, top, right, bottom = _tight(opacity >= _INK)
    return opacity[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1], label


def _free_corner(
    boxes: list[tuple[int, int, int, int]], shape: tuple[int, ...], size: int, generator: np.random.Generator
) -> tuple[int, int] | None:
    """The first of 40 random left-upper corners where a digit hardly overlaps the others, or None."""
    height, width = shape
    if height > size or width > size:
        return None
    corners = generator.integers(0, [size - width + 1, size - height + 1], (40, 2))
    if not boxes:
        return int(corners[0, 0]), int(corners[0, 1])
    others = np.array(boxes)[None]  # (1, N, 4)
    low = np.maximum(corners[:, None], others[..., :2])
    high = np.minimum(corners[:, None] + [width, height], others[..., 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)  # (40, N)
    smaller = np.minimum(width * height, np.prod(others[..., 2:] - others[..., :2], axis=-1))
    free = np.flatnonzero((shared <= _OVERLAP * smaller).all(1))
    return (int(corners[free[0], 0]), int(corners[free[0], 1])) if len(free) else None


def _draw(canvas: Pixels, digit: _Digit, colour: Pixels) -> None:
    """Lay a digit over the canvas, in a colour and with a faint dark halo."""
    left, top, right, bottom = digit.box
    patch = canvas[top:bottom, left:right]  # (h, w, 3)
    _shade(canvas, digit)
    patch += digit.opacity[..., None] * (colour - patch)


def _shade(canvas: Pixels, digit: _Digit) -> None:
    """Darken the canvas under and around a digit, fading out on all sides so that no edge gives its box away."""
    spread = max(0.8, min(digit.opacity.shape) / 14)
    reach = int(np.ceil(3 * spread))
    halo = cv2.GaussianBlur(np.pad(digit.opacity, reach), (0, 0), spread)
    left, top, right, bottom = digit.box
    ground = canvas[max(0, top - reach) : bottom + reach, max(0, left - reach) : right + reach]  # (h, w, 3)
    down, across = max(0, reach - top), max(0, reach - left)
    ground *= 1 - np.float32(0.35) * halo[down : down + ground.shape[0], across : across + ground.shape[1], None]


def _colour(canvas: Pixels, digit: _Digit, generator: np.random.Generator) -> Pixels:
    """A colour that is brighter than what lies around a digit."""
    left, top, right, bottom = digit.box
    return _contrasting(float(canvas[top:bottom, left:right].mean((0, 1)) @ _LUMA), generator)


def _contrasting(luma: float, generator: np.random.Generator) -> Pixels:
    """A random colour whose luma is higher by at least _CONTRAST, or white where 32 draws found none."""
    colours = generator.uniform(0, 255, (32, 3)).astype(np.float32)
    brighter = np.flatnonzero(colours @ _LUMA - luma >= _CONTRAST)
    if len(brighter):
        return colours[brighter[0]]  # type: ignore[no-any-return]
    return np.full(3, 255.0, np.float32)


def _visible(digits: list[_Digit], size: int) -> NDArray[np.uint8]:
    """Masks of the pixels of each digit that no nearer one covers; the last drawn is the nearest. (N, H, W)"""
    owner = np.full((size, size), -1)
    for position, digit in enumerate(digits):
        left, top, right, bottom = digit.box
        owner[top:bottom, left:right][digit.opacity >= _INK] = position
    return np.asarray(owner == np.arange(len(digits))[:, None, None], np.uint8)


def _tight(ink: NDArray[Any]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 around everything that is not zero."""
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _side(image_size: Any) -> int:
    if not isinstance(image_size, int):
        raise UsageError(f"data.image_size={image_size} is no side of the square scenes: type data.image_size=64")
    return image_size


def _range(option: str, given: Any, *, least: float, most: float) -> tuple[Any, Any]:
    low, high = given
    if not least <= low <= high <= most:
        raise UsageError(f"{option}={list(given)} is no range: give the least and the largest, from {least} to {most}")
    return low, high
