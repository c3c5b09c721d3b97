"""One's own images with masks: a folder of images, a folder of masks of the same names, and a list of classes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from PIL import Image

from visiontasks.contracts import IGNORE, UsageError
from visiontasks.data.image_folder import split_folders
from visiontasks.data.mask_data import MaskData, matched
from visiontasks.data.masks import ColourMasks, IndexMasks, MaskReader, Pair
from visiontasks.data.sampling import cut

Colour = tuple[int, int, int]

_TABLES = ("classes.csv", "classes.txt")
_HEADER = frozenset({"index", "id", "value", "name", "class", "label", "r", "g", "b", "red", "green", "blue"})
_COLOURED = frozenset({"RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV"})
_EXPECTED = (
    "expected ROOT/images and ROOT/masks with files of the same names, or the same two in ROOT/train, ROOT/val and "
    "ROOT/test; type data.root=FOLDER"
)


class Row(NamedTuple):
    """A class, and what stands for it in the masks: a number or a colour."""

    name: str
    value: int
    colour: Colour | None


class MaskFolder(MaskData):
    """Images in `root`/images, and in `root`/masks a mask for each, of the same name but for the suffix.

    Or root holds folders train, val (valid, validation) and test with images and masks in each; what has no folder of
    its own is cut from train: `val_fraction` and `test_fraction` of the images, by the seed; `test_fraction=0` makes
    the validation images the test images as well.
    Masks are PNG files of one number a pixel (a palette's numbers, never its colours), or in colour where the classes
    have colours. The classes are `classes`, or the lines of root/classes.csv or root/classes.txt, all of one kind: NAME
    (the first stands for 0), INDEX,NAME or NAME,RED,GREEN,BLUE. `ignore_index` is a number, or several, or colours like
    [0,0,0], that count nowhere, and 255 always does, unless the table gives it to a class.
    Raises UsageError where a file has no partner (some are named), the classes are missing or contradict the masks, or,
    once masks are selected, fewer than two classes occur.
    """

    remedies: ClassVar = {"mask": "data.root=FOLDER with images, masks and classes.txt"}

    def __init__(
        self,
        root: str | Path,
        *,
        classes: Sequence[str] | None = None,
        ignore_index: int | Sequence[int | Sequence[int]] = IGNORE,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        self.names = classes
        given = [ignore_index] if isinstance(ignore_index, int) else ignore_index
        self.ignored = [value for value in given if isinstance(value, int)]
        self.ignored_colours = [tuple(colour) for colour in given if not isinstance(colour, int)]
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self._parts: dict[str, list[Pair]] = {}

    def pairs(self, split: str) -> list[Pair]:
        """The files of the split's folder, or its share of those in the train folder."""
        if not self._parts:
            self._parts = self._find_parts()
        return self._parts[split]

    def reader(self) -> MaskReader:
        """By colour where the masks are in colour, else by number."""
        rows = self._rows()
        first = self.pairs("train")[0].mask
        if not _in_colour(first, rows):
            return IndexMasks([row.value for row in rows], ignored=self.ignored)
        colours = [row.colour for row in rows if row.colour]
        if len(colours) < len(rows):
            raise UsageError(
                f"{first} is in colour and the classes have no colours: write lines of NAME,RED,GREEN,BLUE into "
                f"{self.root / 'classes.csv'}, or save masks of one number a pixel"
            )
        return ColourMasks(colours, ignored=self.ignored_colours)

    def read_classes(self) -> tuple[str, ...]:
        """The names in the order of the option or the table, without those that `ignore_index` takes out."""
        return tuple(row.name for row in self._rows())

    def _rows(self) -> list[Row]:
        if self.names:
            rows = [Row(str(name), value, None) for value, name in enumerate(self.names)]
        else:
            rows = read_table(self._table())
        rows = [row for row in rows if row.colour or row.value == IGNORE or row.value not in self.ignored]
        if len(rows) < 2:
            raise UsageError(
                f"{len(rows)} classes are too few to tell apart: name two or more, a background among them"
            )
        return rows

    def _table(self) -> Path:
        for name in _TABLES:
            if (self.root / name).is_file():
                return self.root / name
        raise UsageError(
            f"{self.root.absolute()} holds no classes.txt: write one class a line into it, in the order of the numbers "
            "in the masks, or type data.classes=[background,thing]"
        )

    def _find_parts(self) -> dict[str, list[Pair]]:
        found = {split: matched(folder / "images", folder / "masks") for split, folder in self._folders().items()}
        whole = found["train"]
        positions = cut(
            np.zeros(len(whole), np.int64),
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            given=found,
            seed=self.seed,
        )
        parts = found | {split: [whole[index] for index in own] for split, own in positions.items()}
        return {"test": parts["val"]} | parts

    def _folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise UsageError(f"{self.root.absolute()} is no folder: {_EXPECTED}")
        if (self.root / "images").is_dir():
            return {"train": self.root}
        folders = split_folders(self.root)
        if "train" not in folders:
            raise UsageError(f"{self.root.absolute()} holds neither images nor train: {_EXPECTED}")
        return folders

    def _check_masks(self) -> None:
        super()._check_masks()
        if "mask" not in self.keys:
            return
        occurring = [name for name, count in zip(self.classes, self.class_counts(), strict=True) if count]
        if len(occurring) < 2:
            raise UsageError(
                f"The training masks hold {' and '.join(occurring) or 'no class'} and beside it only what is ignored, "
                f"as 255 is: where it stands for a class, write 0,background and 255,thing into {self.root}/classes.csv"
            )


def read_table(path: Path) -> list[Row]:
    """Read a table of classes: lines of NAME, of INDEX,NAME, or of NAME,RED,GREEN,BLUE, maybe below a header.

    Raises UsageError where a line is of another kind than the others, or two lines have a name, number or colour alike.
    """
    lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    fields = [re.split(r"\s*[,;\t]\s*", line) for line in lines]
    if fields and {field.lower() for field in fields[0]} <= _HEADER and len(fields[0]) > 1:
        fields = fields[1:]
    if all(len(row) == 1 and re.fullmatch(r"\d+\s+\D.*", row[0]) for row in fields):
        fields = [row[0].split(maxsplit=1) for row in fields]
    rows = [_row(position, row, kind=len(fields[0]), path=path) for position, row in enumerate(fields)]
    _check_distinct("name", [row.name for row in rows], path)
    _check_distinct("colour", [row.colour for row in rows if row.colour], path)
    _check_distinct("number", [row.value for row in rows], path)
    return rows


def _check_distinct(what: str, values: Sequence[object], path: Path) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    if twice:
        raise UsageError(f"{path} gives two classes the {what} {twice[0]}: give each its own")


def _row(position: int, fields: list[str], *, kind: int, path: Path) -> Row:
    numbers = [int(field) for field in fields if field.isdecimal()]
    if len(fields) == kind == 1:
        return Row(fields[0], position, None)
    if len(fields) == kind == 2 and fields[0].isdecimal():
        return Row(fields[1], int(fields[0]), None)
    if len(fields) == kind == 4 and len(numbers) >= 3 and all(field.isdecimal() for field in fields[1:]):
        return Row(fields[0], position, (numbers[-3], numbers[-2], numbers[-1]))
    raise UsageError(
        f"{path} has the line {','.join(fields)!r}: expected NAME, or INDEX,NAME, or NAME,RED,GREEN,BLUE, the same in "
        "all lines"
    )


def _in_colour(path: str, rows: list[Row]) -> bool:
    """Whether masks are told apart by colour: they have colours, or greys that the classes name as colours."""
    try:
        with Image.open(path) as picture:
            mode = picture.mode
    except (OSError, SyntaxError, ValueError):
        return False  # the reader says what is wrong with the file
    named = all(row.colour and len(set(row.colour)) == 1 for row in rows)
    return mode in _COLOURED or (mode in ("1", "L") and named)
