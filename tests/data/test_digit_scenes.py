"""The embedded scenes: the same for the same numbers, their annotations in agreement with each other."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from visiontasks.contracts import UsageError
from visiontasks.data.digit_scenes import DigitScenes, _members, _photographs

SPLITS = ("train", "val", "test")


def scenes(split: str = "train", **options: Any) -> Any:
    return DigitScenes(**{"train_size": 60, "val_size": 60, "test_size": 60, **options}).source(split)


def test_scenes_depend_on_seed_split_and_index_alone() -> None:
    images = {(seed, split, index): scenes(split, seed=seed)[index]["image"].tobytes()
              for seed in (0, 1) for split in SPLITS for index in (0, 1)}  # fmt: skip
    assert len(set(images.values())) == 12
    assert scenes("val", seed=1, val_size=9)[1]["image"].tobytes() == images[1, "val", 1]


def test_annotations_agree_with_each_other() -> None:
    source = scenes()
    for index in range(len(source)):
        sample = source[index]
        masks, labels, boxes = sample["masks"], sample["labels"], sample["bboxes"]
        assert 1 <= len(labels) <= 6
        assert masks.sum(0).max() == 1
        for mask, label, (left, top, right, bottom) in zip(masks, labels, boxes.astype(int), strict=True):
            rows, columns = np.nonzero(mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == (left, top, right, bottom)
            assert (sample["mask"][mask > 0] == label + 1).all()
        assert ((sample["mask"] == 0) == (masks.sum(0) == 0)).all()


def test_ink_stands_out_from_what_is_around_it() -> None:
    source, weights = scenes(digits=(1, 1)), np.array([0.299, 0.587, 0.114])
    for index in range(len(source)):
        sample = source[index]
        (mask,), (box,) = sample["masks"], sample["bboxes"].astype(int)
        luma = (sample["image"] @ weights)[box[1] : box[3], box[0] : box[2]]
        ink = mask[box[1] : box[3], box[0] : box[2]] > 0
        assert abs(np.median(luma[ink]) - np.median(luma[~ink])) > 30


def test_digits_hardly_cover_each_other() -> None:
    source = scenes(digits=(6, 6))
    counts = [len(source[index]["labels"]) for index in range(60)]
    assert min(counts) == max(counts) == 6
    hidden = [scene_overlap(source[index]["bboxes"]) for index in range(60)]
    assert max(hidden) < 0.25


def scene_overlap(boxes: Any) -> float:
    """The largest share of a box that another one covers."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=-1)
    np.fill_diagonal(shared, 0)
    return float((shared / np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1)[:, None]).max())


def test_sizes_keep_to_their_range() -> None:
    source = scenes(digits=(1, 1), digit_size=(0.5, 0.5), image_size=128)
    sides = [np.diff(source[index]["bboxes"].reshape(2, 2), axis=0).max() / 128 for index in range(60)]
    assert abs(np.median(sides) - 0.5) < 0.06
    assert max(sides) < 0.65


def test_splits_share_no_digit_and_no_part_of_a_photograph() -> None:
    from sklearn.datasets import load_digits, load_sample_images

    members = [np.concatenate(_members(split)) for split in SPLITS]
    assert sorted(np.concatenate(members).tolist()) == list(range(len(load_digits().target)))
    assert [len(_members(split)) for split in SPLITS] == [10, 10, 10]
    for number, image in enumerate(load_sample_images().images):
        parts = [_photographs(split)[number] for split in SPLITS]
        np.testing.assert_array_equal(np.concatenate(parts, axis=1), image)


def test_all_classes_occur_about_equally() -> None:
    source = scenes(digits=(1, 1), train_size=600, image_size=32)
    counts = np.bincount([source[index]["label"] for index in range(600)], minlength=10)
    assert counts.min() > 30
    assert counts.max() < 95


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"digits": (1, 1)}, {"label", "mask", "masks", "bboxes", "labels"}),
        ({"multi_label": True}, {"label", "mask", "masks", "bboxes", "labels"}),
        ({"digits": (1, 3)}, {"mask", "masks", "bboxes", "labels"}),
    ],
)
def test_labels_are_provided_where_they_mean_something(options: dict[str, Any], keys: set[str]) -> None:
    assert DigitScenes(**options).provides == keys
    assert scenes(**options)[0].keys() - {"image", "index"} == keys


def test_many_labels_are_zeros_and_ones() -> None:
    sample = scenes(multi_label=True)[3]
    np.testing.assert_array_equal(np.flatnonzero(sample["label"]), np.unique(sample["labels"]))
    assert sample["label"].dtype == np.float32
    assert sample["label"].shape == (10,)


@pytest.mark.parametrize("image_size", [28, 32, 96, 224])
def test_sizes_by_option(image_size: int) -> None:
    sample = scenes(image_size=image_size)[0]
    assert sample["image"].shape == (image_size, image_size, 3)
    assert sample["mask"].shape == (image_size, image_size)


def test_only_what_is_selected_is_made() -> None:
    data = DigitScenes(digits=(1, 1), train_size=4)
    data.select(frozenset({"label"}))
    assert data.source("train")[0].keys() == {"image", "index", "label"}


def test_the_data_module_by_itself() -> None:
    data = DigitScenes(train_size=40, val_size=3, test_size=4, batch_size=8)
    data.setup()
    assert data.classes == tuple("0123456789")
    assert data.sizes() == {"train": 40, "val": 3, "test": 4}
    assert next(iter(data.train_dataloader()))["image"].shape == (8, 3, 64, 64)


@pytest.mark.parametrize("options", [{"digits": (0, 3)}, {"digits": (4, 2)}, {"digit_size": (0.2, 1.5)}])
def test_contradictory_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=f"data.{next(iter(options))}="):
        DigitScenes(**options)


def test_class_names_are_ordered() -> None:
    data = DigitScenes()
    assert all(left < right for left, right in pairwise(data.read_classes()))


def test_plain_digits_are_white_on_black() -> None:
    source = scenes(digits=(1, 1), digit_size=(0.8, 0.95), image_size=32, plain=True)
    for index in range(20):
        sample = source[index]
        image, mask = np.asarray(sample["image"]), np.asarray(sample["mask"])
        assert (image == image[..., :1]).all()
        assert image.max() > 250
        assert image[mask == 0].mean() < 20
        assert image[mask > 0].mean() > 150
