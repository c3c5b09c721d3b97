"""Images with boxes, labels and maybe masks from files: what the readers of all formats share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import Sample, Transform, UsageError
from visiontasks.data.annotations import Finding, Objects, Policy, Table, checked, rasterised, settle
from visiontasks.data.image_folder import SPLIT_WORDS
from visiontasks.data.images import SUFFIXES, BadFile, read_image
from visiontasks.data.module import DataModule
from visiontasks.data.sampling import cut
from visiontasks.data.source import Source, Subset


class Annotations(NamedTuple):
    """What a reader found: class names, the id that the files give each, and a table for each published split."""

    classes: tuple[str, ...]
    category_ids: tuple[int, ...]
    tables: dict[str, Table]  # "train" always


class ObjectFiles:
    """Image files with their objects as a source; samples to evaluate on (`truth`) have crowds, and say "area" too.

    Raises BadFile where an image has another size than its annotations say.
    """

    def __init__(self, objects: Objects, *, masks: bool, truth: bool) -> None:
        self.objects = objects
        self.masks = masks
        self.truth = truth

    def __len__(self) -> int:
        return len(self.objects.files)

    def name(self, index: int) -> str:
        """The file's path."""
        return self.objects.files[index]

    def __getitem__(self, index: int) -> Sample:
        objects, size = self.objects, self.objects.sizes[index]
        image = read_image(self.name(index))
        if image.shape[:2] != size:
            found, stated = (f"{width} x {height}" for height, width in (image.shape[:2], size))
            raise BadFile(self.name(index), f"has {found} pixels where its annotations say {stated}")
        rows = objects.rows(index, crowd=self.truth)
        sample = Sample(image=image, bboxes=objects.boxes[rows], labels=objects.labels[rows])
        if self.masks:
            sample["masks"] = self._masks(rows, size)
        if self.truth:
            sample["crowd"], sample["area"] = objects.crowd[rows], objects.areas[rows]
        return sample

    def _masks(self, rows: NDArray[np.int64], size: tuple[int, int]) -> NDArray[np.uint8]:
        masks = np.zeros((len(rows), *size), np.uint8)
        for mask, row in zip(masks, rows, strict=True):
            outline = self.objects.outlines[row]
            if outline is not None:
                mask[:] = rasterised(outline, size)
        return masks


class ObjectData(DataModule):
    """Photographs with annotated objects; a subclass reads one format (`read_annotations`).

    What the files do not split is cut from train: `val_fraction` and `test_fraction` of the images, by the seed;
    `test_fraction=0` makes the validation images the test images as well. Crowds (and what VOC calls difficult) are no
    training targets; the samples of val and test have them, with "crowd" 1, and "area" (N,) in the file's pixels.
    `bad_annotations` is what happens when the files are read and an annotation is wrong: "refuse" names the first few
    and counts all by kind; "repair" clips, reorders or leaves out, each listed in `repaired`.
    `category_ids[i]` is the id that the files give classes[i].
    Raises UsageError where root or annotations are missing, or an annotation is bad and to be refused.
    """

    provides = frozenset({"bboxes", "labels"})
    category_ids: tuple[int, ...]

    def __init__(
        self,
        root: str | Path,
        *,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        bad_annotations: Policy = "refuse",
        mirror: bool = True,
        image_size: int = 512,
        batch_size: int = 8,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, batch_size=batch_size, **options)
        self.root = Path(root)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.bad_annotations: Policy = bad_annotations
        self.mirror = mirror
        self.repaired: tuple[str, ...] = ()
        self._objects: dict[str, Objects] = {}

    def read_annotations(self) -> Annotations:
        """All that the files state, unchecked; without outlines unless "masks" is in `keys`."""
        raise NotImplementedError(f"{type(self).__name__} does not read annotations: define read_annotations()")

    def select(self, needs: frozenset[str], wants: frozenset[str] = frozenset(), *, otherwise: str = "") -> None:
        """Keep only these annotations; masks are looked for when they are asked for."""
        before = "masks" in self.keys
        super().select(needs, wants, otherwise=otherwise)
        if before != ("masks" in self.keys):
            self._objects = {}
        if "masks" in self.keys:
            self.objects()
            super().select(needs, wants, otherwise=otherwise)

    def source(self, split: str) -> Source:
        """The published split, or its share of the training images."""
        objects = self.objects()
        if split == "test" and "test" not in objects and self.test_fraction == 0:
            return self.source("val")
        part = split if split in objects else "train"
        whole = ObjectFiles(objects[part], masks="masks" in self.keys, truth=split != "train")
        if part != "train":
            return whole
        parts = cut(
            np.zeros(len(whole), np.int64),
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            given=objects,
            seed=self.seed,
        )
        return Subset(whole, parts[split])

    def read_classes(self) -> tuple[str, ...]:
        """The names in the annotations."""
        self.objects()
        return self.classes

    def image_id(self, split: str, index: int) -> int | str:
        """What the annotations call an image of a split: COCO's image_id, else the file's stem."""
        source = self._sources[split]
        position = int(source.positions[index]) if isinstance(source, Subset) else index
        files = source.source if isinstance(source, Subset) else source
        assert isinstance(files, ObjectFiles)
        return files.objects.ids[position]

    def objects(self) -> dict[str, Objects]:
        """The sound objects of each published split, read and checked the first time."""
        if not self._objects:
            if not self.root.exists():
                raise UsageError(f"{self.root.absolute()} does not exist: type data.root=FOLDER")
            read = self.read_annotations()
            findings: list[Finding] = []
            objects = {}
            for split, table in read.tables.items():
                objects[split], found = checked(table)
                findings += found
            self.repaired = settle(findings, self.bad_annotations)
            self.classes, self.category_ids, self._objects = read.classes, read.category_ids, objects
        return self._objects

    def _transform(self, *, train: bool, keys: frozenset[str]) -> Transform:
        from visiontasks.data.objects import resize_to_fit, scale_and_crop_objects

        self.train_transform = self.train_transform or scale_and_crop_objects
        self.eval_transform = self.eval_transform or resize_to_fit
        return super()._transform(train=train, keys=keys)


def images_below(folder: Path) -> dict[str, str]:
    """Path of each image directly in a folder, by file name."""
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as entries:
        return {entry.name: entry.path for entry in entries if os.path.splitext(entry.name)[1].lower() in SUFFIXES}  # noqa: PTH122


def folders_below(root: Path) -> list[Path]:
    """Root and all folders below it that are not hidden, the shallow ones first, sorted by name."""
    below = [path for path in root.rglob("*") if path.is_dir() and not path.name.startswith(".")]
    return [root, *sorted(below, key=lambda path: (len(path.parts), str(path)))]


def split_of(name: str) -> str | None:
    """The split that a word in a file's or folder's name stands for, as in instances_val2017."""
    words = "".join(letter if letter.isalpha() else " " for letter in name.lower()).split()
    return next((split for split, known in SPLIT_WORDS.items() if set(known) & set(words)), None)
