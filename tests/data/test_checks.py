"""Each check of the data on a healthy set, and on one with the fault that it is for."""

import re
from collections.abc import Callable
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from tests.data.test_module import Noise, NoiseData
from visiontasks.contracts import Sample
from visiontasks.data import checks
from visiontasks.data.augment import resize_and_crop
from visiontasks.data.module import collate


def module(**options: Any) -> NoiseData:
    data = NoiseData(**options)
    data.select(frozenset({"label"}))
    data.setup()
    return data


class OwnSeed(A.ImageOnlyTransform):  # type: ignore[misc]
    """Noise from a generator that `draw` does not key; `fixed` starts it anew at each call."""

    def __init__(self, seed: Callable[[], int], *, fixed: bool) -> None:
        super().__init__(p=1)
        self.origin, self.fixed = seed, fixed
        self.generator: np.random.Generator | None = None

    def apply(self, img: Any, **_: Any) -> Any:
        if self.generator is None or self.fixed:
            self.generator = np.random.default_rng(self.origin())
        return self.generator.integers(0, 256, img.shape).astype(np.uint8)


def owned(seed: Callable[[], int], *, fixed: bool = False) -> Callable[..., Any]:
    return lambda **_: A.Compose([OwnSeed(seed, fixed=fixed)])


def worker() -> int:
    info = torch.utils.data.get_worker_info()
    return 0 if info is None else info.id + 1


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
def test_diverse_draws_are_counted() -> None:
    verdict = checks.augmentation(module())
    assert verdict.status == "ok"
    assert verdict.sentence.startswith("48 of 48 draws of one image are different, over 3 epochs and 2 workers")


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.parametrize(
    ("transform", "status", "words"),
    [
        (owned(lambda: 7, fixed=True), "fault", "1 of 48 .* is its seed fixed"),
        (owned(lambda: 7), "fault", "24 of 48 .* every worker draws the same"),  # as albumentations 2.0.8 by itself
        (owned(worker), "fault", "48 of 48 .* depend on the number of workers"),
        (resize_and_crop, "warning", "1 of 48 .* augmentation is off"),
    ],
)
def test_repeated_draws_are_found(transform: Any, status: str, words: str) -> None:
    verdict = checks.augmentation(module(train_transform=transform, eval_transform=resize_and_crop))
    assert verdict.status == status
    assert re.match(words, verdict.sentence), verdict.sentence


class Padded(NoiseData):
    """Evaluates through torch's sampler, which pads."""

    def val_dataloader(self) -> DataLoader[Any]:
        usual = super().val_dataloader()
        world, rank = self.trainer.world_size, self.trainer.global_rank  # type: ignore[union-attr]
        sampler: Any = DistributedSampler(usual.dataset, num_replicas=world, rank=rank, shuffle=False)  # type: ignore[arg-type]
        return DataLoader(usual.dataset, batch_size=2, sampler=sampler, collate_fn=collate)


def test_evaluated_samples_are_counted() -> None:
    verdict = checks.evaluated_once(module())
    assert verdict.status == "ok"
    assert "each of 5 val and 7 test samples is counted once" in verdict.sentence
    padded = Padded()
    padded.setup()
    verdict = checks.evaluated_once(padded)
    assert verdict.status == "fault"
    assert verdict.sentence == "2 processes evaluate 6 of 5 val samples: 1 too often, 0 never"


class Altered(NoiseData):
    """Noise with another label, box or mask in each sample."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def source(self, split: str) -> Any:
        changes = self.changes

        class Changed(Noise):
            def __getitem__(self, index: int) -> Sample:
                return super().__getitem__(index) | changes  # type: ignore[return-value]

        return Changed(len(super().source(split)))


BOX = np.array([[2, 3, 9, 12]], np.float32)
WRONG = {
    "a label": ({"label": 2}, "has 2 to 2 in its label where there are 2 classes"),
    "labels": ({"bboxes": BOX, "labels": np.array([-1])}, "has -1 to -1 in its labels"),
    "a mask": ({"mask": np.full((16, 16), 9, np.uint8)}, "has 9 to 9 in its mask"),
    "a NaN box": ({"bboxes": BOX * np.nan, "labels": np.array([0])}, "not finite"),
    "a flat box": ({"bboxes": BOX[:, [0, 1, 0, 3]], "labels": np.array([0])}, "has no extent"),
    "a far box": ({"bboxes": BOX + 20, "labels": np.array([0])}, "has a box outside its 16 x 16 pixels"),
}


@pytest.mark.parametrize("what", WRONG)
def test_annotations_that_contradict_their_image_are_found(what: str) -> None:
    changes, words = WRONG[what]
    verdict = _looked(Altered(**changes))
    assert verdict.status == "fault"
    assert verdict.check == "annotations"
    assert words in verdict.sentence


def _looked(data: NoiseData) -> Any:
    data.classes = data.read_classes()
    return checks.files(checks.look(data), max_bad_fraction=data.max_bad_fraction)


def test_files_are_read_and_bad_ones_named() -> None:
    assert _looked(NoiseData()).sentence.startswith("24 of 24 train samples were read, none is bad")
    verdict = _looked(NoiseData(bad=frozenset({4, 6})))
    assert (verdict.status, verdict.check) == ("fault", "files")
    assert "2 are bad: noise/4: is bad; noise/6: is bad" in verdict.sentence
    assert _looked(NoiseData(bad=frozenset({4}), max_bad_fraction=0.1)).status == "warning"
    few = checks.look(module(train_size=1000), samples=10)
    assert (few.read, few.size) == (10, 1000)


@pytest.mark.parametrize(
    ("counts", "status", "words"),
    [
        ([50, 50], "ok", "50.0%"),
        ([95, 5], "warning", "even is 95.0% of the images"),
        ([9, 0], "warning", "1 of 2 classes"),
    ],
)
def test_rare_classes_are_found(counts: list[int], status: str, words: str) -> None:
    look = checks.Look("train", 100, 100, np.array(counts), "images", [], [])
    verdict = checks.balance(look, ("even", "odd"))
    assert verdict.status == status
    assert words in verdict.sentence


def test_classes_are_counted_in_what_the_task_learns() -> None:
    for keys, unit, total in (
        ({"label"}, "images", 24),
        ({"labels", "bboxes"}, "objects", 24),
        ({"mask"}, "pixels", 6144),
    ):
        data = NoiseData()
        data.select(frozenset(keys))
        data.setup()
        look = checks.look(data)
        assert (look.unit, look.counts.sum()) == (unit, total)


def test_pixels_far_from_zero_and_one_are_found() -> None:
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert checks.normalised(noise).status == "ok"
    assert checks.normalised(noise * 100).status == checks.normalised(noise + 3).status == "warning"
