"""Augmentation with objects: pixels, boxes and masks move together, and the draws belong to (seed, epoch, index)."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from visiontasks.contracts import Sample, UsageError
from visiontasks.data import CocoJson, DigitScenes, PennFudan
from visiontasks.data.module import DataModule
from visiontasks.data.objects import ObjectAugment, blended, pasted, resize_to_fit, scale_and_crop_objects, tiled
from visiontasks.data.randomness import draw

COLOURS = np.array([[250, 0, 0], [0, 250, 0], [0, 0, 250]], np.uint8)


def scene(shape: tuple[int, int] = (60, 90), *, count: int = 3, masks: bool = True) -> Sample:
    """Filled rectangles of three colours on white, far enough from each other to be told apart."""
    image = np.full((*shape, 3), 255, np.uint8)
    boxes = np.array([[5, 6, 25, 30], [35, 10, 60, 50], [66, 20, 85, 55]], np.float32)[:count]
    drawn = np.zeros((count, *shape), np.uint8)
    for mask, (left, top, right, bottom), colour in zip(drawn, boxes.astype(int), COLOURS, strict=False):
        mask[top:bottom, left:right] = 1
        image[top:bottom, left:right] = colour
    sample = Sample(image=image, bboxes=boxes, labels=np.arange(count))
    return sample | Sample(masks=drawn) if masks else sample


def augment(**options: Any) -> ObjectAugment:
    plain = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    return scale_and_crop_objects(**{"size": 48, "mirror": True, **plain, **options})


def seen_box(image: NDArray[np.uint8], label: int) -> NDArray[np.float64]:
    """The tight box of the pixels that are nearer to a colour than to any other, by numpy alone."""
    palette = np.vstack([COLOURS, [[255, 255, 255], [114, 114, 114]]]).astype(int)
    rows, columns = np.nonzero(np.abs(image[..., None, :] - palette).sum(-1).argmin(-1) == label)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("size", [48, (32, 80), 130])
def test_boxes_and_masks_follow_the_pixels(size: Any, masks: bool) -> None:
    transform = augment(size=size)
    shape = (size, size) if isinstance(size, int) else size
    shown = 0
    for index in range(60):
        moved = draw(transform, scene(masks=masks), seed=0, epoch=0, index=index)
        assert moved["image"].shape == (*shape, 3)
        boxes = moved["bboxes"]
        assert boxes.dtype == np.float32
        assert np.isfinite(boxes).all()
        assert (boxes >= 0).all()
        assert (boxes[:, 2:] <= shape[::-1]).all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
        for row, label in enumerate(moved["labels"]):
            shown += 1
            np.testing.assert_allclose(boxes[row], seen_box(moved["image"], label), atol=1.6)
            if masks:
                rows, columns = np.nonzero(moved["masks"][row])
                tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_allclose(boxes[row], tight, atol=1.1)
    assert shown > 90


def test_every_crop_keeps_an_object() -> None:
    transform = augment(scale=(2.0, 4.0), visible=0.0)
    for index in range(100):
        assert len(draw(transform, scene(), seed=0, epoch=0, index=index)["bboxes"])


def test_what_is_cut_too_far_is_left_out() -> None:
    for index in range(40):
        moved = draw(augment(scale=(1.5, 1.5), visible=0.95, mirror=False), scene(), seed=0, epoch=0, index=index)
        sides = (moved["bboxes"][:, 2:] - moved["bboxes"][:, :2]).prod(1)
        whole = (scene()["bboxes"][:, 2:] - scene()["bboxes"][:, :2]).prod(1)[moved["labels"]] * (1.5 * 48 / 90) ** 2
        assert (sides >= 0.9 * whole).all()


def test_an_image_without_objects_and_one_without_annotations() -> None:
    moved = draw(augment(), scene(count=0), seed=0, epoch=0, index=0)
    assert moved["bboxes"].shape == (0, 4)
    assert moved["labels"].shape == (0,)
    assert moved["masks"].shape == (0, 48, 48)
    assert draw(augment(), Sample(image=scene()["image"]), seed=0, epoch=0, index=0).keys() == {"image"}


def test_colours_are_jittered_and_sizes_are_not() -> None:
    given = scene()
    moved = draw(augment(scale=(1, 1), mirror=False, size=90, brightness=0.5), given, seed=0, epoch=0, index=1)
    assert not np.isin(moved["image"][:, :, 0], [0, 114, 250, 255]).all()
    np.testing.assert_allclose(moved["bboxes"][:, 2:] - moved["bboxes"][:, :2], [[20, 24], [25, 40], [19, 35]])


@pytest.mark.parametrize("shape", [(60, 90), (97, 61), (48, 48), (481, 641)])
def test_evaluation_keeps_the_aspect_and_says_how_to_go_back(shape: tuple[int, int]) -> None:
    given = scene((max(shape[0], 60), max(shape[1], 90)))
    height, width = given["image"].shape[:2]
    given = given | Sample(crowd=np.array([0, 1, 0], np.uint8), area=np.array([1.0, 2.0, 3.0]))
    fitted = draw(resize_to_fit(size=48), given, seed=0, epoch=0, index=0)
    assert fitted["image"].shape == (48, 48, 3)
    assert fitted["scale"] == pytest.approx(48 / max(height, width))
    assert fitted["size"].tolist() == [height, width]
    np.testing.assert_allclose(fitted["bboxes"] / fitted["scale"], given["bboxes"], rtol=1e-5)
    assert fitted["crowd"].tolist() == [0, 1, 0]
    assert fitted["area"].tolist() == [1, 2, 3]
    for row, label in enumerate(fitted["labels"]):
        np.testing.assert_allclose(fitted["bboxes"][row], seen_box(fitted["image"], label), atol=1.5)
        rows, columns = np.nonzero(fitted["masks"][row])
        tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        np.testing.assert_allclose(fitted["bboxes"][row], tight, atol=1.1)
    if width > height:
        assert (fitted["image"][-1] == 114).all()
        assert fitted["masks"][:, -1].sum() == 0


def test_an_image_of_the_right_size_is_evaluated_unchanged() -> None:
    given = Sample(image=cv2.randu(np.empty((48, 48, 3), np.uint8), 0, 255))
    fitted = draw(resize_to_fit(size=48), given, seed=0, epoch=0, index=0)
    np.testing.assert_array_equal(fitted["image"], given["image"])
    assert fitted["scale"] == 1


def test_a_mosaic_shows_four_images_with_their_objects() -> None:
    parts = [scene((60, 90)) for _ in range(4)]
    joined = tiled(parts)
    assert joined["image"].shape == (120, 180, 3)
    np.testing.assert_array_equal(joined["image"][60:, 90:], parts[3]["image"])
    np.testing.assert_allclose(joined["bboxes"][10], parts[3]["bboxes"][1] + [90, 60, 90, 60])
    np.testing.assert_array_equal(joined["masks"][10, 60:, 90:], parts[3]["masks"][1])
    assert joined["masks"][10].sum() == parts[3]["masks"][1].sum()
    assert joined["labels"].tolist() == [0, 1, 2] * 4


def test_blending_keeps_the_objects_of_both() -> None:
    white = Sample(
        image=np.full((60, 90, 3), 255, np.uint8), bboxes=np.zeros((0, 4), np.float32), labels=np.zeros(0, int)
    )
    mixed = blended(scene(masks=False), white, 0.25)
    assert mixed["labels"].tolist() == [0, 1, 2]
    assert mixed["image"][20, 10].tolist() == [254, 191, 191]


def test_pasting_covers_what_lies_below() -> None:
    below, above = scene(), scene(count=1)
    above["image"][10:40, 30:90] = 7
    above["masks"][:] = 0
    above["masks"][0, 10:40, 30:90] = 1
    above["bboxes"] = np.array([[30, 10, 90, 40]], np.float32)
    together = pasted(below, above, visible=0.3)
    assert together["labels"].tolist() == [0, 2, 0]  # a quarter of the second is left, three sevenths of the third
    np.testing.assert_allclose(together["bboxes"], [[5, 6, 25, 30], [66, 40, 85, 55], [30, 10, 90, 40]])
    assert (together["image"][10:40, 30:90] == 7).all()
    np.testing.assert_array_equal(together["image"][:10], below["image"][:10])
    assert (together["masks"].sum(0) <= 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mosaic": 2}, "mosaic=2 is no probability"),
        ({"copy_paste": -1}, "copy_paste=-1 is no probability"),
        ({"scale": (2, 1)}, r"scale=\[2, 1\] is no range"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        augment(**options)


MIXED = {"mosaic": 0.5, "mixup": 0.5, "copy_paste": 0.5}


def digits(workers: int, needs: set[str], **mixing: float) -> DataModule:
    def train(**given: Any) -> ObjectAugment:
        return scale_and_crop_objects(**given, **mixing)

    data = DigitScenes(train_size=24, val_size=4, test_size=4, batch_size=4, num_workers=workers, train_transform=train)
    data.select(frozenset(needs))
    return data


def epochs(data: DataModule, count: int) -> list[list[dict[str, Any]]]:
    loader = data.train_dataloader()
    seen = []
    for epoch in range(count):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        seen.append(list(loader))
    return seen


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize("mixing", [{}, MIXED])
def test_batches_are_the_same_for_any_workers_and_new_each_epoch(mixing: dict[str, float]) -> None:
    needs = {"bboxes", "labels", "masks"}
    alone, shared = (epochs(digits(workers, needs, **mixing), 2) for workers in (0, 2))
    for one, other in zip(alone[0] + alone[1], shared[0] + shared[1], strict=True):
        assert torch.equal(one["image"], other["image"])
        for key in needs:
            assert all(torch.equal(left, right) for left, right in zip(one[key], other[key], strict=True))
    first, second = ({image.numpy().tobytes() for batch in epoch for image in batch["image"]} for epoch in alone)
    assert len(first) == len(second) == 24
    assert not first & second


@pytest.mark.parametrize("name", MIXED)
def test_mixing_changes_the_batches(name: str) -> None:
    needs = {"bboxes", "labels", "masks"}
    plain, mixed = (epochs(digits(0, needs, **mixing), 1)[0] for mixing in ({}, {name: 1.0}))
    assert not torch.equal(plain[0]["image"], mixed[0]["image"])
    counts = [sum(len(boxes) for batch in batches for boxes in batch["bboxes"]) for batches in (plain, mixed)]
    assert counts[1] > 1.1 * counts[0]
    for batch in mixed:
        for boxes, labels, masks in zip(batch["bboxes"], batch["labels"], batch["masks"], strict=True):
            assert len(boxes) == len(labels) == len(masks)
            assert (boxes[:, 2:] - boxes[:, :2] >= 1).all()
            assert (boxes >= 0).all()
            assert (boxes <= 64).all()


def test_pasting_without_masks_is_refused() -> None:
    with pytest.raises(UsageError, match="copy_paste needs masks"):
        epochs(digits(0, {"bboxes", "labels"}, copy_paste=1.0), 1)


def test_mixing_whole_image_labels_is_refused() -> None:
    with pytest.raises(UsageError, match="join objects, and these samples have more"):
        epochs(digits(0, {"bboxes", "labels", "mask"}, mosaic=1.0), 1)


@pytest.mark.parametrize("mixing", [{}, MIXED])
def test_real_photographs(shared_data: Path, mixing: dict[str, float]) -> None:
    def train(**given: Any) -> ObjectAugment:
        return scale_and_crop_objects(**given, **mixing)

    sets = [
        PennFudan(shared_data / "penn_fudan", image_size=160, train_transform=train),
        CocoJson(
            shared_data / "coco",
            annotations="annotations/instances_train100.json",
            image_size=160,
            train_transform=train,
        ),
    ]
    for data in sets:
        for batch in epochs(data, 1)[0][:4]:
            for boxes, masks in zip(batch["bboxes"], batch["masks"], strict=True):
                for box, mask in zip(boxes.numpy(), masks.numpy(), strict=True):
                    assert mask.any()
                    assert box.min() >= 0
                    assert box.max() <= 160
                    assert (box[2:] - box[:2] >= 1).all()
                    rows, columns = np.nonzero(mask)
                    tight = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
                    np.testing.assert_allclose(box, tight, atol=2.1)
