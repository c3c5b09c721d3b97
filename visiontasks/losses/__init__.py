"""Pure functions of raw predictions and targets."""

from visiontasks.losses.classification import binary_cross_entropy, cross_entropy
from visiontasks.losses.segmentation import Term, dice, focal, lovasz, ohem, pixel_cross_entropy

__all__ = ["Term", "binary_cross_entropy", "cross_entropy", "dice", "focal", "lovasz", "ohem", "pixel_cross_entropy"]
