"""Images with a mask of class indices each: read, checked against the classes, and counted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import IGNORE, Sample, UsageError
from visiontasks.data.annotations import upright_size
from visiontasks.data.images import BadFile, read_image, read_mask
from visiontasks.data.source import Source, fingerprint, user_cache

MOST_CLASSES = 254
_UNKNOWN = 254  # what a table says of a value that stands for nothing
_BLURRED = frozenset({".jpg", ".jpeg"})


class MaskReader(Protocol):
    """Reads a mask file to class indices, 255 where ignored; raises BadFile where a pixel stands for nothing."""

    key: str  # another one for every other meaning of the files

    def __call__(self, path: str) -> NDArray[np.uint8]: ...


class IndexMasks:
    """Reads masks of one number a pixel: `values[k]` stands for class k, `ignored` and 255 for no class.

    A value among `values` is a class even where it is 255. Shapes: a call returns (H, W) uint8.
    Raises UsageError where a number is not 0 to 255 or there are more than 254 classes; a call raises BadFile as
    read_mask does, and where a pixel has another value.
    """

    def __init__(self, values: Sequence[int], *, ignored: Iterable[int] = ()) -> None:
        ignored = [*ignored]
        _check_numbers([*values, *ignored], classes=len(values))
        self.table = np.full(256, _UNKNOWN, np.uint8)
        self.table[[IGNORE, *ignored]] = IGNORE
        self.table[[*values]] = np.arange(len(values))
        self.key = self.table.tobytes().hex()

    def __call__(self, path: str) -> NDArray[np.uint8]:
        raw = read_mask(path)
        mask: NDArray[np.uint8] = cv2.LUT(raw, self.table)
        place = _unknown(mask)
        if place is not None:
            known = _ranges(np.flatnonzero(self.table != _UNKNOWN))
            raise BadFile(path, f"holds the value {raw[place]} at {_words(place)}: expected {known}")
        return mask


class ColourMasks:
    """Reads masks of one colour a class: `colours[k]` (red, green, blue) stands for class k, `ignored` for none.

    Shapes: a call returns (H, W) uint8.
    Raises UsageError where a number is not 0 to 255 or there are more than 254 classes; a call raises BadFile as
    read_image does, and where a pixel has another colour or the file is a JPEG.
    """

    def __init__(self, colours: Sequence[Sequence[int]], *, ignored: Iterable[Sequence[int]] = ()) -> None:
        ignored = [*ignored]
        _check_numbers([value for colour in (*colours, *ignored) for value in colour], classes=len(colours))
        self.table = np.full(1 << 24, _UNKNOWN, np.uint8)
        for index, colour in [*((IGNORE, each) for each in ignored), *enumerate(colours)]:
            self.table[_code(np.array(colour, np.uint8))] = index
        self.key = hashlib.sha256(repr((colours, ignored)).encode()).hexdigest()

    def __call__(self, path: str) -> NDArray[np.uint8]:
        if Path(path).suffix.lower() in _BLURRED:
            raise BadFile(path, "is a JPEG, which blurs the colours of classes: save masks as PNG")
        colours = read_image(path)
        mask: NDArray[np.uint8] = self.table[_code(colours)]
        place = _unknown(mask)
        if place is not None:
            found = tuple(colours[place].tolist())
            raise BadFile(path, f"holds the colour {found} at {_words(place)}, which no class has")
        return mask


class Pair(NamedTuple):
    """The files of one sample."""

    image: str
    mask: str


class MaskFiles:
    """Image files with a mask file each as a source."""

    def __init__(self, pairs: Sequence[Pair], read: MaskReader) -> None:
        self.pairs = pairs
        self.read = read

    @property
    def reading(self) -> str:
        """What beside the files determines the samples, for `fingerprint`."""
        return self.read.key

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Sample:
        """Raises BadFile where image or mask cannot be read, or they differ in size."""
        pair = self.pairs[index]
        image = read_image(pair.image)
        return Sample(image=image, mask=self._fitting(pair, image.shape[:2]))

    def mask(self, index: int) -> NDArray[np.uint8]:
        """The mask alone, (H, W), held against the size in the image's header."""
        pair = self.pairs[index]
        return self._fitting(pair, upright_size(pair.image))

    def name(self, index: int) -> str:
        """The image's path."""
        return self.pairs[index].image

    def files(self, index: int) -> tuple[str, ...]:
        """The paths of image and mask."""
        return self.pairs[index]

    def _fitting(self, pair: Pair, size: tuple[int, ...]) -> NDArray[np.uint8]:
        mask = self.read(pair.mask)
        if mask.shape != size:
            found, wanted = (f"{width} x {height}" for height, width in (mask.shape, size))
            raise BadFile(pair.mask, f"has {found} pixels and its image {pair.image} has {wanted}")
        return mask


