"""Annotations in Pascal VOC's XML format, one file an image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from visiontasks.contracts import UsageError
from visiontasks.data.annotations import Corners, Table, Thing, upright_size
from visiontasks.data.image_folder import split_folders
from visiontasks.data.images import BadFile
from visiontasks.data.object_files import Annotations, ObjectData, images_below

_CORNERS = ("xmin", "ymin", "xmax", "ymax")
Found = tuple[str, str]  # kind, reason


class VocXml(ObjectData):
    """Images with an XML file each, as Pascal VOC has them (Everingham et al. 2010) and labelImg writes them.

    `root` holds Annotations, JPEGImages (or images) and, where there is a split, lists of names in ImageSets/Main; or
    folders train, val (valid) and test with XML files and images in each; or XML files and images together; or
    torchvision's VOCdevkit with one year. The image of an XML file has its stem, or else its <filename>.
    `first_pixel=1` is for VOC 2007 and 2012 themselves, which count pixels from 1 and include the last one.
    Difficult objects are crowds unless `keep_difficult`. Classes are the names that occur, sorted, with ids from 1.
    Raises UsageError where there are no XML files.
    """

    def __init__(self, root: str | Path, *, first_pixel: int = 0, keep_difficult: bool = False, **options: Any) -> None:
        super().__init__(root, **options)
        if first_pixel not in (0, 1):
            raise UsageError(f"data.first_pixel={first_pixel} is neither 0 nor 1: type data.first_pixel=0")
        self.first_pixel = first_pixel
        self.keep_difficult = keep_difficult

    def read_annotations(self) -> Annotations:
        """All XML files, each split's in the order of its list or of the names."""
        files = _files(_year(self.root))
        pages = {path: _parsed(path) for paths in files.values() for path in paths}
        things = [thing for page in pages.values() if not isinstance(page, str) for thing in page.iter("object")]
        classes = tuple(sorted({_text(thing, "name") for thing in things} - {""}))
        known = {name: position for position, name in enumerate(classes)}
        tables = {split: self._table(paths, pages, known) for split, paths in files.items()}
        return Annotations(classes, tuple(range(1, len(classes) + 1)), tables)

    def _table(
        self, paths: list[Path], pages: Mapping[Path, ElementTree.Element | str], classes: Mapping[str, int]
    ) -> Table:
        table = Table("object")
        images = _Images()
        seen: set[str] = set()
        for path in paths:
            page = pages[path]
            if isinstance(page, str):
                table.found(_kind(page), f"{path}", page)
                continue
            file = images.of(path, page)
            if file is None or file in seen:
                table.found(*_without_image(file, path, page))
                continue
            seen.add(file)
            try:
                size = _size(page) or upright_size(file)
            except BadFile as error:
                table.found("unreadable file", f"{path}", f"belongs to {error}")
                continue
            image = table.image(file, size=size, written=str(path), id=path.stem)
            self._add(table, image, page, classes)
        return table

    def _add(self, table: Table, image: int, page: ElementTree.Element, classes: Mapping[str, int]) -> None:
        for number, thing in enumerate(page.iter("object"), start=1):
            box, fault = self._box(thing)
            name = _text(thing, "name")
            if name not in classes:
                fault = ("unknown label", "has no name")
            if fault is not None:
                table.found(fault[0], f"{table.written[image]}, object {number},", fault[1])
                continue
            crowd = _text(thing, "difficult") == "1" and not self.keep_difficult
            table.things.append(Thing(image, box, classes[name], number, crowd))

    def _box(self, thing: ElementTree.Element) -> tuple[Corners, Found | None]:
        texts = [_text(thing, f"bndbox/{corner}") for corner in _CORNERS]
        nothing = (0.0, 0.0, 0.0, 0.0)
        if not all(texts):
            return nothing, (
                "count mismatch",
                f"has a box of {sum(map(bool, texts))} numbers, not {', '.join(_CORNERS)}",
            )
        try:
            left, top, right, bottom = (float(text) for text in texts)
        except ValueError:
            return nothing, ("NaN box", f"has the box ({', '.join(texts)}), which is not four numbers")
        return (left - self.first_pixel, top - self.first_pixel, right, bottom), None


