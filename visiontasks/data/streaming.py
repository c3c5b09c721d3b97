"""Data that outgrow a disk: samples in chunks, in a folder or an object store, read through LitData."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from visiontasks.contracts import Sample, Transform, UsageError
from visiontasks.data.images import BadFile
from visiontasks.data.module import SPLITS, DataModule
from visiontasks.data.records import name_of, unpacked
from visiontasks.data.sampling import Order, chunk_order
from visiontasks.data.source import Source, user_cache

ABOUT = "visiontasks.json"  # what a converted set says of itself, written when all else is
LABELS = "labels.json"  # the class of each sample of a split, where it is one number
FORMAT = 1
_FORMAT_OF_ITEMS = ["bytes"]  # LitData's word for items that it hands over as they are; others it would unpickle
_GIGABYTE = 1e9
_TRIES, _WAIT = 50, 0.05  # for a chunk that other processes fetch or delete, and the seconds between

Shuffle = Literal["chunks", "full"]


class Storage(NamedTuple):
    """Where chunks from an object store are kept, how many bytes of them, and what the store's client is told."""

    cache: Path
    room: int
    options: dict[str, Any]


class Chunks:
    """One split of a converted set as a source; each process opens its own reader.

    From an object store whole chunks are fetched, and the ones longest unused are deleted where all of a machine's
    take more than the room. `order` is a function of (seed, epoch), or None for a permutation of all samples.
    Raises UsageError where the index is not there or is no index of ours, BadFile where a record is damaged.
    """

    def __init__(
        self, place: str, *, keys: frozenset[str] | None, storage: Storage, order: Order | None = None
    ) -> None:
        self.place = place
        self.keys = keys
        self.storage = storage
        self.order = order
        self.sizes = [int(chunk["chunk_size"]) for chunk in self._config()._chunks]
        self.ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, index: int) -> Sample:
        """The sample, decoded by our own decoder."""
        record, place = self._record(index)
        return unpacked(record, place=place, keys=self.keys)

    def name(self, index: int) -> str:
        """The name that the sample had in the set it was converted from, or its place where that cannot be read."""
        try:
            record, place = self._record(index)
            return name_of(record, place=place)
        except BadFile as error:
            return error.path

    def files(self, index: int) -> tuple[str, ...]:  # noqa: ARG002
        """No files, for `fingerprint`: `reading` is known without a look at every record."""
        return ()

    @property
    def reading(self) -> str:
        """A digest of the index, which names every chunk and its size."""
        return hashlib.sha256(json.dumps([self.place, self._config()._chunks]).encode()).hexdigest()

    @cached_property
    def labels(self) -> list[int] | None:
        """The class of each sample, where it is one number."""
        text = fetched(f"{self.place}/{LABELS}", self.storage)
        return None if text is None else json.loads(text)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_reader"}

    def _record(self, index: int) -> tuple[bytes, str]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        chunk = int(np.searchsorted(self.ends, index, side="right"))
        place = f"{self.place}/{self._config()._chunks[chunk]['filename']}, sample {index},"
        try:
            return self._read(chunk, index), place
        except Exception as error:  # every store and file system has errors of its own
            raise BadFile(place, f"cannot be read ({_words(error)})") from error

    def _read(self, chunk: int, index: int, *, tries: int = _TRIES) -> bytes:
        """The sample's record; tried again where another process deletes the chunk, or is about to have it."""
        config = self._config()
        file, size = Path(config._cache_dir) / config._chunks[chunk]["filename"], config._chunks[chunk]["chunk_bytes"]
        if not is_remote(self.place):
            _check_size(file, size)
            return bytes(self._open()[index])
        try:
            if not file.exists():
                config.download_chunk_from_index(chunk, skip_lock=True)  # returns at once where another process does it
                make_room(file, self.storage.room)
            return self._used(file, index)
        except FileNotFoundError:
            if tries == 1:
                raise
        time.sleep(_WAIT)
        return self._read(chunk, index, tries=tries - 1)

    def _used(self, file: Path, index: int) -> bytes:
        """The record from the chunk's file, which counts as used now, or from the store while there is no file."""
        if file.exists():
            os.utime(file)
        return bytes(self._open()[index])

    def _open(self) -> Any:
        """LitData's data set, made anew in each process."""
        known: tuple[int, Any] | None = self.__dict__.get("_reader")
        if known is None or known[0] != os.getpid():
            known = (os.getpid(), _opened(self.place, self.storage))
            self.__dict__["_reader"] = known
        return known[1]

    def _config(self) -> Any:
        return self._open().cache._reader.config


