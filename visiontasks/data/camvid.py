"""CamVid, in the layout and with the eleven classes of SegNet."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visiontasks.contracts import UsageError
from visiontasks.data.mask_data import MaskData, matched
from visiontasks.data.masks import IndexMasks, MaskReader, Pair

CLASSES = ("Sky", "Building", "Pole", "Road", "Pavement", "Tree",
           "SignSymbol", "Fence", "Car", "Pedestrian", "Bicyclist")  # fmt: skip
UNLABELLED = 11


class Camvid(MaskData):
    """Frames of driving videos, 360 x 480, with eleven classes (Brostow, Fauqueur, Cipolla 2009).

    `root` holds SegNet's folders (Badrinarayanan, Kendall, Cipolla 2015, arXiv 1511.00561): train and trainannot, val
    and valannot, and maybe test and testannot; without those the validation images are the test images as well. Index
    11 in the files, unlabelled, is ignored.
    Raises UsageError where a folder is missing, or images and masks do not match.
    """

    def __init__(
        self, root: str | Path = "data/camvid", *, image_size: int | Sequence[int] = (360, 480), **options: Any
    ):
        super().__init__(root, image_size=image_size, **options)

    def pairs(self, split: str) -> list[Pair]:
        """The files of a split's two folders."""
        if not (self.root / "train").is_dir():
            raise UsageError(
                f"{self.root.absolute()} holds no folder train: expected SegNet's train, trainannot, val and valannot; "
                "type data.root=FOLDER"
            )
        folder = "val" if split == "test" and not (self.root / "test").is_dir() else split
        return matched(self.root / folder, self.root / f"{folder}annot")

    def reader(self) -> MaskReader:
        """Indices 0 to 10, and 11 for what is unlabelled."""
        return IndexMasks(range(len(CLASSES)), ignored=[UNLABELLED])

    def read_classes(self) -> tuple[str, ...]:
        """SegNet's eleven."""
        return CLASSES
