"""Published sets with a class for every pixel, in the layouts that they are published in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visiontasks.contracts import UsageError
from visiontasks.data.mask_data import MaskData
from visiontasks.data.masks import IndexMasks, MaskReader, Pair
from visiontasks.data.sampling import cut
from visiontasks.data.torchvision_sets import published

VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
               "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa",
               "train", "tvmonitor")  # fmt: skip
_IGNORED_ID = 255  # the train id of what is not evaluated
_CITYSCAPES_SPLITS = {"train": "train", "val": "val", "test": "val"}
_ADE20K_SPLITS = {"train": "training", "val": "validation", "test": "validation"}


class VocSegmentation(MaskData):
    """PASCAL VOC's photographs with twenty classes and a background (Everingham et al. 2010).

    `root` is torchvision's: VOCdevkit/VOC2012 below it, downloaded where it is missing. The border of every object,
    255 in the files, is ignored. The published test masks are secret: the validation images are the test images too.
    Raises UsageError where the files are not there and cannot be downloaded.
    """

    background = True

    def __init__(self, root: str | Path = "data", *, year: int = 2012, **options: Any) -> None:
        super().__init__(root, **options)
        self.year = year

    def pairs(self, split: str) -> list[Pair]:
        """The files in the published list."""
        from torchvision.datasets import VOCSegmentation

        def make(download: bool) -> Any:
            part = "train" if split == "train" else "val"
            return VOCSegmentation(str(self.root), year=str(self.year), image_set=part, download=download)

        found = published(make, root=self.root, name=f"VOC{self.year}")
        return [Pair(*files) for files in zip(found.images, found.masks, strict=True)]

    def reader(self) -> MaskReader:
        """The palette's indices: 0 for the background, 1 to 20."""
        return IndexMasks(range(len(VOC_CLASSES) + 1))

    def read_classes(self) -> tuple[str, ...]:
        """The twenty, in the order of their indices from 1."""
        return VOC_CLASSES


class Cityscapes(MaskData):
    """Street scenes of 50 cities, 1024 x 2048, with nineteen classes (Cordts et al. 2016, arXiv 1604.01685).

    `root` holds leftImg8bit and gtFine as published; the site asks for a registration, so that nothing is downloaded.
    Masks are the files *_labelIds.png, or *_labelTrainIds.png where there are none of those. The published test masks
    are empty: the validation images are the test images as well.
    Raises UsageError where the folders are missing or an image has no mask.
    """

    def __init__(self, root: str | Path = "data/cityscapes", **options: Any) -> None:
        super().__init__(root, **options)

    def pairs(self, split: str) -> list[Pair]:
        """All cities of the split, sorted."""
        part = _CITYSCAPES_SPLITS[split]
        images = sorted((self.root / "leftImg8bit" / part).glob("*/*_leftImg8bit.png"))
        if not images:
            raise UsageError(
                f"{self.root.absolute()} holds no leftImg8bit/{part}/CITY/*_leftImg8bit.png: unpack "
                "leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip there, or type data.root=FOLDER"
            )
        return [Pair(str(path), str(_existing(self._mask(path)))) for path in images]

    def reader(self) -> MaskReader:
        """The nineteen classes that are evaluated; all other labels are ignored."""
        if self._suffix() == "labelTrainIds":
            return IndexMasks(range(len(self.read_classes())))
        labels = _cityscapes_labels()
        others = [label.id for label in labels if label.id >= 0 and label not in _evaluated(labels)]
        return IndexMasks([label.id for label in _evaluated(labels)], ignored=others)

    def read_classes(self) -> tuple[str, ...]:
        """The names of the nineteen, by their train ids."""
        return tuple(label.name for label in _evaluated(_cityscapes_labels()))

    def _mask(self, image: Path) -> Path:
        stem = image.name.removesuffix("leftImg8bit.png")
        folder = self.root / "gtFine" / image.parent.parent.name / image.parent.name
        return folder / f"{stem}gtFine_{self._suffix()}.png"

    def _suffix(self) -> str:
        found = next((self.root / "gtFine" / "train").glob("*/*_labelIds.png"), None)
        return "labelIds" if found else "labelTrainIds"


