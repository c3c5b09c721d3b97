"""Annotations in the text format of Darknet and Ultralytics, one file an image, described by a data.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from visiontasks.contracts import UsageError
from visiontasks.data.annotations import Corners, Outline, Table, Thing, outline_fault, upright_size
from visiontasks.data.images import SUFFIXES, BadFile
from visiontasks.data.object_files import Annotations, ObjectData

_SPLITS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
Fault = tuple[str, str]  # kind, reason


class YoloTxt(ObjectData):
    """Images with a text file each: on each line a class index, and a box (centre, size) or polygon in shares of 1.

    `root` is the folder with data.yaml (or another single yaml file), or that file: `names` are the classes, `train`,
    `val` and `test` folders of images or lists of their paths. The labels of .../images/a.jpg are in .../labels/a.txt,
    or beside the image; an image without a file, or with an empty one, shows no object, as the format has it.
    Masks come from polygons; lines with boxes alone then are at fault. Raises UsageError where the yaml file, names,
    images or all labels are missing.
    """

    provides = frozenset({"bboxes", "labels", "masks"})

    def read_annotations(self) -> Annotations:
        """The lines of all label files."""
        path, described = _described(self.root)
        classes = _names(path, described)
        images = {split: _images(path, described, split) for split in _SPLITS if _entry(described, split)}
        if not images.get("train"):
            raise UsageError(f"{path} names no train images: write train: FOLDER")
        lines = {split: [(image, *_lines(image)) for image in files] for split, files in images.items()}
        if not any(written.is_file() for part in lines.values() for _, written, _ in part):
            raise UsageError(f"None of the images of {path} has a label file, such as {_labels(images['train'][0])}")
        polygons = any(_is_polygon(line.split()) for part in lines.values() for *_, text in part for line in text)
        if not polygons:
            self.provides = type(self).provides - {"masks"}
        masks = "masks" in self.keys & self.provides
        tables = {split: _table(part, len(classes), masks=masks) for split, part in lines.items()}
        _orphans(tables["train"], images)
        return Annotations(classes, tuple(range(len(classes))), tables)


def _described(root: Path) -> tuple[Path, dict[str, Any]]:
    found = sorted([*root.glob("*.yaml"), *root.glob("*.yml")]) if root.is_dir() else [root]
    found = [path for path in found if path.stem in ("data", "dataset")] or found
    if len(found) != 1:
        many = f"holds {', '.join(path.name for path in found)}" if found else "holds no data.yaml"
        raise UsageError(f"{root.absolute()} {many}: type data.root=FOLDER/data.yaml")
    try:
        described = yaml.safe_load(found[0].read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{found[0]} is no yaml file ({' '.join(str(error).split())}): write names, train and val"
        ) from error
    if not isinstance(described, dict):
        raise UsageError(f"{found[0]} is an empty annotation file: write names, train and val")
    return found[0], described


def _names(path: Path, described: Mapping[str, Any]) -> tuple[str, ...]:
    names = described.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UsageError(f"{path} has names for {sorted(names)}: number the classes 0 to {len(names) - 1}")
        names = [names[position] for position in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UsageError(f"{path} has no names: write names: [cat, dog]")
    if described.get("nc", len(names)) != len(names):
        raise UsageError(f"{path} says nc: {described['nc']} and has {len(names)} names: make them agree")
    return tuple(str(name) for name in names)


def _entry(described: Mapping[str, Any], split: str) -> list[str]:
    given: Any = next((described[word] for word in _SPLITS[split] if described.get(word)), [])
    return [str(item) for item in (given if isinstance(given, list) else [given])]


def _images(path: Path, described: Mapping[str, Any], split: str) -> list[Path]:
    files: list[Path] = []
    for entry in _entry(described, split):
        place = _place(path, str(described.get("path") or ""), entry)
        files += (
            _listed(place)
            if place.is_file()
            else [file for file in place.rglob("*") if file.suffix.lower() in SUFFIXES]
        )
    return sorted(dict.fromkeys(files))


def _place(path: Path, base: str, entry: str) -> Path:
    """Where an entry of the yaml file is: below its own `path`, below the yaml file's folder, or without its '../'."""
    tried = [path.parent / base / entry, path.parent / entry, path.parent / entry.lstrip("./")]
    found = next((place for place in tried if place.exists()), None)
    if found is None:
        raise UsageError(
            f"{path} names {entry}, which is not in {path.parent.absolute()}: correct the entry or move it"
        )
    return found


