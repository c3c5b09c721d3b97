"""Any data module's samples into chunks that `data=streaming` reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from visiontasks.contracts import Sample, UsageError
from visiontasks.data.images import BadFile, decode_image, printable
from visiontasks.data.module import SPLITS, DataModule
from visiontasks.data.object_files import ObjectData
from visiontasks.data.records import lossless, packed, packed_bad
from visiontasks.data.source import Source
from visiontasks.data.streaming import ABOUT, FORMAT, LABELS, engine

_BLOCK = 256  # samples that the threads work on at a time
_MOST = 2048  # megabytes of a chunk, whose offsets are 32 bits


class Item(NamedTuple):
    """One sample on its way into a chunk."""

    record: bytes
    label: int | None
    bad: BadFile | None
    copied: bool  # the file's own bytes


class Converted(NamedTuple):
    """What a split became."""

    size: int
    copied: int  # images that are their files, byte for byte; the others are PNG
    bad: list[BadFile]


def convert(data: DataModule, folder: Path, *, chunk_mb: float = 64, progress: bool = True) -> dict[str, Converted]:
    """Write every split of a data module that is set up, in chunks of about `chunk_mb` megabytes.

    An image whose sample is its file, decoded, is that file byte for byte, and else a PNG; either is decoded and
    compared before it is written. Files that cannot be read are kept as what they are, up to data.max_bad_fraction.
    Raises UsageError where the folder is not empty, LitData is missing, or too many files are bad.
    """
    engine()
    if not 0 < chunk_mb <= _MOST:
        raise UsageError(f"chunk_mb={chunk_mb} is no size of a chunk: give megabytes, more than 0 and up to {_MOST}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder.absolute()} is not empty: type output= with a new folder, or remove this one")
    done = {split: _written(data, split, folder / split, chunk_mb, progress=progress) for split in SPLITS}
    text = json.dumps(_about(data, done), indent=1)
    (folder / ABOUT).write_text(text + "\n", encoding="utf-8")
    return done


def _about(data: DataModule, done: dict[str, Converted]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "made_of": type(data).__name__,
        "sizes": {split: each.size for split, each in done.items()},
        "classes": list(data.classes),
        "category_ids": list(getattr(data, "category_ids", ())),
        "provides": sorted(data.keys),
        "background": data.background,
        "mirror": data.mirror,
        "objects": isinstance(data, ObjectData),
        "bad_files": {error.path: error.reason for each in done.values() for error in each.bad},
    }


def _written(data: DataModule, split: str, folder: Path, chunk_mb: float, *, progress: bool) -> Converted:
    from litdata.streaming.writer import BinaryWriter

    source = data.source(split)
    writer = BinaryWriter(str(folder), chunk_bytes=round(chunk_mb * 1e6))
    labels: list[int | None] = []
    bad: list[BadFile] = []
    copied = 0
    items = _items(source, getattr(data, "root", None))
    for index, item in enumerate(tqdm(items, split, len(source), unit="image", disable=not progress)):
        writer.add_item(index, item.record)
        labels.append(item.label)
        copied += item.copied
        if item.bad is not None:
            bad.append(item.bad)
            _check(split, bad, data.max_bad_fraction * len(source))
    writer.done()
    writer.merge()
    if labels and None not in labels:
        (folder / LABELS).write_text(json.dumps(labels), encoding="utf-8")
    return Converted(len(labels), copied, bad)


def _check(split: str, bad: list[BadFile], most: float) -> None:
    if len(bad) > most:
        raise UsageError(
            f"{len(bad)} of the {split} files are bad, the last {bad[-1]}: mend or remove it, or allow a share with "
            "data.max_bad_fraction=0.01"
        )


def _items(source: Source, root: object) -> Iterator[Item]:
    """All samples in order, made in as many threads as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for start in range(0, len(source), _BLOCK):
            indices = range(start, min(start + _BLOCK, len(source)))
            yield from pool.map(lambda index: _item(source, index, root), indices)


def _item(source: Source, index: int, root: object) -> Item:
    try:
        sample = source[index]
    except BadFile as error:
        return Item(packed_bad(error), None, error, False)
    name = source.name(index)
    image, copied = _encoded(name, sample)
    sample.pop("index", None)  # its place, which the chunks know
    label = sample.get("label")
    return Item(packed(_short(name, root), sample, image), label if isinstance(label, int) else None, None, copied)


def _encoded(name: str, sample: Sample) -> tuple[bytes, bool]:
    """The bytes of the sample's file where they are the sample's image, and else a PNG that is."""
    path = Path(name)
    if path.is_file():
        data = path.read_bytes()
        if np.array_equal(decode_image(name, data), sample["image"]):
            return data, True
    data = lossless(sample["image"])
    if not np.array_equal(decode_image(name, data), sample["image"]):
        raise RuntimeError(f"{name} is not the same after it was written as PNG")
    return data, False


def _short(name: str, root: object) -> str:
    """The name below data.root, where it lies there."""
    if isinstance(root, Path) and Path(name).is_relative_to(root):
        return printable(Path(name).relative_to(root))
    return printable(name)
