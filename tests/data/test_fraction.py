"""A share of the training labels: of every class alike, repeated, nested, a function of the seed."""

import numpy as np
import pytest

from visiontasks.contracts import UsageError
from visiontasks.data import DigitScenes
from visiontasks.data.fraction import share_of
from visiontasks.data.masks import IndexMasks, MaskFiles, Pair
from visiontasks.data.source import Arrays, Source, Subset

LABELS = np.repeat(np.arange(4), [100, 50, 30, 20])


def arrays() -> Arrays:
    return Arrays(np.zeros((200, 4, 4), np.uint8), LABELS, title="x")


def positions(source: Source) -> list[int]:
    return [int(source.name(index).rpartition("/")[2]) for index in range(len(source))]


@pytest.mark.parametrize(("fraction", "counts"), [(0.1, [10, 5, 3, 2]), (0.01, [1, 1, 1, 1]), (0.5, [50, 25, 15, 10])])
def test_every_class_keeps_its_share(fraction: float, counts: list[int]) -> None:
    share = share_of(arrays(), fraction, seed=0, labelled=True)
    found = positions(share)
    assert len(found) == 200
    assert np.bincount(LABELS[sorted(set(found))]).tolist() == counts
    times = np.bincount(found)[sorted(set(found))]
    assert times.max() - times.min() <= 1
    assert all(share[index]["label"] == LABELS[found[index]] for index in range(0, 200, 7))


def test_smaller_shares_lie_in_larger_ones_and_another_seed_draws_others() -> None:
    small, large, other = (
        set(positions(share_of(arrays(), fraction, seed=seed, labelled=True)))
        for fraction, seed in ((0.1, 0), (0.5, 0), (0.1, 1))
    )
    assert small < large
    assert small != other


def test_the_labels_of_a_part_are_those_of_the_part() -> None:
    part = Subset(arrays(), np.arange(100, 200))
    found = set(positions(share_of(part, 0.1, seed=0, labelled=True)))
    assert np.bincount(LABELS[sorted(found)], minlength=4).tolist() == [0, 5, 3, 2]


def test_without_labels_the_share_is_of_all() -> None:
    assert len(set(positions(share_of(arrays(), 0.1, seed=0, labelled=False)))) == 20


def test_masks_stay_files_that_can_be_looked_at() -> None:
    whole = MaskFiles([Pair(f"{index}.jpg", f"{index}.png") for index in range(50)], IndexMasks([0, 1]))
    share = share_of(whole, 0.1, seed=0, labelled=False)
    assert isinstance(share, MaskFiles)
    assert (len(share), len(set(share.pairs))) == (50, 5)
    assert set(share.pairs) < set(whole.pairs)


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.1])
def test_what_is_no_share_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match=rf"data\.fraction={fraction}"):
        share_of(arrays(), fraction, seed=0, labelled=True)


def test_a_data_module_learns_from_its_share_alone() -> None:
    data = DigitScenes(digits=(1, 1), image_size=32, train_size=40, val_size=8, batch_size=8, fraction=0.25)
    data.select(frozenset({"label"}))
    data.setup()
    whole = DigitScenes(digits=(1, 1), image_size=32, train_size=40, val_size=8, batch_size=8)
    whole.setup()
    assert data.sizes() == whole.sizes()
    seen = {int(label) for batch in data.train_dataloader() for label in batch["label"]}
    source, all_of = data._sources["train"], whole._sources["train"]
    names = {source.name(index) for index in range(40)}
    assert 10 <= len(names) <= 14
    assert names < {all_of.name(index) for index in range(40)}
    assert seen == {int(all_of[index]["label"]) for index in range(40)}
