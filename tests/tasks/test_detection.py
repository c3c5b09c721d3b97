"""The task around a detection head, with one that sees flat rectangles exactly."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from torch import Tensor, nn

from visiontasks.contracts import Backbone, Batch, Level, UsageError
from visiontasks.tasks import Detection

CLASSES = ("cat", "dog", "cow")
Box = tuple[int, int, int, int]


class Pixels(Backbone):
    """The pixels as they are."""

    levels = (Level(3, 1),)
    in_channels = 3
    mean = (0.0, 0.0, 0.0)
    std = (1 / 255, 1 / 255, 1 / 255)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [images]


class Spots(nn.Module):
    """Finds what `scene` draws; its losses depend on one weight and on how many objects there are to learn."""

    losses = ("boxes", "classes")

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.learnt: list[dict[str, Tensor]] = []

    def forward(self, features: list[Tensor]) -> Tensor:
        return features[0].round().int()

    def loss(self, raw: Tensor, targets: list[dict[str, Tensor]], *, keys: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        self.learnt = targets
        count = torch.tensor(sum(len(target["boxes"]) for target in targets))
        return {"classes": (3 * self.weight * count, count), "boxes": (self.weight * count, count)}

    def detections(self, raw: Tensor, *, max_detections: int, **thresholds: float) -> list[dict[str, Tensor]]:
        return [self._seen(image) for image in raw]

    def _seen(self, image: Tensor) -> dict[str, Tensor]:
        numbers = [number for number in image[0].unique().tolist() if number]
        masks = torch.stack([image[0] == number for number in numbers] or [image[0] < 0])[: len(numbers)]
        corners = [where.nonzero() for where in masks]
        boxes = [torch.cat([own.min(dim=0).values.flip(0), own.max(dim=0).values.flip(0) + 1]) for own in corners]
        labels = [int(image[1][where][0]) for where in masks]
        scores = [float(image[2][where][0]) / 100 for where in masks]
        return {
            "boxes": torch.stack(boxes).float() if boxes else torch.zeros(0, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "scores": torch.tensor(scores),
            "masks": masks.to(torch.uint8),
        }


class MaskedSpots(Spots):
    predicts_masks = True


def scene(*objects: tuple[Box, int, int], size: tuple[int, int] = (40, 60)) -> Tensor:
    """An image (3, H, W) that says boxes, classes and scores in percent."""
    image = torch.zeros(3, *size, dtype=torch.uint8)
    for number, ((x1, y1, x2, y2), label, percent) in enumerate(objects, start=1):
        image[:, y1:y2, x1:x2] = torch.tensor([number, label, percent], dtype=torch.uint8).view(3, 1, 1)
    return image


def task(head: Any = Spots, **options: Any) -> Detection:
    return Detection(backbone=Pixels(), classes=CLASSES, head=head, **options)


def objects(*rows: tuple[Box, int], crowd: int = 0) -> dict[str, Tensor]:
    """The boxes and labels of an image, the last `crowd` of them crowds."""
    crowds = torch.tensor([index >= len(rows) - crowd for index in range(len(rows))]).to(torch.uint8)
    boxes = torch.tensor([box for box, _ in rows], dtype=torch.float32).view(-1, 4)
    return {"bboxes": boxes, "labels": torch.tensor([label for _, label in rows], dtype=torch.int64), "crowd": crowds}


def batch(images: list[Tensor], truth: list[dict[str, Tensor]], **others: Any) -> Batch:
    columns = {name: [one[name] for one in truth] for name in truth[0]}
    return {"image": torch.stack(images), "index": torch.arange(len(images)), **columns, **others}


CAT, DOG, COW = ((2, 3, 8, 9), 0), ((26, 12, 34, 19), 1), ((49, 31, 58, 39), 2)


def test_windows_are_joined_to_what_the_whole_image_shows() -> None:
    image = scene((*CAT, 90), (*DOG, 80), (*COW, 60))[None]
    (whole,) = task().predict_step({"image": image}, 0)
    (joined,) = task(window=[20, 24], overlap=0.5).predict_step({"image": image}, 0)
    assert whole["boxes"].tolist() == [list(map(float, box)) for box, _ in (CAT, DOG, COW)]
    for name in ("boxes", "labels", "scores", "masks"):
        assert torch.equal(joined[name], whole[name]), name
    (best,) = task(window=[20, 24], overlap=0.5, max_detections=2).predict_step({"image": image}, 0)
    assert best["scores"].tolist() == pytest.approx([0.9, 0.8])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 0}, "task.window=0"),
        ({"window": [64, 0]}, r"task.window=\[64, 0\]"),
        ({"window": 64, "overlap": 1.0}, "task.overlap=1.0"),
        ({"overlap": -0.5}, "task.overlap=-0.5"),
        ({"weights": {"box": 2.0}}, r"\['box'\] and the head's losses are \['boxes', 'classes'\]"),
    ],
)
def test_settings_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        task(**options)


def test_the_loss_is_the_weighted_sum_in_training_and_evaluation() -> None:
    made, data = task(weights={"classes": 0.5}), batch([scene()], [objects(CAT, DOG)])
    assert made.training_step(data, 0).item() == 2 + 0.5 * 6
    made.validation_step(data, 0)
    figures, _ = made.metrics.compute()
    assert {name: figures[name].item() for name in ("loss", "boxes_loss", "classes_loss")} == {
        "loss": 5.0,
        "boxes_loss": 2.0,
        "classes_loss": 6.0,
    }


def test_all_figures_are_there_before_the_first_batch() -> None:
    made = task()
    before = set(made.metrics.compute()[0])
    made.test_step(batch([scene((*CAT, 90))], [objects(CAT)]), 0)
    assert set(made.metrics.compute()[0]) == before


def test_crowds_are_measured_against_and_not_learnt() -> None:
    made = task(MaskedSpots)
    masks = torch.tensor([0, 1], dtype=torch.uint8).view(2, 1, 1).expand(2, 40, 60)
    truth = objects(CAT, COW, crowd=1) | {"masks": masks}
    made.validation_step(batch([scene((*CAT, 90), (*COW, 80))], [truth]), 0)
    (learnt,) = made.head.learnt  # type: ignore[union-attr]
    assert set(learnt) == {"boxes", "labels", "masks"}
    assert learnt["boxes"].tolist() == [list(map(float, CAT[0]))]
    assert learnt["masks"].sum() == 0
    figures, tables = made.metrics.compute()
    assert (figures["precision"], figures["recall"]) == (1, 1)
    assert figures["map"].item() == pytest.approx(1)
    assert tables["confusion"].sum() == 1


def test_boxes_are_measured_in_the_pixels_of_the_file() -> None:
    made = task()
    image = scene((*CAT, 90))  # 36 pixels here: small; 14,400 in the file: large
    made.validation_step(batch([image], [objects(CAT)], scale=torch.tensor([0.05])), 0)
    figures, _ = made.metrics.compute()
    assert figures["map_large"].item() == pytest.approx(1)
    assert figures["map_small"].isnan()


def test_batches_without_objects_learn_nothing_and_are_measured() -> None:
    made, data = task(), batch([scene(), scene()], [objects(), objects()])
    loss = made.training_step(data, 0)
    loss.backward()
    assert loss.item() == 0
    assert made.head.weight.grad == 0  # type: ignore[union-attr]
    found = made.validation_step(data, 0)
    assert [len(one["boxes"]) for one in found] == [0, 0]
    assert {kind: counts.tolist() for kind, counts in made.errors(found, data).items()} == {
        "misses": [0, 0],
        "false_alarms": [0, 0],
    }
    assert [one["boxes"] for one in made.predictions(found)] == [[], []]
    figures, _ = made.metrics.compute()
    assert figures["loss"] == 0
    assert figures["map"].isnan()


def test_predictions_and_truths_are_in_words() -> None:
    made = task()
    data = batch([scene((*CAT, 90), (*DOG, 40), (*COW, 50))], [objects(CAT, COW, crowd=1)])
    (prediction,), (truth,) = made.predictions(made.predict_step(data, 0)), made.truths(data)
    assert prediction["classes"] == ["cat", "cow"]  # the dog is not sure enough
    assert prediction["scores"] == [0.9, 0.5]
    assert prediction["boxes"] == [list(map(float, box)) for box, _ in (CAT, COW)]
    assert truth == {"boxes": prediction["boxes"], "classes": ["cat", "cow"], "crowd": [0, 1]}


def test_errors_count_what_was_missed_and_what_is_wrong() -> None:
    made = task()
    seen = scene((*CAT, 90), (*DOG, 80))
    truths = [objects(CAT, DOG), objects((CAT[0], 1), COW), objects(), objects(CAT, DOG, crowd=1)]
    truths += [objects(((0, 0, 60, 40), 2), crowd=1)]
    data = batch([seen] * len(truths), truths)
    errors = made.errors(made.predict_step(data, 0), data)
    assert errors["misses"].tolist() == [0, 1, 0, 0, 0]
    assert errors["false_alarms"].tolist() == [0, 2, 2, 0, 0]


def test_a_picture_marks_what_is_missed_and_wrong_and_no_detection_on_a_crowd() -> None:
    made, image = task(), scene((*CAT, 90), (*COW, 80))
    for truth, words, frames in (
        (objects(CAT, ((40, 20, 60, 40), 2), crowd=1), "0 missed, 0 wrong", ["white", "grey", "green", "green"]),
        (objects(CAT, ((40, 20, 60, 40), 2)), "1 missed, 1 wrong", ["white", "gold", "green", "crimson"]),
        (objects(((40, 20, 60, 40), 2), crowd=1), "0 missed, 1 wrong", ["grey", "crimson", "green"]),
    ):
        data, axes = batch([image], [truth]), Figure().subplots()
        made.draw(axes, image, made.predictions(made.predict_step(data, 0))[0], made.truths(data)[0])
        assert axes.get_title() == words
        known = [name.replace("green", "forestgreen") for name in frames]
        assert [patch.get_edgecolor() for patch in axes.patches] == [to_rgba(name) for name in known]


def test_saved_boxes_and_results_are_in_the_pixels_and_ids_of_the_file(tmp_path: Path) -> None:
    made = task()
    made.category_ids = (3, 7, 18)
    size = torch.tensor([[78, 119]])  # of a file that was halved to 39 x 59.5 and padded
    about = {"scale": torch.tensor([0.5]), "size": size}
    (prediction,) = made.predictions(
        made.predict_step({"image": scene((*CAT, 90), ((49, 31, 60, 40), 2, 75))[None], **about}, 0)
    )
    line = made.save(prediction, tmp_path, "x")
    assert line == {
        "classes": ["cat", "cow"],
        "scores": [0.9, 0.75],
        "boxes": [[4.0, 6.0, 16.0, 18.0], [98.0, 62.0, 119.0, 78.0]],
        "masks": "masks/x.npz",
    }
    made.finish([{"file": "photos/x.jpg", **line}, {"file": "bad.jpg", "error": "truncated"}], tmp_path)
    assert json.loads((tmp_path / "coco_results.json").read_text()) == [
        {"image_id": "x", "category_id": 3, "bbox": [4.0, 6.0, 12.0, 12.0], "score": 0.9},
        {"image_id": "x", "category_id": 18, "bbox": [98.0, 62.0, 21.0, 16.0], "score": 0.75},
    ]


def test_saved_masks_have_the_size_of_the_file(tmp_path: Path) -> None:
    made = task(MaskedSpots)
    image = scene((*CAT, 90), ((30, 20, 50, 40), 2, 75))[None]
    about = {"scale": torch.tensor([0.5]), "size": torch.tensor([[80, 100]])}  # 40 x 50, padded to a width of 60
    (prediction,) = made.predictions(made.predict_step({"image": image, **about}, 0))
    line = made.save(prediction, tmp_path, "x")
    with np.load(tmp_path / line["masks"]) as stored:
        masks = stored["masks"]
    assert masks.shape == (2, 80, 100)
    for mask, (x1, y1, x2, y2) in zip(masks, ((4, 6, 16, 18), (60, 40, 100, 80)), strict=True):
        assert mask[y1:y2, x1:x2].mean() > 0.9
        assert mask.sum() == pytest.approx((y2 - y1) * (x2 - x1), rel=0.1)


def test_a_checkpoint_keeps_the_ids_of_the_categories() -> None:
    made, again = task(), task()
    made.category_ids = (3, 7, 18)
    checkpoint: dict[str, Any] = {}
    made.on_save_checkpoint(checkpoint)
    again.on_load_checkpoint(checkpoint)
    assert again.category_ids == (3, 7, 18)
