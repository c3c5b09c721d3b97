"""Random draws that depend on the seed, the epoch and the sample, and on nothing else."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, cast

import numpy as np

from visiontasks.contracts import Sample, UsageError

if TYPE_CHECKING:
    import albumentations as A

_WORD = 1 << 64
_EMPTY = np.zeros(4, dtype=np.uint64)


def key(
    generator: np.random.Generator, py_random: random.Random, *, seed: int, epoch: int, index: int, view: int
) -> None:
    """Move both generators to the start of the stream that belongs to these four numbers and to no others.

    The numpy generator must stand on the counter-based Philox (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"): its key becomes (seed, view) and its counter (epoch, index), so that the streams of one seed lie 2**128
    blocks apart. The other one is seeded with the first 128 bits of that stream.
    Raises UsageError where a number is negative or does not fit into 64 bits.
    """
    if not (0 <= seed < _WORD and 0 <= epoch < _WORD and 0 <= index < _WORD and 0 <= view < _WORD):
        raise UsageError(f"{seed=}, {epoch=}, {index=}, {view=} cannot key random numbers: each must be 0 to 2**64 - 1")
    counter = np.array([0, 0, index, epoch], dtype=np.uint64)  # the least word first
    generator.bit_generator.state = {
        "bit_generator": "Philox",
        "state": {"counter": counter, "key": np.array([seed, view], dtype=np.uint64)},
        "buffer": _EMPTY,
        "buffer_pos": 4,  # nothing left of the block drawn before
        "has_uint32": 0,
        "uinteger": 0,
    }
    word = generator.bit_generator.random_raw
    py_random.seed(word() << 64 | word())


def draw(compose: A.Compose, sample: Sample, *, seed: int, epoch: int, index: int, view: int = 0) -> Sample:
    """Apply the transform with randomness that is a function of (seed, epoch, index, view) alone.

    albumentations 2.0.8 repeats one stream in every worker and every epoch, whatever is seeded; re-keying one pair of
    generators for the whole tree of transforms makes any number of workers, persistent or not, agree.
    `view` tells apart several draws of one sample in one epoch.
    Raises UsageError where the sample has boxes and the transform was made without them.
    """
    if "bboxes" in sample and not getattr(compose, "moves_boxes", "bboxes" in compose.processors):
        raise UsageError("The sample has boxes and this transform would not move them: make it with boxes=True")
    generator = compose.random_generator
    if not isinstance(generator.bit_generator, np.random.Philox):
        generator = np.random.Generator(np.random.Philox())
    key(generator, compose.py_random, seed=seed, epoch=epoch, index=index, view=view)
    compose.set_random_state(generator, compose.py_random)
    return cast(Sample, compose(**sample))