class OxfordPet(MaskData):
    """Photographs of 37 breeds of cats and dogs with trimaps (Parkhi et al. 2012, "Cats and dogs").

    The task is pet against background. A trimap's third value, a band around the pet where the annotators did not
    decide, is ignored, or with `boundary=true` a third class, as many tutorials have it. `root` is torchvision's:
    oxford-iiit-pet below it, downloaded where it is missing. Val is `val_fraction` of the published trainval part, by
    the seed.
    Raises UsageError where the files are not there and cannot be downloaded.
    """

    background = True

    def __init__(
        self, root: str | Path = "data", *, boundary: bool = False, val_fraction: float = 0.1, **options: Any
    ) -> None:
        super().__init__(root, **options)
        self.boundary = boundary
        self.val_fraction = val_fraction

    def pairs(self, split: str) -> list[Pair]:
        """The files in the published lists, of trainval the kept or the held out ones."""
        from torchvision.datasets import OxfordIIITPet

        published(lambda download: OxfordIIITPet(str(self.root), download=download), root=self.root, name="OxfordPet")
        if split == "test":
            return self._listed("test")
        whole = self._listed("trainval")
        positions = cut(np.zeros(len(whole), np.int64), val_fraction=self.val_fraction, seed=self.seed)
        return [whole[index] for index in positions[split]]

    def reader(self) -> MaskReader:
        """2 is background, 1 a pet, 3 the band between them."""
        return IndexMasks([2, 1, 3]) if self.boundary else IndexMasks([2, 1], ignored=[3])

    def read_classes(self) -> tuple[str, ...]:
        """What is no background."""
        return ("pet", "boundary") if self.boundary else ("pet",)

    def _listed(self, part: str) -> list[Pair]:
        folder = self.root / "oxford-iiit-pet"
        lines = (folder / "annotations" / f"{part}.txt").read_text(encoding="utf-8").splitlines()
        stems = [line.split()[0] for line in lines if line.strip()]
        masks = folder / "annotations" / "trimaps"
        return [Pair(str(folder / "images" / f"{stem}.jpg"), str(masks / f"{stem}.png")) for stem in stems]


class ADE20K(MaskData):
    """Scenes of all kinds with 150 classes: the scene parsing benchmark (Zhou et al. 2016, arXiv 1608.05442).

    `root` is the unpacked ADEChallengeData2016: images and annotations, each with training and validation, and
    objectInfo150.txt, which names the classes. Index 0, what is none of them, is ignored. The published test masks are
    secret: the validation images are the test images as well.
    Raises UsageError where these are missing or an image has no mask.
    """

    def __init__(self, root: str | Path = "data/ADEChallengeData2016", **options: Any) -> None:
        super().__init__(root, **options)

    def pairs(self, split: str) -> list[Pair]:
        """All images of the split, sorted."""
        part = _ADE20K_SPLITS[split]
        images = sorted((self.root / "images" / part).glob("*.jpg"))
        if not images:
            raise UsageError(self._absent(f"images/{part}/*.jpg"))
        masks = self.root / "annotations" / part
        return [Pair(str(path), str(_existing(masks / f"{path.stem}.png"))) for path in images]

    def reader(self) -> MaskReader:
        """1 to 150 are the classes."""
        return IndexMasks(range(1, len(self.read_classes()) + 1), ignored=[0])

    def read_classes(self) -> tuple[str, ...]:
        """The first word for each class in objectInfo150.txt."""
        path = self.root / "objectInfo150.txt"
        if not path.is_file():
            raise UsageError(self._absent(path.name))
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:] if line.strip()]
        return tuple(_first_words([row[-1] for row in rows]))

    def _absent(self, what: str) -> str:
        return (
            f"{self.root.absolute()} holds no {what}: fetch ADEChallengeData2016.zip from "
            "http://sceneparsing.csail.mit.edu and unpack it there, or type data.root=FOLDER"
        )


def _cityscapes_labels() -> Sequence[Any]:
    from torchvision.datasets import Cityscapes as Published

    return Published.classes  # type: ignore[no-any-return]


def _evaluated(labels: Sequence[Any]) -> list[Any]:
    """The labels that are classes, by train id."""
    return sorted((label for label in labels if 0 <= label.train_id < _IGNORED_ID), key=lambda label: label.train_id)


def _existing(mask: Path) -> Path:
    if not mask.is_file():
        raise UsageError(f"{mask} does not exist, and its image does: fetch the annotations again")
    return mask


def _first_words(entries: list[str]) -> list[str]:
    """The first synonym of each entry, with as many more as tell it from the others."""
    first = [entry.split(",")[0].strip() for entry in entries]
    return [entry.strip() if first.count(word) > 1 else word for entry, word in zip(entries, first, strict=True)]
