"""Folders of images as users lay them out, and what is said of those that cannot be."""

import functools
import operator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from visiontasks.contracts import UsageError
from visiontasks.data.image_folder import ImageFiles, ImageFolder, find_images


def draw(*paths: Path) -> None:
    for number, path in enumerate(paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20 + number % 3, 16), (number % 256, 100, 200)).save(path)


def classes(folder: Path, count: int = 10, names: tuple[str, ...] = ("cat", "dog")) -> None:
    draw(*(folder / name / f"{number:02d}.png" for name in names for number in range(count)))


def folder(root: Path, **options: Any) -> ImageFolder:
    return ImageFolder(
        root, **{"image_size": 16, "batch_size": 2, "val_fraction": 0.2, "test_fraction": 0.3, **options}
    )


def names(data: ImageFolder, split: str) -> list[str]:
    source = data.source(split)
    return [source.name(index) for index in range(len(source))]


def test_class_folders_without_a_split(tmp_path: Path) -> None:
    classes(tmp_path)
    data = folder(tmp_path)
    data.setup()
    assert data.classes == ("cat", "dog")
    assert data.sizes() == {"train": 10, "val": 4, "test": 6}
    assert data.provides == {"label"}
    parts = [names(data, split) for split in ("train", "val", "test")]
    assert sorted(functools.reduce(operator.iadd, parts, [])) == sorted(str(path) for path in tmp_path.rglob("*.png"))
    assert parts == [names(folder(tmp_path), split) for split in ("train", "val", "test")]  # by the seed alone
    assert parts[1] != names(folder(tmp_path, seed=1), "val")
    for split in ("train", "val", "test"):
        source = data.source(split)
        labels = [source[index]["label"] for index in range(len(source))]
        assert labels == [int("dog" in name) for name in names(data, split)]
        assert labels.count(0) == labels.count(1)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_split_folders(tmp_path: Path, val: str) -> None:
    for name, count in (("train", 5), (val, 2), ("test", 3)):
        classes(tmp_path / name, count)
    data = folder(tmp_path)
    data.setup()
    assert data.sizes() == {"train": 10, "val": 4, "test": 6}
    assert data.classes == ("cat", "dog")
    assert all(f"/{val}/" in name for name in names(data, "val"))