def _listed(file: Path) -> list[Path]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [file.parent / line for line in lines if line]


def _labels(image: Path) -> Path:
    """The label file of an image: the last folder called images is labels, or else beside it."""
    parts = list(image.parts)
    if "images" in parts[:-1]:
        position = len(parts) - 2 - parts[:-1][::-1].index("images")
        parts[position] = "labels"
    return Path(*parts).with_suffix(".txt")


def _lines(image: Path) -> tuple[Path, list[str]]:
    path = _labels(image)
    return path, path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []


def _table(parts: list[tuple[Path, Path, list[str]]], classes: int, *, masks: bool) -> Table:
    table = Table("line")
    for file, written, lines in parts:
        if not file.is_file():
            table.found("missing file", str(file), "does not exist")
            continue
        try:
            size = upright_size(str(file))
        except BadFile as error:
            table.found("unreadable file", str(file), error.reason)
            continue
        image = table.image(str(file), size=size, written=str(written), id=file.stem)
        for number, line in enumerate(lines, start=1):
            if line.strip():
                _add(table, image, line.split(), number, classes=classes, masks=masks)
    return table


def _add(table: Table, image: int, words: list[str], number: int, *, classes: int, masks: bool) -> None:
    size = table.sizes[image]
    fault = _word_fault(words, classes)
    outline = _outline(words, size) if fault is None and masks else None
    if fault is None and masks:
        fault = _mask_fault(outline, size)
    if fault is not None:
        table.found(fault[0], f"{table.written[image]}, line {number},", fault[1])
        return
    table.things.append(Thing(image, _box(words, size), int(float(words[0])), number, outline=outline))


def _word_fault(words: list[str], classes: int) -> Fault | None:
    if len(words) != 5 and not _is_polygon(words):
        return "count mismatch", f"has {len(words)} numbers: expected a class and four numbers, or three or more points"
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        return "NaN box", f"has a word that is no number ({' '.join(words)[:60]})"
    if not math.isfinite(numbers[0]) or numbers[0] not in range(classes):
        return "unknown label", f"has class {words[0]}, and there are 0 to {classes - 1}"
    return None


def _is_polygon(words: list[str]) -> bool:
    return len(words) >= 7 and len(words) % 2 == 1


def _mask_fault(outline: Outline | None, size: tuple[int, int]) -> Fault | None:
    if outline is None:
        return "count mismatch", "has a box but no mask"
    return outline_fault([part.tolist() for part in outline if not isinstance(part, str)], size)


def _outline(words: list[str], size: tuple[int, int]) -> Outline | None:
    if len(words) == 5:
        return None
    return [(_points(words) * (size[1], size[0])).ravel()]


def _points(words: list[str]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array(words[1:], np.float64).reshape(-1, 2)


def _box(words: list[str], size: tuple[int, int]) -> Corners:
    height, width = size
    if len(words) > 5:
        (left, top), (right, bottom) = _points(words).min(0), _points(words).max(0)
    else:
        x, y, across, down = (float(word) for word in words[1:])
        left, top, right, bottom = x - across / 2, y - down / 2, x + across / 2, y + down / 2
    return left * width, top * height, right * width, bottom * height


def _orphans(table: Table, images: Mapping[str, list[Path]]) -> None:
    """Note the label files, in the folders that hold some, to which no image belongs."""
    known = {_labels(image) for files in images.values() for image in files}
    for folder in sorted({path.parent for path in known}):
        for path in sorted(folder.glob("*.txt")):
            if path not in known and path.parent.name != "images" and _is_labels(path):
                table.found("missing file", str(path), "has no image")


def _is_labels(path: Path) -> bool:
    """Whether a text file has lines of numbers, as a README or a list of paths does not."""
    words = path.read_text(encoding="utf-8", errors="replace").split()
    return bool(words) and all(word.lstrip("-").replace(".", "", 1).isdigit() for word in words[:5])