class _Images:
    """The image of each XML file, from listings of the folders that can hold it."""

    def __init__(self) -> None:
        self.listings: dict[Path, tuple[dict[str, str], dict[str, str]]] = {}

    def of(self, path: Path, page: ElementTree.Element) -> str | None:
        for folder in (path.parent, path.parent.parent / "JPEGImages", path.parent.parent / "images"):
            by_stem, by_name = self._listing(folder)
            found = by_stem.get(path.stem) or by_name.get(_text(page, "filename"))
            if found:
                return found
        return None

    def _listing(self, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
        if folder not in self.listings:
            names = dict(sorted(images_below(folder).items()))
            self.listings[folder] = ({Path(name).stem: path for name, path in names.items()}, names)
        return self.listings[folder]


def _year(root: Path) -> Path:
    years = sorted(path for path in (*root.glob("VOC2*"), *root.glob("VOCdevkit/VOC2*")) if path.is_dir())
    if len(years) > 1:
        raise UsageError(f"{root} holds {', '.join(path.name for path in years)}: type data.root={years[-1]}")
    return years[0] if years else root


def _files(root: Path) -> dict[str, list[Path]]:
    folder = next((root / name for name in ("Annotations", "annotations") if (root / name).is_dir()), root)
    below = {split: sorted(place.rglob("*.xml")) for split, place in split_folders(root).items()}
    lists = _lists(root, folder)
    files = lists or ({} if not any(below.values()) else below) or {"train": sorted(folder.glob("*.xml"))}
    if not files.get("train"):
        raise UsageError(
            f"{root.absolute()} holds no XML files to train on: expected Annotations/*.xml beside JPEGImages, "
            "train/*.xml, or *.xml; type data.root=FOLDER"
        )
    return files


def _lists(root: Path, folder: Path) -> dict[str, list[Path]]:
    """The XML files of each list in ImageSets/Main; trainval is the train list where there is no other."""
    place = root / "ImageSets" / "Main"
    files = {split: place / f"{split}.txt" for split in ("train", "val", "test") if (place / f"{split}.txt").is_file()}
    if "train" not in files and (place / "trainval.txt").is_file():
        files["train"] = place / "trainval.txt"
    stems = {split: [line.split()[0] for line in _lines(file) if line.split()] for split, file in files.items()}
    return {split: [folder / f"{stem}.xml" for stem in dict.fromkeys(names)] for split, names in stems.items()}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _parsed(path: Path) -> ElementTree.Element | str:
    """The file's tree, or what is wrong with it."""
    try:
        data = path.read_bytes()
    except OSError:
        return "does not exist"
    if not data.strip():
        return f"is an empty annotation file ({len(data)} bytes)"
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError) as error:
        return f"is no XML ({error})"


def _kind(fault: str) -> str:
    kinds = {"does not exist": "missing file", "is no XML": "unreadable file"}
    return next((kind for start, kind in kinds.items() if fault.startswith(start)), "empty annotation file")


def _without_image(file: str | None, path: Path, page: ElementTree.Element) -> tuple[str, str, str]:
    if file is not None:
        return "duplicate image", str(path), f"annotates {file}, as another file does"
    return (
        "missing file",
        str(path),
        f"has no image: neither {path.stem}.* nor {_text(page, 'filename') or 'a filename'}",
    )


def _size(page: ElementTree.Element) -> tuple[int, int] | None:
    height, width = _text(page, "size/height"), _text(page, "size/width")
    stated = height.isdecimal() and width.isdecimal() and int(height) > 0 and int(width) > 0
    return (int(height), int(width)) if stated else None


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()
