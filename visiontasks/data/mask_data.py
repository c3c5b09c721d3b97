"""What the data sets of images with a mask of classes each have in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from visiontasks.contracts import UsageError
from visiontasks.data.image_folder import ImageFiles, visible_files
from visiontasks.data.images import printable
from visiontasks.data.masks import MaskFiles, MaskReader, Pair
from visiontasks.data.module import DataModule
from visiontasks.data.source import Source

_NAMED = 3  # orphans that an error lists


class MaskData(DataModule):
    """Images with a mask of class indices each; a subclass finds the files (`pairs`) and says how masks are read.

    A mirrored image keeps its meaning unless `mirror` is false.
    """

    provides = frozenset({"mask"})

    def __init__(
        self, root: str | Path, *, mirror: bool = True, image_size: int | Sequence[int] = 512, **options: Any
    ) -> None:
        super().__init__(image_size=image_size, **options)
        self.root = Path(root)
        self.mirror = mirror

    def pairs(self, split: str) -> list[Pair]:
        """The files of a split, always in the same order."""
        raise NotImplementedError(f"{type(self).__name__} does not say where its files are: define pairs(split)")

    def reader(self) -> MaskReader:
        """What turns a mask file into class indices."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to read a mask: define reader()")

    def source(self, split: str) -> Source:
        """The split's image files with their masks, or alone where no masks are selected."""
        if "mask" not in self.keys:
            return ImageFiles(pair.image for pair in self.pairs(split))
        return MaskFiles(self.pairs(split), self.reader())


def matched(images: Path, masks: Path) -> list[Pair]:
    """The images and masks below two folders that have the same name but for the suffix, sorted.

    Raises UsageError where a folder is missing, or a file of one has no partner, or several, in the other.
    """
    found = _by_stem(images)
    partners = _by_stem(masks)
    alone = [files[stem] for files, others in ((found, partners), (partners, found)) for stem in files.keys() - others]
    if alone:
        raise UsageError(_orphans(sorted(alone), images))
    if not found:
        raise UsageError(
            f"{images.absolute()} holds no images: put images there, and masks of the same names in {masks}"
        )
    return [Pair(str(found[stem]), str(partners[stem])) for stem in sorted(found)]


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder.absolute()} is no folder: expected images there, or type data.root=FOLDER")
    files: dict[str, Path] = {}
    for path in visible_files(folder):
        stem = str(path.relative_to(folder).with_suffix(""))
        if stem in files:
            raise UsageError(f"{files[stem]} and {path} have the same name but for the suffix: keep one of them")
        files[stem] = path
    return files


def _orphans(alone: list[Path], images: Path) -> str:
    without_mask = [path for path in alone if images in path.parents]
    without_image = [path for path in alone if path not in without_mask]
    kinds = (("images without a mask", without_mask), ("masks without an image", without_image))
    words = [f"{len(paths)} {kind} ({_some(paths)})" for kind, paths in kinds if paths]
    return f"{images.parent} holds {' and '.join(words)}: give each file a partner of the same name, or take it away"


def _some(paths: list[Path]) -> str:
    more = ", ..." if len(paths) > _NAMED else ""
    return ", ".join(printable(path) for path in paths[:_NAMED]) + more
