"""Where samples come from, and a cache of decoded ones."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import cv2
import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import Sample, UsageError
from visiontasks.data.images import BadFile

CacheKind = Literal["ram", "disk"]


class Source(Protocol):
    """Decoded samples by position: the same sample for the same position, always."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample:
        """The sample, decoded and not transformed; raises BadFile where it has no right pixels."""

    def name(self, index: int) -> str:
        """What a person calls the sample: the path of its file where it has one."""


class Subset:
    """Some positions of a source, in the order given."""

    def __init__(self, source: Source, positions: NDArray[np.int64]) -> None:
        self.source = source
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, index: int) -> Sample:
        return self.source[int(self.positions[index])]

    def name(self, index: int) -> str:
        return self.source.name(int(self.positions[index]))


class Arrays:
    """Images, and labels where there are any, that already lie in memory.

    Shapes: images (N, H, W) grey, repeated to three channels, or (N, H, W, 3) RGB, uint8; labels (N,) int64.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64] | None, *, title: str) -> None:
        self.images = images
        self.labels = labels
        self.title = title

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Sample:
        image = self.images[index]
        sample = Sample(image=np.stack([image] * 3, axis=-1) if image.ndim == 2 else image.copy())
        if self.labels is not None:
            sample["label"] = int(self.labels[index])
        return sample

    def name(self, index: int) -> str:
        return f"{self.title}/{index:05d}"


class Cached:
    """A source whose samples were decoded once, in threads, and are kept as they are in uint8.

    "ram" is one array, which forked workers share without copying. "disk" is a memory-mapped folder under `folder`,
    named by what is in the source (names, file sizes and times, and a few samples), written beside and renamed, so
    that it is whole or not there. A bad file stays bad: asking for it raises its BadFile again. Images come as
    read-only views, everything else as copies.

    With `size`, images of a sample without boxes or masks are stored with a short side of `size` pixels where theirs
    is longer: the training crop is then cut from a smaller image, which costs some sharpness in narrow crops and
    saves most of the memory. Without `size` cached and uncached samples are equal to the bit.

    Raises UsageError where "ram" would need more memory than is free.
    """

    def __init__(
        self, source: Source, kind: CacheKind, *, folder: str | Path | None = None, size: int | None = None
    ) -> None:
        self.source = source
        self.size = size
        self.store = self._in_memory() if kind == "ram" else self._on_disk(Path(folder) if folder else user_cache())

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index in self.store.bad:
            raise BadFile(*self.store.bad[index])
        return self.store.sample(index)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def _in_memory(self) -> _Store:
        self._check_memory()
        index, chunks, bad = _Index(), [], {}
        for position, item in enumerate(self._decoded()):
            if isinstance(item, BadFile):
                bad[position] = (item.path, item.reason)
                item = Sample()
            chunks.append(index.add(item))
        return _Store(_joined(chunks), index.fields(), bad)

    def _on_disk(self, folder: Path) -> _Store:
        target = folder / fingerprint(self.source, self.size)
        if not target.is_dir():
            self._write(target)
        return _read_store(target)

    def _write(self, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
        index, bad = _Index(), {}
        with (beside / "data.bin").open("wb") as data:
            for position, item in enumerate(self._decoded()):
                if isinstance(item, BadFile):
                    bad[position] = (item.path, item.reason)
                    item = Sample()
                index.add(item).tofile(data)
        np.savez(beside / "index.npz", allow_pickle=False, **index.fields())
        (beside / "bad.json").write_text(json.dumps(bad), encoding="utf-8")
        _settle(beside, target)

    def _decoded(self) -> Iterator[Sample | BadFile]:
        """All samples in order, decoded in as many threads as there are cores, a few blocks ahead."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for start in range(0, len(self), 512):
                yield from pool.map(self._decode, range(start, min(start + 512, len(self))))

    def _decode(self, index: int) -> Sample | BadFile:
        try:
            return _shrunk(self.source[index], self.size)
        except BadFile as error:
            return error

    def _check_memory(self) -> None:
        some = [self._decode(int(index)) for index in np.linspace(0, len(self) - 1, min(8, len(self)))]
        sizes = [_Index().add(sample).nbytes for sample in some if not isinstance(sample, BadFile)]
        needed = len(self) * (sum(sizes) / max(1, len(sizes)))
        free = _free_memory()
        if needed > 0.8 * free:
            raise UsageError(
                f"data.cache=ram would take about {needed / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free: "
                "type data.cache=disk or data.cache=null"
            )