class Streaming(DataModule):
    """A set that `visiontasks convert` has written, in a folder or an object store (s3://, gs://, azure://).

    Samples, splits, classes and annotations are those of the set it was made of. With `shuffle` "chunks" an epoch's
    order is `chunk_order`'s, over `window` chunks and `lanes` lanes; with "full" it is that of any other data module.
    `disk` is the gigabytes of chunks from an object store that a machine keeps in `folder` (the user's cache unless
    given), `storage` what its client is told, such as endpoint_url. `mirror` replaces what the set says of itself.
    Raises UsageError where LitData is missing or root holds no finished conversion.
    """

    remedies: ClassVar = dict.fromkeys(("label", "mask", "bboxes"), "data.root= of a set that was converted with it")

    def __init__(
        self,
        root: str | Path,
        *,
        shuffle: Shuffle = "chunks",
        window: int = 4,
        lanes: int = 8,
        disk: float = 20.0,
        folder: str | Path | None = None,
        storage: Mapping[str, Any] | None = None,
        mirror: bool | None = None,
        image_size: int | Sequence[int] = 224,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        engine()
        self.root = str(root).rstrip("/")
        if shuffle not in ("chunks", "full"):
            raise UsageError(f"data.shuffle={shuffle} is neither chunks nor full: type data.shuffle=chunks")
        if window < 1 or lanes < 1:
            raise UsageError(f"data.window={window} and data.lanes={lanes} must both be 1 or more")
        self.shuffle, self.window, self.lanes = shuffle, window, lanes
        cache = Path(folder) if folder else user_cache() / "streaming"
        self.storage = Storage(cache, round(disk * _GIGABYTE), dict(storage or {}))
        self.about = read_about(self.root, self.storage)
        self.provides = frozenset(self.about["provides"])
        self.background = bool(self.about["background"])
        self.mirror = bool(self.about["mirror"]) if mirror is None else mirror
        if self.about["category_ids"]:
            self.category_ids = tuple(self.about["category_ids"])

    def source(self, split: str) -> Source:
        """The split's chunks."""
        keys = self.keys | {"crowd", "area"}
        chunks = Chunks(f"{self.root}/{split}", keys=keys, storage=self.storage)
        if self.shuffle == "chunks":
            chunks.order = partial(_ordered, chunks.sizes, window=self.window, lanes=self.lanes)
        if len(chunks) != self.about["sizes"][split]:
            stated = self.about["sizes"][split]
            raise UsageError(f"{chunks.place} holds {len(chunks)} samples where {stated} were converted: copy it again")
        return chunks

    def read_classes(self) -> tuple[str, ...]:
        """The names that were stored with the samples."""
        return tuple(self.about["classes"])

    def origins(self) -> list[str]:
        """Where the samples are, and what they were made of."""
        return [f"{self.root} (made of {self.about['made_of']})"]

    def _transform(self, *, train: bool, keys: frozenset[str]) -> Transform:
        if self.about["objects"]:
            from visiontasks.data.objects import resize_to_fit, scale_and_crop_objects

            self.train_transform = self.train_transform or scale_and_crop_objects
            self.eval_transform = self.eval_transform or resize_to_fit
        return super()._transform(train=train, keys=keys)


def engine() -> ModuleType:
    """LitData; raises UsageError where it is not installed."""
    os.environ.setdefault("LITDATA_DISABLE_VERSION_CHECK", "1")  # litdata would ask the network
    try:
        import litdata
    except ImportError as error:
        raise UsageError(
            "Streaming needs LitData, which is not installed: type pip install 'visiontasks[streaming]'"
        ) from error
    return litdata  # type: ignore[no-any-return]


def read_about(root: str, storage: Storage) -> dict[str, Any]:
    """What a converted set says of itself; raises UsageError where that is not there or not ours."""
    text = fetched(f"{root}/{ABOUT}", storage)
    if text is None:
        raise UsageError(
            f"{root} holds no {ABOUT}, which a finished conversion ends with: type "
            "visiontasks convert data=... data.root=... output=FOLDER, then data.root=FOLDER"
        )
    try:
        about: dict[str, Any] = json.loads(text)
        found = (about["format"], sorted(about["sizes"]))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{root}/{ABOUT} is damaged ({_words(error)}): copy it again") from error
    if found != (FORMAT, sorted(SPLITS)):
        raise UsageError(f"{root}/{ABOUT} is of format {found[0]} and this version reads {FORMAT}: convert again")
    return about


def fetched(place: str, storage: Storage) -> bytes | None:
    """The bytes of a small file in a folder or an object store, None where it is not there."""
    if not is_remote(place):
        return Path(place).read_bytes() if Path(place).is_file() else None
    from litdata.streaming.downloader import get_downloader

    folder, _, name = place.rpartition("/")
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(temporary) / name
        try:
            get_downloader(folder, temporary, [], storage.options).download_file(place, str(local))
        except FileNotFoundError:
            return None
        except Exception as error:  # every store's client has errors of its own
            raise UsageError(
                f"{place} cannot be read ({_words(error)}): check data.root and the credentials"
            ) from error
        return local.read_bytes() if local.is_file() else None


def is_remote(place: str) -> bool:
    """Whether a place is in an object store."""
    return "://" in place or place.startswith("local:")


def make_room(newest: Path, room: int) -> None:
    """Delete the chunks beside the newest that were longest unused, until all take no more bytes than the room."""
    found = []
    for file in newest.parent.glob("*.bin"):
        try:
            status = file.stat()
        except FileNotFoundError:  # another process was faster
            continue
        found.append((status.st_mtime, status.st_size, file))
    excess = sum(size for _, size, _ in found) - room
    for _, size, file in sorted(found):
        if excess > 0 and file != newest:
            file.unlink(missing_ok=True)
            excess -= size


def _check_size(file: Path, size: int) -> None:
    """Raises OSError where a chunk is not there or of another size, for which LitData would wait."""
    found = file.stat().st_size
    if found != size:
        raise OSError(f"the chunk has {found} bytes and its index says {size}: convert or copy it again")


def _ordered(sizes: Sequence[int], seed: int, epoch: int, *, window: int, lanes: int) -> Any:
    return chunk_order(sizes, seed=seed, epoch=epoch, window=window, lanes=lanes)


def _opened(place: str, storage: Storage) -> Any:
    """LitData's data set at a place, which must hold what `convert` writes and nothing that LitData would execute."""
    litdata = engine()
    cache = str(storage.cache) if is_remote(place) else None
    try:
        data = litdata.StreamingDataset(place, cache_dir=cache, storage_options=storage.options)
        data.cache = data._create_cache(worker_env=None)
        config = data.cache._reader.config
        names = [chunk["filename"] for chunk in config._chunks]
    except Exception as error:  # LitData raises whatever a wrong index leads it to
        raise UsageError(
            f"{place} holds no index of a converted split ({_words(error)}): convert or copy it again"
        ) from error
    if config.config["data_format"] != _FORMAT_OF_ITEMS or any(Path(name).name != name for name in names):
        raise UsageError(
            f"{place} was not written by visiontasks convert, and reading it could execute code: convert it"
        )
    return data


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
