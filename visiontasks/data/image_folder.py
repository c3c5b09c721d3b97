"""One's own images: a folder per class, with or without a split, or images alone."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from visiontasks.contracts import Sample, UsageError
from visiontasks.data.images import SUFFIXES, printable, read_image
from visiontasks.data.module import DataModule
from visiontasks.data.sampling import cut
from visiontasks.data.source import Source, Subset

SPLIT_WORDS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}


class ImageFiles:
    """Image files as a source, sorted by name, with a label for each where there are labels."""

    def __init__(self, paths: Iterable[str | Path], labels: Iterable[int] | None = None) -> None:
        self.paths = [str(path) for path in paths]
        self.labels = None if labels is None else list(labels)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Sample:
        sample = Sample(image=read_image(self.paths[index]))
        if self.labels is not None:
            sample["label"] = self.labels[index]
        return sample

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]


def find_images(given: str | Path) -> list[Path]:
    """The images that a folder (with all below it), a file or a glob pattern names, sorted.

    Of a folder those with the suffix of an image are taken; of a pattern every file that fits it.
    Raises UsageError where there are none.
    """
    path = Path(given)
    if path.is_dir():
        files = [file for file in visible_files(path) if has_image_suffix(file)]
    else:
        files = [path] if path.is_file() else sorted(file for file in _matches(str(given)) if not file.is_dir())
    if not files:
        raise UsageError(f"No images at {given}: give an image, a folder of images or a pattern like 'photos/*.jpg'")
    return files


class ImageFolder(DataModule):
    """Images in a folder per class, the folders' names being the classes'.

    `root` holds the class folders, or folders train, val (valid, validation) and test with class folders in each. What
    has no folder of its own is cut from train: `val_fraction` and `test_fraction` of every class, by the seed;
    `test_fraction=0` makes the validation images the test images as well.
    For a task that needs no label, such as pretraining, any folder will do: the images are all below it, by their
    suffixes, and have labels where they lie in class folders.
    Files are sorted by name; hidden ones are left out; whatever else lies in a class folder counts as an image, so that
    one that is none is named as bad. Mirrored images keep their meaning unless `mirror` is false.
    Raises UsageError where root is missing or has no images, or folders disagree about the classes.
    """

    provides = frozenset({"label"})
    remedies: ClassVar = {"label": "data.root=FOLDER with one folder of images per class"}

    def __init__(
        self,
        root: str | Path,
        *,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        mirror: bool = True,
        image_size: int | Sequence[int] = 224,
        **options: Any,
    ) -> None:
        super().__init__(image_size=image_size, **options)
        self.root = Path(root)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.mirror = mirror
        self._folders: dict[str, Path] | None = None
        self._unlabelled = self.root.is_dir() and not self._class_names()
        if self._unlabelled:
            self.provides = frozenset()

    def select(self, needs: frozenset[str], wants: frozenset[str] = frozenset(), *, otherwise: str = "") -> None:
        """Keep only these annotations; labels that are not needed are left out where the folders are no classes."""
        self._unlabelled = "label" not in needs and (not self._class_names() or self._disorder() is not None)
        super().select(needs, wants - {"label"} if self._unlabelled else wants, otherwise=otherwise)

    def source(self, split: str) -> Source:
        """The images of the split's folder, or its share of those in the train folder."""
        if split == "test" and "test" not in self.folders() and self.test_fraction == 0:
            return self.source("val")
        if split != "train" and split in self.folders():
            return self._labelled(self.folders()[split])
        return self._share(split)

    def read_classes(self) -> tuple[str, ...]:
        """The names of the class folders, sorted; () where images have no labels."""
        return () if self._unlabelled else self._class_names()

    def folders(self) -> dict[str, Path]:
        """The folder of each split that has one; "train" always does.

        Raises UsageError where root is no folder.
        """
        if self._folders is None:
            self._folders = self._find_folders()
        return self._folders

    def _find_folders(self) -> dict[str, Path]:
        if not self.root.is_dir():
            raise UsageError(f"{self.root.absolute()} is no folder: {_EXPECTED}")
        found = split_folders(self.root)
        if found and "train" not in found:
            names = ", ".join(sorted(folder.name.lower() for folder in _subfolders(self.root)))
            raise UsageError(f"{self.root} holds {names} but no train folder: {_EXPECTED}")
        return found or {"train": self.root}

    def _share(self, split: str) -> Source:
        whole = self._labelled(self.folders()["train"])
        labels = np.zeros(len(whole), np.int64) if whole.labels is None else np.array(whole.labels)
        parts = cut(
            labels,
            val_fraction=self.val_fraction,
            test_fraction=self.test_fraction,
            given=self.folders(),
            seed=self.seed,
        )
        return Subset(whole, parts[split])

    def _class_names(self) -> tuple[str, ...]:
        return tuple(printable(folder.name) for folder in _subfolders(self.folders()["train"]))

    def _labelled(self, folder: Path) -> ImageFiles:
        if self._unlabelled:
            images = [file for file in visible_files(folder) if has_image_suffix(file)]
            return ImageFiles(_some(images, folder, _EXPECTED_ANY))
        disorder = self._disorder()
        if disorder is not None:
            raise UsageError(disorder)
        pairs = [(file, label) for label, path in enumerate(_subfolders(folder)) for file in visible_files(path)]
        return ImageFiles(_some([file for file, _ in pairs], folder), [label for _, label in pairs])

    def _disorder(self) -> str | None:
        """What keeps the folders from being classes, in a sentence."""
        for folder in self.folders().values():
            if tuple(printable(path.name) for path in _subfolders(folder)) != self._class_names():
                other = self.folders()["train"]
                return f"{folder} and {other} have other class folders: give both the same, empty ones too"
            loose = [file for file in folder.iterdir() if has_image_suffix(file) and not file.is_dir()]
            if loose:
                return f"{loose[0]} lies beside class folders and belongs to no class: move it into one of them"
        return None


