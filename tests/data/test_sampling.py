"""Order as a function of (seed, epoch), sliced over ranks, and the split by label."""

import functools
import operator

import numpy as np
import pytest

from visiontasks.contracts import UsageError
from visiontasks.data.sampling import EpochSampler, held_out


def sampler(size: int, *, epoch: int = 0, **options: int) -> EpochSampler:
    made = EpochSampler(range(size), **{"batch_size": 4, "shuffle": True, **options})  # type: ignore[arg-type]
    made.set_epoch(epoch)
    return made


def batches(keys: list[tuple[int, int]], size: int) -> list[list[int]]:
    return [[index for _, index in keys[start : start + size]] for start in range(0, len(keys), size)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("epoch", [0, 3])
def test_ranks_together_see_the_global_batches(world: int, epoch: int) -> None:
    whole = batches(list(sampler(50, epoch=epoch, batch_size=4 * world)), 4 * world)
    ranks = [batches(list(sampler(50, epoch=epoch, rank=rank, num_replicas=world)), 4) for rank in range(world)]
    together = [sorted(functools.reduce(operator.iadd, parts, [])) for parts in zip(*ranks, strict=True)]
    assert together == [sorted(batch) for batch in whole]
    assert len(whole) == 50 // (4 * world)


def test_orders_differ_by_epoch_and_seed_and_nothing_else() -> None:
    orders = {(seed, epoch): tuple(sampler(40, epoch=epoch, seed=seed)) for seed in range(3) for epoch in range(3)}
    assert len({tuple(index for _, index in order) for order in orders.values()}) == 9
    assert orders[1, 2] == tuple(sampler(40, epoch=2, seed=1))
    assert {epoch for epoch, _ in orders[1, 2]} == {2}


def test_an_epoch_holds_no_sample_twice() -> None:
    indices = [index for _, index in sampler(43)]
    assert len(indices) == len(sampler(43)) == len(set(indices)) == 40


@pytest.mark.parametrize("size", [1, 2, 3, 5, 21, 22])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_sees_every_sample_once(size: int, world: int) -> None:
    samplers = [sampler(size, epoch=5, shuffle=False, rank=rank, num_replicas=world) for rank in range(world)]
    keys = [key for each in samplers for key in each]
    assert sorted(keys) == [(0, index) for index in range(size)]
    assert [len(each) for each in samplers] == [len(list(each)) for each in samplers]


def test_going_on_in_the_middle_of_an_epoch() -> None:
    resumed = sampler(40, epoch=2)
    resumed.resume(epoch=2, batches=3)
    assert list(resumed) == list(sampler(40, epoch=2))[12:]
    assert len(resumed) == 40  # Lightning counts the batches that were done
    resumed.set_epoch(3)
    assert list(resumed) == list(sampler(40, epoch=3))


def test_a_batch_that_the_data_cannot_fill() -> None:
    with pytest.raises(UsageError, match=r"data.batch_size=4 does not fit into 3 .* data.batch_size=3"):
        sampler(3)
    with pytest.raises(UsageError, match=r"2 processes .* type data.batch_size=3"):
        sampler(7, num_replicas=2)


def test_every_class_is_held_out_alike() -> None:
    labels = np.repeat([0, 1, 2, 3], [100, 50, 2, 1])
    kept, held = held_out(labels, fraction=0.1, seed=0)
    np.testing.assert_array_equal(np.sort(np.concatenate([kept, held])), np.arange(153))
    assert np.bincount(labels[held], minlength=4).tolist() == [10, 5, 1, 0]
    np.testing.assert_array_equal(held, held_out(labels, fraction=0.1, seed=0)[1])
    assert not np.array_equal(held, held_out(labels, fraction=0.1, seed=1)[1])


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_fractions_out_of_range(fraction: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        held_out([0, 1], fraction=fraction, seed=0)
