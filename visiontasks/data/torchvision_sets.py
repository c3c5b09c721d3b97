"""CIFAR and MNIST as data modules, in torchvision's folder layout, downloaded where there is a network."""

from __future__ import annotations

import fcntl
import gzip
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import UsageError
from visiontasks.data.module import DataModule
from visiontasks.data.sampling import held_out
from visiontasks.data.source import Arrays, Source, Subset

_IDX_UINT8 = 0x08  # type byte of the idx format
_MOST_IDX = 2**30  # bytes; EMNIST, the largest, has 0.6 times as many
_IDX_NAMES = {"train": "train", "test": "t10k"}


class _Published(DataModule):
    """A set with published train and test parts; val is cut from train: `val_fraction` of every class, by the seed.

    Reads `root` in torchvision's folder layout, and downloads into it what is missing.
    Raises UsageError where the files are not there and cannot be downloaded.
    """

    provides = frozenset({"label"})

    def __init__(
        self,
        *,
        root: str | Path = "data",
        val_fraction: float = 0.1,
        image_size: int | Sequence[int] = 32,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        self.root = Path(root)
        self.val_fraction = val_fraction
        self._parts: dict[str, Arrays] = {}

    def source(self, split: str) -> Source:
        """The published test part, or the kept or held out share of the published train part."""
        if split == "test":
            return self._part("test")
        part = self._part("train")
        kept, held = held_out(_labels(part), fraction=self.val_fraction, seed=self.seed)
        return Subset(part, kept if split == "train" else held)

    def _part(self, part: str) -> Arrays:
        if part not in self._parts:
            self._parts[part] = self._read(part)
        return self._parts[part]

    def _read(self, part: str) -> Arrays:
        raise NotImplementedError

    def _published(self, part: str) -> Any:
        """torchvision's data set."""
        from torchvision import datasets

        cls = getattr(datasets, type(self).__name__)

        def make(download: bool) -> Any:
            return cls(str(self.root), train=part == "train", download=download)

        return published(make, root=self.root, name=type(self).__name__)


class CIFAR10(_Published):
    """60,000 colour photographs of ten kinds of things, 32 x 32 (Krizhevsky 2009, "Learning multiple layers")."""

    def read_classes(self) -> tuple[str, ...]:
        """The names in the data's own meta file."""
        return tuple(self._published("test").classes)

    def _read(self, part: str) -> Arrays:
        data = self._published(part)
        return Arrays(data.data, np.asarray(data.targets, np.int64), title=f"{type(self).__name__}/{part}")


class CIFAR100(CIFAR10):
    """60,000 colour photographs of a hundred kinds of things, 32 x 32 (Krizhevsky 2009)."""


class MNIST(_Published):
    """70,000 handwritten digits, 28 x 28, grey (LeCun et al. 1998, "Gradient-based learning").

    Also reads a `root` that holds the four idx files themselves, plain or gzipped.
    """

    mirror = False
    places: ClassVar[tuple[Path, ...]] = ()  # looked at when `root` has nothing

    def __init__(self, *, image_size: int | Sequence[int] = 28, **options: Any) -> None:
        super().__init__(image_size=image_size, **options)

    def read_classes(self) -> tuple[str, ...]:
        """The digits that occur among the labels, "0" to "9"."""
        return tuple(str(label) for label in np.unique(_labels(self._part("train"))))

    def _read(self, part: str) -> Arrays:
        stem = _IDX_NAMES[part]
        images = self._idx(f"{stem}-images-idx3-ubyte", part)
        labels = self._idx(f"{stem}-labels-idx1-ubyte", part).astype(np.int64)
        if len(images) != len(labels):
            raise UsageError(f"{self.root} holds {len(images)} {part} images but {len(labels)} labels: fetch it again")
        return Arrays(images, labels, title=f"{type(self).__name__}/{part}")

    def _idx(self, name: str, part: str) -> NDArray[np.uint8]:
        folder = self.root / type(self).__name__ / "raw"
        places = [place / name for place in (folder, self.root, *self.places)]
        found = [path for place in places for path in (place, place.with_name(f"{name}.gz")) if path.is_file()]
        if found:
            return read_idx(found[0])
        self._published(part)
        return read_idx(folder / name)


class FashionMNIST(MNIST):
    """70,000 pictures of clothes, 28 x 28, grey (Xiao et al. 2017, arXiv 1708.07747).

    Also found where Debian's package dataset-fashion-mnist puts it.
    """

    mirror = True
    places = (Path("/usr/share/datasets/fashion-mnist"),)

    def read_classes(self) -> tuple[str, ...]:
        """torchvision's names, for the files have numbers only."""
        from torchvision import datasets

        return tuple(datasets.FashionMNIST.classes)


def published(make: Callable[[bool], Any], *, root: Path, name: str) -> Any:
    """What `make(False)` reads from root, or else `make(True)` downloads into it: one process at a time.

    Raises UsageError where neither can be done.
    """
    try:
        return make(False)
    except (RuntimeError, OSError):
        pass  # not there, or damaged: torchvision raises the one for both
    try:
        with _locked(root):
            return make(True)
    except (RuntimeError, OSError) as error:
        raise UsageError(
            f"{name} is not in {root.absolute()} and could not be downloaded ({' '.join(str(error).split())[:120]}): "
            "put its files there as torchvision lays them out, or type data.root=FOLDER"
        ) from error


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an array of bytes in LeCun's idx format, plain or gzipped.

    Raises UsageError where the file is of another format, or shorter or longer than its header says.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            data = file.read(_MOST_IDX + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path} cannot be read ({error}): fetch it again") from error
    if len(data) > _MOST_IDX:
        raise UsageError(f"{path} holds more than {_MOST_IDX:,} bytes, far more than any such set: fetch it again")
    if len(data) < 4 or data[:3] != bytes([0, 0, _IDX_UINT8]):
        raise UsageError(f"{path} is no idx file of bytes; it begins with {data[:4]!r}: fetch it again")
    start = 4 + 4 * data[3]
    shape = tuple(int(side) for side in np.frombuffer(data[4:start], ">u4"))
    if len(data) - start != int(np.prod(shape)):
        raise UsageError(f"{path} holds {len(data) - start} bytes where {shape} needs {np.prod(shape)}: fetch it again")
    return np.frombuffer(data, np.uint8, offset=start).reshape(shape)


def _labels(part: Arrays) -> NDArray[np.int64]:
    return np.empty(0, np.int64) if part.labels is None else part.labels


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