def test_a_split_that_has_no_folder_is_cut_from_train(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", 3)
    data = folder(tmp_path)
    data.setup()
    assert data.sizes() == {"train": 14, "val": 6, "test": 6}
    assert not set(names(data, "train")) & set(names(data, "test"))
    alike = folder(tmp_path, test_fraction=0)
    assert names(alike, "test") == names(alike, "val")
    assert len(alike.source("train")) == 20


@pytest.mark.parametrize("below", [".", "train"])
def test_images_without_classes_serve_pretraining(tmp_path: Path, below: str) -> None:
    draw(*(tmp_path / below / f"{number}.png" for number in range(10)))
    data = folder(tmp_path)
    data.setup()
    assert data.provides == frozenset()
    assert data.classes == ()
    assert data.sizes() == {"train": 5, "val": 2, "test": 3}
    assert next(iter(data.train_dataloader())).keys() == {"image", "index"}
    with pytest.raises(UsageError, match=r"needs label .*one folder of images per class"):
        data.select(frozenset({"label"}))


def unlabelled(root: Path, **options: Any) -> ImageFolder:
    """As a task has it that needs nothing and would take labels."""
    data = folder(root, **options)
    data.select(frozenset(), frozenset({"label"}))
    data.setup()
    return data


def test_without_a_need_for_labels_any_images_below_the_folder_do(tmp_path: Path) -> None:
    draw(tmp_path / "a.png", tmp_path / "2023" / "b.jpg", *(tmp_path / "2024" / "May" / f"{n}.PNG" for n in range(8)))
    (tmp_path / "2024" / "notes.txt").write_text("a note")
    data = unlabelled(tmp_path)
    found = {name for split in ("train", "val", "test") for name in names(data, split)}
    assert len(found) == sum(data.sizes().values()) == 10
    assert data.sizes() == {"train": 5, "val": 2, "test": 3}
    assert data.keys == frozenset()
    assert data.classes == ()
    data.select(frozenset({"label"}))
    with pytest.raises(UsageError, match=r"a\.png lies beside class folders"):
        data.setup()


def test_class_folders_give_labels_to_those_who_want_them_and_the_same_splits(tmp_path: Path) -> None:
    classes(tmp_path)
    data = unlabelled(tmp_path)
    assert data.classes == ("cat", "dog")
    assert next(iter(data.train_dataloader()))["label"].shape == (2,)
    nothing = folder(tmp_path)
    nothing.select(frozenset())
    for split in ("train", "val", "test"):
        assert names(data, split) == names(folder(tmp_path), split) == names(nothing, split)


def test_splits_that_disagree_about_classes_have_no_labels(tmp_path: Path) -> None:
    classes(tmp_path / "train")
    classes(tmp_path / "val", 3, names=("cat", "horse"))
    data = unlabelled(tmp_path)
    assert data.keys == frozenset()
    assert data.sizes() == {"train": 14, "val": 6, "test": 6}


def test_a_bad_image_among_unlabelled_ones_is_named(tmp_path: Path) -> None:
    draw(*(tmp_path / f"{number}.png" for number in range(10)))
    (tmp_path / "3.png").write_bytes(b"none")
    with pytest.raises(UsageError, match=r"1 of \d+ \w+ files are bad: .*3.png is no image"):
        read_all(unlabelled(tmp_path))


def test_hidden_files_are_left_out_and_others_named(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "README.md").write_text("about")
    assert len(names(folder(tmp_path), "train")) == 10
    (tmp_path / "cat" / "00.txt").write_text("a note")
    with pytest.raises(UsageError, match=r"cat/00.txt is no image that can be read"):
        read_all(folder(tmp_path))


def read_all(data: ImageFolder) -> None:
    for batch in [*data.train_dataloader(), *data.val_dataloader(), *data.test_dataloader()]:
        data.on_before_batch_transfer(batch, 0)


def test_images_in_deeper_folders_belong_to_their_class(tmp_path: Path) -> None:
    classes(tmp_path)
    draw(tmp_path / "dog" / "more" / "a.png")
    assert sum(len(names(folder(tmp_path), split)) for split in ("train", "val", "test")) == 21


@pytest.mark.parametrize(
    "kind", ["missing", "file", "empty", "only empty classes", "no train", "loose image", "other classes"]
)
def test_mistakes(tmp_path: Path, kind: str) -> None:
    root, message = mistake(tmp_path / "photos", kind)
    with pytest.raises(UsageError, match=message):
        folder(root).setup()


def mistake(root: Path, kind: str) -> tuple[Path, str]:
    """Make the mistake; returns the root that is given and what is to be said of it."""
    if kind == "missing":
        return root, r"photos is no folder: expected one folder of images per class .*data.root=FOLDER"
    root.mkdir()
    if kind == "file":
        (root / "a").write_text("")
        return root / "a", "is no folder"
    if kind == "only empty classes":
        (root / "cat").mkdir()
        return root, "holds no images: expected one folder"
    if kind == "empty":
        return root, r"holds no images: expected files that end in .*\.jpg.* data.root=FOLDER"
    if kind == "no train":
        classes(root / "val")
        return root, "but no train folder"
    classes(root / "train")
    if kind == "loose image":
        draw(root / "train" / "a.png")
        return root, "lies beside class folders"
    classes(root / "val", names=("cat", "horse"))
    return root, "have other class folders"


def test_images_for_prediction_are_found(tmp_path: Path) -> None:
    draw(tmp_path / "b.png", tmp_path / "a.jpg", tmp_path / "more" / "c.PNG", tmp_path / ".d.png")
    (tmp_path / "notes.txt").write_text("a note")
    found = {
        given: [path.name for path in find_images(tmp_path / given)] for given in (".", "b.png", "*.*g", "notes.txt")
    }
    assert found == {".": ["a.jpg", "b.png", "c.PNG"], "b.png": ["b.png"], "*.*g": ["a.jpg", "b.png"],
                     "notes.txt": ["notes.txt"]}  # fmt: skip
    with pytest.raises(UsageError, match=r"No images at .*\*.gif"):
        find_images(tmp_path / "*.gif")
    source = ImageFiles(find_images(tmp_path))
    assert len(source) == 3
    assert source[1]["image"].shape == (16, 20, 3)
    assert source.name(1).endswith("b.png")


def test_ants_and_bees(shared_data: Path) -> None:
    data = folder(shared_data / "hymenoptera_256", test_fraction=0.1, cache="ram")
    data.setup()
    assert data.classes == ("ants", "bees")
    assert data.sizes()["val"] == 153
    batch = next(iter(data.val_dataloader()))
    assert batch["image"].shape == (2, 3, 16, 16)
    assert batch["label"].tolist() == [0, 0]
