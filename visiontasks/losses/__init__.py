"""Pure functions of raw predictions and targets."""

from visiontasks.losses.classification import binary_cross_entropy, cross_entropy

__all__ = ["binary_cross_entropy", "cross_entropy"]
