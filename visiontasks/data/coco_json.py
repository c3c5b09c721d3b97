"""Annotations in COCO's JSON format."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from visiontasks.contracts import UsageError
from visiontasks.data.annotations import Corners, Outline, Table, Thing, outline_fault, upright_size
from visiontasks.data.images import BadFile
from visiontasks.data.object_files import Annotations, ObjectData, folders_below, images_below, split_of

_LISTS = ("images", "annotations", "categories")


class CocoJson(ObjectData):
    """Images whose objects are in a JSON file as COCO's are (Lin et al. 2014, arXiv 1405.0312).

    `annotations`, `val_annotations` and `test_annotations` are files below root; where none is given, the JSON files of
    root, of its folder annotations and of its folders train, val and test are looked at, and those whose name has the
    word of a split, as in instances_val2017.json, or whose folder does, belong to it. `images` is the folder of the
    images below root; where it is not given, for each file the folder that holds most of its images.
    Masks come from `segmentation`, polygons and run lengths alike. Categories that no object has are classes too.
    Raises UsageError where a file is not found, is no JSON, or could be meant as well as another.
    """

    provides = frozenset({"bboxes", "labels", "masks"})

    def __init__(
        self,
        root: str | Path,
        *,
        annotations: str | None = None,
        val_annotations: str | None = None,
        test_annotations: str | None = None,
        images: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(root, **options)
        self.given = {"train": annotations, "val": val_annotations, "test": test_annotations}
        self.images = images

    def read_annotations(self) -> Annotations:
        """The files of all splits, which must agree about the categories."""
        read = {split: _load(path) for split, path in self.files().items()}
        categories = _categories(read)
        if not any(annotation.get("segmentation") for _, data in read.values() for annotation in data["annotations"]):
            self.provides = type(self).provides - {"masks"}
        masks = "masks" in self.keys & self.provides
        tables = {
            split: _table(path, data, folder=self._folder(path, data), categories=categories, masks=masks)
            for split, (path, data) in read.items()
        }
        return Annotations(tuple(categories.values()), tuple(categories), tables)

    def files(self) -> dict[str, Path]:
        """The annotation file of each split that has one; "train" always does."""
        given = {split: self.root / name for split, name in self.given.items() if name is not None}
        if given and "train" not in given:
            raise UsageError(f"data.annotations is not given, {', '.join(given)} is: type data.annotations=FILE too")
        return given or _found(self.root)

    def origins(self) -> list[str]:
        """The annotation file of each split that has one."""
        return [f"{path} ({split})" for split, path in self.files().items()]

    def _folder(self, path: Path, data: Mapping[str, Any]) -> Path:
        if self.images is not None:
            return self.root / self.images
        names = {Path(str(image.get("file_name"))).name for image in data["images"][:50]}
        hits = {folder: len(names & images_below(folder).keys()) for folder in folders_below(self.root)}
        best = max(hits.values())
        if names and not best:
            raise UsageError(
                f"No folder in {self.root.absolute()} holds the images of {path.name}, such as {min(names)}: "
                "type data.images=FOLDER"
            )
        alike = [folder for folder, count in hits.items() if count == best]
        near = [folder for folder in alike if folder == path.parent or split_of(folder.name) == split_of(path.stem)]
        return (near or alike)[0]


def _found(root: Path) -> dict[str, Path]:
    folders = [root, root / "annotations", *(path for path in root.iterdir() if split_of(path.name) and path.is_dir())]
    files = [file for folder in folders for file in sorted(folder.glob("*.json"))]
    files = [file for file in files if file.name.startswith("instances")] or files
    if not files:
        raise UsageError(f"{root.absolute()} and its annotations folder hold no JSON file: type data.annotations=FILE")
    splits: dict[str, list[Path]] = {}
    for file in files:
        own = split_of(file.stem) or (split_of(file.parent.name) if file.parent != root else None)
        splits.setdefault(own or "train", []).append(file)
    for split, several in splits.items():
        if len(several) > 1 or "train" not in splits:
            names = ", ".join(str(file.relative_to(root)) for file in several)
            option = "annotations" if split == "train" or "train" not in splits else f"{split}_annotations"
            raise UsageError(
                f"{root} holds {names} for {split}: type data.{option}={several[0].relative_to(root)} or another "
                "(and the other splits' in data.annotations, data.val_annotations and data.test_annotations)"
            )
    return {split: several[0] for split, several in splits.items()}


def _load(path: Path) -> tuple[Path, dict[str, Any]]:
    if not path.is_file():
        raise UsageError(f"{path} does not exist: type data.annotations=FILE, a JSON file below data.root")
    if not path.stat().st_size:
        raise UsageError(f"{path} is an empty annotation file (0 bytes): fetch or export it again")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UsageError(f"{path} is no JSON file ({error}): fetch or export it again") from error
    absent = [key for key in _LISTS if not isinstance(data, dict) or not isinstance(data.get(key), list)]
    if absent:
        raise UsageError(
            f"{path} has no list {absent[0]}: give a file with {', '.join(_LISTS)}, as COCO's instances have"
        )
    if not data["images"]:
        raise UsageError(f"{path} is an empty annotation file (no images): fetch or export it again")
    return path, data


def _categories(read: Mapping[str, tuple[Path, Mapping[str, Any]]]) -> dict[int, str]:
    """Name of each category by its id, in the order of the ids."""
    path, data = read["train"]
    own = _names(path, data)
    for other, more in read.values():
        if _names(other, more) != own:
            raise UsageError(f"{other} and {path} have other categories: give all splits the same, with the same ids")
    if len(set(own.values())) < len(data["categories"]):
        raise UsageError(f"{path} has two categories with one id or one name: give each its own")
    return own


def _names(path: Path, data: Mapping[str, Any]) -> dict[int, str]:
    try:
        return dict(sorted((int(item["id"]), str(item["name"])) for item in data["categories"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path} has a category without id or name: write both, as COCO does") from error


def _table(path: Path, data: Mapping[str, Any], *, folder: Path, categories: Mapping[int, str], masks: bool) -> Table:
    table = Table("annotation")
    images = _images(table, path, data, folder)
    labels = {category: position for position, category in enumerate(categories)}
    for position, annotation in enumerate(data["annotations"]):
        number = annotation.get("id", position)
        place = f"{path}, annotation {number},"
        fault = _fault(annotation, images, labels) or _number_fault(annotation)
        image = images.get(annotation.get("image_id"))
        if fault is None and image is not None and masks:
            fault = _mask_fault(annotation, table.sizes[image])
        if fault is not None:
            table.found(fault[0], place, fault[1])
        elif image is not None:
            table.things.append(_thing(annotation, image, labels[annotation["category_id"]], number, masks=masks))
    return table


def _images(table: Table, path: Path, data: Mapping[str, Any], folder: Path) -> dict[Any, int | None]:
    """Position of each image by its id; None where its file is missing, which is noted."""
    present: dict[Path, dict[str, str]] = {}
    images: dict[Any, int | None] = {}
    files: set[str] = set()
    for item in data["images"]:
        file = folder / str(item.get("file_name"))
        file = file if file.parent == folder or file.is_file() else folder / file.name
        names = present.setdefault(file.parent, images_below(file.parent))
        place = f"{path}, image {item.get('id')},"
        if item.get("id") in images or str(file) in files:
            table.found("duplicate image", place, f"({file.name}) is there twice")
            images.setdefault(item.get("id"), None)
            continue
        images[item.get("id")] = None
        if file.name not in names:
            table.found("missing file", place, f"is {file}, which does not exist")
            continue
        files.add(str(file))
        try:
            size = _size(item) or upright_size(str(file))
        except BadFile as error:
            table.found("unreadable file", place, f"is {error}")
            continue
        images[item["id"]] = table.image(str(file), size=size, written=str(path), id=item["id"])
    return images


def _size(item: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = item.get("height"), item.get("width")
    stated = isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0
    return cast(tuple[int, int], (height, width)) if stated else None


def _fault(
    annotation: Mapping[str, Any], images: Mapping[Any, int | None], labels: Mapping[int, int]
) -> tuple[str, str] | None:
    if annotation.get("image_id") not in images:
        return "missing file", f"belongs to image {annotation.get('image_id')}, which is not in the list of images"
    if annotation.get("category_id") not in labels:
        return "unknown label", f"has category {annotation.get('category_id')}, which is not in the list of categories"
    return None


def _number_fault(annotation: Mapping[str, Any]) -> tuple[str, str] | None:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        return "count mismatch", f"has the box {box}, which is not four numbers"
    if not all(isinstance(side, (int, float)) for side in box):
        return "NaN box", f"has the box {box}, which is not four numbers"
    return None


def _mask_fault(annotation: Mapping[str, Any], size: tuple[int, int]) -> tuple[str, str] | None:
    if not annotation.get("segmentation"):
        return "count mismatch", "has a box but no mask"
    return outline_fault(annotation["segmentation"], size)


def _thing(annotation: Mapping[str, Any], image: int, label: int, number: int, *, masks: bool) -> Thing:
    left, top, width, height = annotation["bbox"]
    box: Corners = (left, top, left + width, top + height)
    area = annotation.get("area")
    outline = annotation["segmentation"] if masks else None
    return Thing(
        image=image,
        box=box,
        label=label,
        number=number,
        crowd=bool(annotation.get("iscrowd", 0)),
        area=float(area) if isinstance(area, (int, float)) else None,
        outline=_compact(outline),
    )


def _compact(outline: Any) -> Outline | None:
    return [np.asarray(part, np.float64) for part in outline] if isinstance(outline, list) else outline