class Survey(NamedTuple):
    """What the masks of a source hold."""

    pixels: list[int]  # of each class
    labelled: list[int]  # pixels of any class, in the images in which the class occurs
    bad: list[tuple[str, str]]  # name and reason of what is bad


def survey(source: Source, classes: int, *, folder: Path | None = None) -> Survey:
    """Look at every mask of a source once, in threads, and keep the result in a file named by the source's fingerprint.

    The file lies in `folder`, which is user_cache()/masks unless given; where it cannot be written the next call looks
    at the masks again.
    """
    path = (folder or user_cache() / "masks") / f"{fingerprint(source, None)}-{classes}.json"
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Survey(stored["pixels"], stored["labelled"], [(name, reason) for name, reason in stored["bad"]])
    found = _surveyed(source, classes)
    with contextlib.suppress(OSError):
        _write(path, json.dumps(found._asdict()))
    return found


def median_frequency(found: Survey) -> list[float]:
    """Weights that balance the classes: the median of all frequencies over each class's own.

    A class's frequency is its share of the labelled pixels of the images in which it occurs (Eigen and Fergus 2015,
    arXiv 1411.4734, section 6.3.2). A class that never occurs weighs 1.
    """
    pixels, labelled = np.array(found.pixels), np.array(found.labelled)
    frequencies = pixels / np.maximum(labelled, 1)
    middle = np.median(frequencies[pixels > 0]) if pixels.any() else 0.0
    weights = np.where(pixels > 0, middle / np.where(pixels > 0, frequencies, 1.0), 1.0)
    return [float(weight) for weight in weights]


def _surveyed(source: Source, classes: int) -> Survey:
    total, labelled = np.zeros(classes, np.int64), np.zeros(classes, np.int64)
    bad: list[tuple[str, str]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for item in pool.map(_counter(source, classes), range(len(source))):
            if isinstance(item, BadFile):
                bad.append((item.path, item.reason))
                continue
            total += item
            labelled += np.where(item > 0, item.sum(), 0)
    return Survey(total.tolist(), labelled.tolist(), bad)


def _counter(source: Source, classes: int) -> Callable[[int], NDArray[np.int64] | BadFile]:
    def counted(index: int) -> NDArray[np.int64] | BadFile:
        try:
            mask = source.mask(index) if isinstance(source, MaskFiles) else source[index]["mask"]
        except BadFile as error:
            return error
        counts = np.bincount(mask.ravel(), minlength=256)
        beyond = np.flatnonzero(counts[classes:IGNORE])
        if len(beyond):
            reason = f"has the value {classes + beyond[0]} in its mask: expected 0 to {classes - 1} or {IGNORE}"
            return BadFile(source.name(index), reason)
        return counts[:classes]

    return counted


def _write(path: Path, text: str) -> None:
    """Write a file that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as beside:
        beside.write(text)
    Path(beside.name).replace(path)


def _check_numbers(numbers: Sequence[int], *, classes: int) -> None:
    outside = [number for number in numbers if not 0 <= number <= 255]
    if outside:
        raise UsageError(f"A mask of 8 bits cannot hold {outside[0]}: give numbers from 0 to 255")
    if classes > MOST_CLASSES:
        raise UsageError(f"{classes} classes do not fit into masks of 8 bits: give at most {MOST_CLASSES}")


def _unknown(mask: NDArray[np.uint8]) -> tuple[int, int] | None:
    """Row and column of the first pixel that stands for nothing."""
    wrong = mask == _UNKNOWN
    if not wrong.any():
        return None
    row, column = np.unravel_index(int(wrong.argmax()), mask.shape)
    return int(row), int(column)


def _code(colours: NDArray[np.uint8]) -> NDArray[np.int32]:
    """One number for each colour: (..., 3) to (...)."""
    red, green, blue = np.moveaxis(colours.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue  # type: ignore[no-any-return]


def _words(place: tuple[int, int]) -> str:
    return f"row {place[0]}, column {place[1]}"


def _ranges(values: NDArray[np.int64]) -> str:
    """Numbers as people list them: 0 to 11, 255."""
    runs = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1)
    return ", ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)
