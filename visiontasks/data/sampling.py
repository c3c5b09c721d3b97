"""Which samples, in which order, on which process: a function of (seed, epoch) and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence, Sized

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from visiontasks.contracts import UsageError

Order = Callable[[int, int], NDArray[np.int64]]  # of (seed, epoch): a permutation of all positions


class EpochSampler(DistributedSampler[tuple[int, int]]):
    """Yields (epoch, index), so that each worker knows the epoch of each sample.

    In training the order is a permutation drawn from (seed, epoch), `order`'s where it is given, cut to whole batches
    of `batch_size * num_replicas`; rank r takes every num_replicas-th element from r on, so that batch k of all ranks
    together is batch k of one process with the global batch size. In evaluation (`shuffle=False`) every sample occurs
    exactly once, in order, with epoch 0 and without padding: ranks may differ by one sample.
    A DistributedSampler, so that Lightning does not put its padding one in its place.
    Raises UsageError where training data are fewer than one global batch.
    """

    def __init__(
        self,
        data: Sized,
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        num_replicas: int = 1,
        order: Order | None = None,
    ) -> None:
        super().__init__(data, num_replicas=num_replicas, rank=rank, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        self.size = len(data)
        self.batch_size = batch_size
        self.order = order
        self.done = (0, 0)  # an epoch, and how many of its batches are behind us
        if shuffle and self.size < batch_size * num_replicas:
            raise UsageError(too_large_a_batch(batch_size, num_replicas, self.size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch if self.shuffle else 0
        skipped = self.done[1] * self.batch_size if self.done[0] == self.epoch else 0
        return ((epoch, int(index)) for index in self._own(self._order())[skipped:])

    def __len__(self) -> int:
        """Samples of this rank in a whole epoch, those skipped by `resume` included."""
        return len(range(self.rank, self._total(), self.num_replicas))

    def resume(self, *, epoch: int, batches: int) -> None:
        """Leave out the first batches of one epoch, which an interrupted run has already seen."""
        self.done = (epoch, batches)

    def _order(self) -> NDArray[np.int64]:
        if not self.shuffle:
            return np.arange(self.size)
        if self.order is not None:
            return self.order(self.seed, self.epoch)
        return np.random.default_rng([self.seed, self.epoch]).permutation(self.size)

    def _own(self, order: NDArray[np.int64]) -> NDArray[np.int64]:
        return order[self.rank : self._total() : self.num_replicas]

    def _total(self) -> int:
        together = self.batch_size * self.num_replicas
        return self.size // together * together if self.shuffle else self.size


def chunk_order(sizes: Sequence[int], *, seed: int, epoch: int, window: int, lanes: int) -> NDArray[np.int64]:
    """A permutation drawn from (seed, epoch) that reads few chunks at a time.

    Chunks are shuffled, laid end to end and cut into `lanes` equal parts, samples are shuffled within runs of about
    `window` chunks of a lane, and the lanes take turns: position p is lane p % lanes. Where the number of processes
    divides `lanes`, processes therefore read different chunks, but for the one that a cut goes through, and the order
    is the same for any number. Shapes: sizes (C,) samples of each chunk; returns (N,), their sum.
    """
    generator = np.random.default_rng([seed, epoch])
    ends = np.cumsum(sizes)
    chunks = [np.arange(ends[chunk] - sizes[chunk], ends[chunk]) for chunk in generator.permutation(len(sizes))]
    sequence = np.concatenate([np.empty(0, np.int64), *chunks])
    length = len(sequence) // lanes
    parts = sequence[: length * lanes].reshape(lanes, length)
    run = max(1, round(window * len(sequence) / max(1, len(sizes))))
    for start in range(0, length, run):
        parts[:, start : start + run] = generator.permuted(parts[:, start : start + run], axis=1)
    return np.concatenate([parts.T.reshape(-1), generator.permutation(sequence[length * lanes :])])


def too_large_a_batch(batch_size: int, num_replicas: int, size: int) -> str:
    """The sentence for a batch that the training data cannot fill."""
    many = f" on each of {num_replicas} processes" if num_replicas > 1 else ""
    fits = f"type data.batch_size={size // num_replicas} or less" if size >= num_replicas else "use fewer processes"
    return f"data.batch_size={batch_size}{many} does not fit into {size} training images: {fits}"


def cut(
    labels: NDArray[np.int64],
    *,
    val_fraction: float,
    test_fraction: float = 0.0,
    given: Container[str] = (),
    seed: int,
) -> dict[str, NDArray[np.int64]]:
    """Positions of "test", "val" and "train", the rest: fractions of every label, by the seed, test being cut first.

    What is among `given` has files of its own and is not cut; nor is test where its fraction is 0.
    Shapes: labels (N,), as for `held_out`. Raises UsageError where a fraction is not between 0 and 1, or nothing would
    be left.
    """
    fractions = {} if "test" in given or test_fraction == 0 else {"test": test_fraction}
    fractions |= {} if "val" in given else {"val": val_fraction}
    if sum(fractions.values()) >= 1:
        shares = ", ".join(f"data.{name}_fraction={value}" for name, value in fractions.items())
        raise UsageError(f"{shares} leave nothing to train on: give fractions that add up to less than 1")
    parts: dict[str, NDArray[np.int64]] = {}
    rest, left = np.arange(len(labels)), 1.0
    for name, fraction in fractions.items():
        kept, held = held_out(labels[rest], fraction=fraction / left, seed=seed)
        parts[name] = rest[held]
        rest, left = rest[kept], left - fraction
    return parts | {"train": rest}


def held_out(
    labels: Sequence[int] | NDArray[np.int64], *, fraction: float, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split positions into (kept, held out), with the same fraction of every label held out, by the seed alone.

    Of each label round(fraction * count) are held out, at least one and never all, where it has two or more.
    Shapes: labels (N,); returns two sorted arrays of positions that together are 0 to N - 1. Without labels give zeros.
    Raises UsageError where fraction is not between 0 and 1, both excluded.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"A fraction of {fraction} of the images cannot be held out: give one between 0 and 1, like 0.1"
        )
    given = np.asarray(labels)
    generator = np.random.default_rng([seed, len(given)])
    parts = [_some(np.flatnonzero(given == label), fraction, generator) for label in np.unique(given)]
    held = np.sort(np.concatenate([np.empty(0, np.int64), *parts]))
    return np.setdiff1d(np.arange(len(given)), held), held


def _some(positions: NDArray[np.int64], fraction: float, generator: np.random.Generator) -> NDArray[np.int64]:
    count = min(max(1, round(fraction * len(positions))), len(positions) - 1)
    return generator.permutation(positions)[:count]
