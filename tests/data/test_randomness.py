import pickle
import random
from collections.abc import Iterator

import albumentations as A
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, Sampler

from visiontasks.contracts import Sample, UsageError
from visiontasks.data.augment import crop_and_colour
from visiontasks.data.randomness import draw, key

IMAGE = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
EPOCHS, IMAGES = 3, 16


class _SameImage(Dataset[torch.Tensor]):
    """One image everywhere, so that two equal results can only come from two equal draws."""

    def __init__(self) -> None:
        self.transform = crop_and_colour(size=16, mirror=True)

    def __getitem__(self, key: tuple[int, int]) -> torch.Tensor:
        epoch, index = key
        return torch.from_numpy(draw(self.transform, {"image": IMAGE}, seed=7, epoch=epoch, index=index)["image"])


class _Epochs(Sampler[tuple[int, int]]):
    epoch = -1

    def __iter__(self) -> Iterator[tuple[int, int]]:
        self.epoch += 1
        return iter([(self.epoch, index) for index in range(IMAGES)])


def _drawn(workers: int, *, persistent: bool = False) -> torch.Tensor:
    loader = DataLoader(_SameImage(), 4, sampler=_Epochs(), num_workers=workers, persistent_workers=persistent)
    return torch.cat([batch for _ in range(EPOCHS) for batch in loader])  # (epochs * images, 16, 16, 3)


@pytest.fixture(scope="module")
def one_process() -> torch.Tensor:
    return _drawn(workers=0)


def test_no_two_samples_share_a_draw_and_no_epoch_repeats(one_process: torch.Tensor) -> None:
    assert len(np.unique(one_process.flatten(1).numpy(), axis=0)) == EPOCHS * IMAGES


@pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker processes")
@pytest.mark.parametrize(("workers", "persistent"), [(1, False), (2, True), (4, False), (4, True)])
def test_any_number_of_workers_draws_the_same(one_process: torch.Tensor, workers: int, persistent: bool) -> None:
    assert torch.equal(_drawn(workers, persistent=persistent), one_process)


def _keyed(**numbers: int) -> tuple[np.random.Generator, random.Random]:
    generator, py_random = np.random.Generator(np.random.Philox()), random.Random()
    key(generator, py_random, **{"seed": 0, "epoch": 0, "index": 0, "view": 0} | numbers)
    return generator, py_random


def test_the_stream_is_philox_at_the_block_of_the_sample() -> None:
    oracle = np.random.Generator(np.random.Philox(key=[11, 2], counter=[0, 0, 5, 3]))
    first, second = oracle.integers(1 << 64, size=2, dtype=np.uint64).tolist()
    generator, py_random = _keyed(seed=11, epoch=3, index=5, view=2)
    assert py_random.getrandbits(64) == random.Random(first << 64 | second).getrandbits(64)
    np.testing.assert_array_equal(generator.random(9), oracle.random(9))


def test_keying_forgets_what_was_drawn_before() -> None:
    oracle = np.random.Generator(np.random.Philox(key=[0, 0], counter=[0, 0, 1, 0]))
    first, second = oracle.integers(1 << 64, size=2, dtype=np.uint64).tolist()
    generator, py_random = _keyed(index=1)
    generator.integers(9, dtype=np.uint32)  # leaves half a word behind
    generator.random(3)  # leaves part of a block behind
    py_random.gauss()  # leaves its twin behind
    key(generator, py_random, seed=0, epoch=0, index=1, view=0)
    for _ in range(5):
        assert generator.integers(1 << 31, dtype=np.uint32) == oracle.integers(1 << 31, dtype=np.uint32)
    assert py_random.gauss() == random.Random(first << 64 | second).gauss()


def _first(name: str, count: int = 4000) -> NDArray[np.float64]:
    pairs = [_keyed(**{name: number}) for number in range(count)]
    return np.array([(generator.random(), py_random.random()) for generator, py_random in pairs]).T  # (2, count)


@pytest.mark.parametrize("name", ["seed", "epoch", "index", "view"])
def test_neighbouring_keys_are_uniform_and_uncorrelated(name: str) -> None:
    for values in _first(name):
        counts, _ = np.histogram(values, bins=20, range=(0, 1))
        assert ((counts - 200) ** 2 / 200).sum() < 45.3  # chi-square, 19 degrees of freedom, p = 0.0006
        for lag in (1, 2, 64):
            assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 0.06  # 3.8 standard deviations


def test_the_two_generators_and_the_four_numbers_do_not_mirror_each_other() -> None:
    streams = np.concatenate([_first(name) for name in ("seed", "epoch", "index", "view")])[:, 1:]  # (8, count)
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 0.07


def _nested() -> A.Compose:
    noisy = A.Sequential([A.GaussNoise(p=1), A.OneOf([A.Blur(p=1), A.ElasticTransform(p=1)], p=1)], p=1)
    dropout = A.CoarseDropout(fill="random", p=1)  # makes a generator of its own from a drawn seed
    return A.Compose([A.SomeOf([noisy, dropout, A.ISONoise(p=1)], n=2), A.RandomOrder([A.ShotNoise(p=1), noisy], n=2)])


def _image(compose: A.Compose, index: int, view: int = 0) -> NDArray[np.uint8]:
    return draw(compose, {"image": IMAGE}, seed=1, epoch=2, index=index, view=view)["image"]


def test_nested_transforms_follow_the_key_whatever_was_drawn_before() -> None:
    compose, other = _nested(), pickle.loads(pickle.dumps(_nested()))
    forwards = [_image(compose, index) for index in range(12)]
    backwards = [_image(other, index) for index in reversed(range(12))][::-1]
    np.testing.assert_array_equal(forwards, backwards)
    assert len(np.unique(np.reshape(forwards, (12, -1)), axis=0)) == 12


def test_a_transform_shared_by_two_composes_or_reseeded_by_hand_follows_the_key() -> None:
    shared = A.GaussNoise(p=1)
    first, second = A.Compose([shared]), A.Compose([shared])
    expected = _image(first, 3)
    _image(second, 4)
    shared.set_random_seed(0)
    np.testing.assert_array_equal(_image(first, 3), expected)


def test_views_of_one_sample_differ() -> None:
    compose = _nested()
    assert not np.array_equal(_image(compose, 0), _image(compose, 0, view=1))


def test_other_entries_of_the_sample_pass_through() -> None:
    drawn = draw(_nested(), {"image": IMAGE, "label": 4, "index": 9}, seed=0, epoch=0, index=9)
    assert (drawn["label"], drawn["index"]) == (4, 9)


@pytest.mark.parametrize("numbers", [{"seed": -1}, {"index": 1 << 64}, {"epoch": -3}, {"view": 1 << 70}])
def test_a_number_that_does_not_fit_is_named(numbers: dict[str, int]) -> None:
    ((name, value),) = numbers.items()
    with pytest.raises(UsageError, match=f"{name}={value}"):
        _keyed(**numbers)


def test_boxes_are_refused_by_a_transform_that_would_leave_them_behind() -> None:
    sample: Sample = {"image": IMAGE, "bboxes": np.array([[2, 2, 9, 9]], np.float32), "labels": np.array([1])}
    with pytest.raises(UsageError, match="boxes=True"):
        draw(crop_and_colour(size=8, mirror=False), sample, seed=0, epoch=0, index=0)
