"""A share of the training labels, for studies of how much data a task needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import UsageError
from visiontasks.data.masks import MaskFiles
from visiontasks.data.sampling import held_out
from visiontasks.data.source import Source, Subset


def share_of(source: Source, fraction: float, *, seed: int, labelled: bool) -> Source:
    """A fraction of the samples, of every class alike, repeated until they are as many as before.

    An epoch keeps its number of batches, so that runs on different fractions take the same steps; each repetition is
    augmented anew. Which samples they are is a function of the seed, and smaller fractions lie within larger ones.
    Where samples have no class, or several, they are drawn without regard to it.
    Raises UsageError where fraction is not above 0 and at most 1.
    """
    if fraction == 1:
        return source
    if not 0 < fraction < 1:
        raise UsageError(f"data.fraction={fraction} is no share of the training images: give 1, or less, like 0.1")
    _, kept = held_out(_classes(source, labelled=labelled), fraction=fraction, seed=seed)
    positions = np.resize(kept, len(source))  # (N,)
    if isinstance(source, MaskFiles):
        return MaskFiles([source.pairs[position] for position in positions.tolist()], source.read)
    return Subset(source, positions)


def _classes(source: Any, *, labelled: bool) -> NDArray[np.int64]:
    """The class of each sample, zeros where it is not one number; read from the samples where the source lists none."""
    if not labelled:
        return np.zeros(len(source), np.int64)
    if isinstance(source, Subset):
        return _classes(source.source, labelled=True)[source.positions]
    labels = getattr(source, "labels", None)
    given = np.asarray([source[index]["label"] for index in range(len(source))] if labels is None else labels)
    return given.astype(np.int64) if given.ndim == 1 else np.zeros(len(source), np.int64)