_EXPECTED = (
    "expected one folder of images per class (ROOT/cat/1.jpg, ROOT/dog/2.jpg), or the same in ROOT/train, ROOT/val and "
    "ROOT/test; type data.root=FOLDER"
)
_EXPECTED_ANY = f"expected files that end in {', '.join(sorted(SUFFIXES))} in it or below; type data.root=FOLDER"


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def split_folders(root: Path) -> dict[str, Path]:
    """The folder of each split that has one directly in root."""
    below = {folder.name.lower(): folder for folder in _subfolders(root)}
    return {split: below[word] for split, words in SPLIT_WORDS.items() for word in words if word in below}


def visible_files(folder: Path) -> list[Path]:
    """All files below a folder but hidden ones and those in hidden folders, sorted by name.

    What is no file and no folder to look into is among them, so that it is named as bad: links to nothing or to a
    folder, folders that may not be read, and empty ones with the name of an image.
    """
    files = (path for path in folder.rglob("*") if not path.is_dir() or _is_dead_end(path))
    return sorted(path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))


def _is_dead_end(folder: Path) -> bool:
    """Whether a folder would be passed over although images may be meant by it."""
    if folder.is_symlink() or not os.access(folder, os.R_OK | os.X_OK):
        return True
    return has_image_suffix(folder) and not any(folder.iterdir())


def has_image_suffix(file: Path) -> bool:
    """Whether a file's name ends as an image's does."""
    return file.suffix.lower() in SUFFIXES


def _matches(pattern: str) -> list[Path]:
    return [Path(found) for found in glob.glob(pattern, recursive=True)]  # noqa: PTH207, Path.glob takes no absolute one


def _some(files: list[Path], place: Path, expected: str = _EXPECTED) -> list[Path]:
    if not files:
        raise UsageError(f"{place.absolute()} holds no images: {expected}")
    return files