def fingerprint(source: Source, size: int | None) -> str:
    """A name for what a source holds: other files, times, options or annotations give another one."""
    digest = hashlib.sha256(repr((len(source), size, getattr(source, "reading", ""))).encode())
    for name in _files(source):
        digest.update(os.fsencode(name))
        if os.path.isfile(name):  # noqa: PTH113, five times as fast as Path over a million names
            status = os.stat(name)  # noqa: PTH116
            digest.update(f"{status.st_size} {status.st_mtime_ns}".encode())
    for index in sorted({0, len(source) // 2, len(source) - 1}):
        digest.update(_digest_of(source, index))
    return digest.hexdigest()[:32]


def _files(source: Source) -> Iterator[str]:
    """The files of every sample: what the source says in `files(index)`, where it has that method, else its names."""
    files = getattr(source, "files", None)
    for index in range(len(source)):
        yield from files(index) if files else (source.name(index),)


def user_cache() -> Path:
    """The folder of this user's caches by the XDG convention, ours below it."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "visiontasks"


class _Field(NamedTuple):
    """One entry of all samples: where its bytes begin (-1: not there), its shapes, and its type."""

    starts: NDArray[np.int64]  # (N,)
    shapes: NDArray[np.int32]  # (N, D)
    dtype: np.dtype[Any]


class _Store:
    def __init__(
        self, data: NDArray[np.uint8], fields: dict[str, NDArray[Any]], bad: dict[int, tuple[str, str]]
    ) -> None:
        self.data = data.view()
        self.data.flags.writeable = False
        self.bad = bad
        self.fields = {key: _field(fields, key) for key in dict.fromkeys(name.split("/")[0] for name in fields)}

    def sample(self, index: int) -> Sample:
        entries = {key: self._entry(field, index) for key, field in self.fields.items() if field.starts[index] >= 0}
        entries.update({key: entry.copy() for key, entry in entries.items() if key != "image"})
        return cast(Sample, {key: int(entry) if entry.ndim == 0 else entry for key, entry in entries.items()})

    def _entry(self, field: _Field, index: int) -> NDArray[Any]:
        start, shape = int(field.starts[index]), tuple(field.shapes[index].tolist())
        return np.ndarray(shape, field.dtype, self.data, start)


class _Index:
    """Where each entry of each sample lies, built sample by sample."""

    def __init__(self) -> None:
        self.end = 0
        self.count = 0
        self.entries: dict[str, tuple[list[int], list[tuple[int, ...]], np.dtype[Any], list[int]]] = {}

    def add(self, sample: Sample) -> NDArray[np.uint8]:
        """Note one more sample, and return its bytes."""
        parts = []
        for key, value in sample.items():
            array = np.ascontiguousarray(value) if isinstance(value, np.ndarray) else np.array(value)
            starts, shapes, dtype, positions = self.entries.setdefault(key, ([], [], array.dtype, []))
            if array.dtype != dtype:
                raise TypeError(f"{key} is {array.dtype} in one sample and {dtype} in another")
            starts.append(self.end)
            shapes.append(array.shape)
            positions.append(self.count)
            parts.append(array.reshape(-1).view(np.uint8))
            self.end += array.nbytes
        self.count += 1
        return np.concatenate(parts) if parts else np.empty(0, np.uint8)

    def fields(self) -> dict[str, NDArray[Any]]:
        """The table, as arrays that numpy can save."""
        table: dict[str, NDArray[Any]] = {}
        for key, (starts, shapes, dtype, positions) in self.entries.items():
            table[f"{key}/starts"] = np.full(self.count, -1, np.int64)
            table[f"{key}/starts"][positions] = starts
            table[f"{key}/shapes"] = np.zeros((self.count, len(shapes[0])), np.int32)
            table[f"{key}/shapes"][positions] = shapes
            table[f"{key}/dtype"] = np.array(dtype.str)
        return table


def _field(fields: dict[str, NDArray[Any]], key: str) -> _Field:
    return _Field(fields[f"{key}/starts"], fields[f"{key}/shapes"], np.dtype(str(fields[f"{key}/dtype"])))


def _joined(chunks: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """One array of all bytes; each chunk is freed as soon as it is copied."""
    data = np.empty(sum(chunk.nbytes for chunk in chunks), np.uint8)
    end = len(data)
    while chunks:
        chunk = chunks.pop()
        data[end - len(chunk) : end] = chunk
        end -= len(chunk)
    return data


def _read_store(folder: Path) -> _Store:
    with np.load(folder / "index.npz", allow_pickle=False) as table:
        fields = {key: table[key] for key in table.files}
    bad = json.loads((folder / "bad.json").read_text(encoding="utf-8"))
    data = np.memmap(folder / "data.bin", np.uint8, mode="r")
    return _Store(data, fields, {int(index): (path, reason) for index, (path, reason) in bad.items()})


def _settle(beside: Path, target: Path) -> None:
    """Give the finished folder its name, unless another process was faster."""
    try:
        beside.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(beside)


def _shrunk(sample: Sample, size: int | None) -> Sample:
    height, width = sample["image"].shape[:2]
    if size is None or min(height, width) <= size or sample.keys() & {"mask", "masks", "bboxes"}:
        return sample
    scale = size / min(height, width)
    shape = (max(size, round(width * scale)), max(size, round(height * scale)))
    sample["image"] = cv2.resize(sample["image"], shape, interpolation=cv2.INTER_AREA)
    return sample


def _digest_of(source: Source, index: int) -> bytes:
    try:
        sample = source[index]
    except BadFile as error:
        return str(error).encode()
    return b"".join(key.encode() + np.asarray(value).tobytes() for key, value in sorted(sample.items()))


def _free_memory() -> int:
    """Bytes that can be had without swapping, page cache included."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
