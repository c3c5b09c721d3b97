"""Pure functions of raw predictions and targets."""

from visiontasks.losses.classification import binary_cross_entropy, cross_entropy
from visiontasks.losses.clustering import Prototypes, sinkhorn, swav
from visiontasks.losses.contrastive import info_nce, nt_xent, symmetric_info_nce
from visiontasks.losses.distillation import Centre, dino, negative_cosine
from visiontasks.losses.redundancy import barlow_twins, vicreg
from visiontasks.losses.segmentation import Term, dice, focal, lovasz, ohem, pixel_cross_entropy

__all__ = [
    "Centre",
    "Prototypes",
    "Term",
    "barlow_twins",
    "binary_cross_entropy",
    "cross_entropy",
    "dice",
    "dino",
    "focal",
    "info_nce",
    "lovasz",
    "negative_cosine",
    "nt_xent",
    "ohem",
    "pixel_cross_entropy",
    "sinkhorn",
    "swav",
    "symmetric_info_nce",
    "vicreg",
]
