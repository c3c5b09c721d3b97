"""Losses that keep the dimensions of embeddings from repeating each other, over the global batch.

Both compute in float32 or better, whatever autocast says, and return a scalar that is the same on each process, whose
gradient, averaged over processes, is that of the whole batch. Every process holds equally many rows.
"""

import torch.nn.functional as F
from torch import Tensor

from visiontasks.errors import UsageError
from visiontasks.layers.distributed import gather_pair
from visiontasks.layers.embeddings import in_full_precision


@in_full_precision
def barlow_twins(first: Tensor, second: Tensor, *, redundancy: float = 5e-3) -> Tensor:
    """The squared distance of the two views' cross-correlation from the identity, off-diagonal entries weighed less.

    Zbontar et al. 2021, Barlow Twins, arXiv 2103.03230; 1e-5 is added to each variance, as in the authors' code.
    Shapes: first and second (B, D), two views of the same images. Raises UsageError for one image over all processes.
    """
    first, second = (_standardised(rows) for rows in _images(first, second))  # (N, D)
    matches = (first * second).mean(dim=0)  # (D,)
    return (1 - matches).square().sum() + redundancy * _off_diagonal(first, second) / len(first) ** 2


@in_full_precision
def vicreg(
    first: Tensor, second: Tensor, *, invariance: float = 25.0, variance: float = 25.0, covariance: float = 1.0
) -> Tensor:
    """The weighted sum of the views' squared distance, their lack of spread and their covariances.

    Bardes, Ponce and LeCun 2021, VICReg, arXiv 2105.04906, with the means of the authors' code: the distance is a mean
    over dimensions too, and the lack of spread one over the two views. Shapes: first and second (B, D), two views of
    the same images. Raises UsageError for one image over all processes.
    """
    first, second = _images(first, second)  # (N, D)
    spread = (_missing_spread(first) + _missing_spread(second)) / 2
    shared = _covariance(first) + _covariance(second)
    return invariance * F.mse_loss(first, second) + variance * spread + covariance * shared


def _images(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    pair = gather_pair(first, second)
    if len(pair[0]) < 2:
        raise UsageError("A batch of 1 image has no correlations: type data.batch_size=2 or more.")
    return pair


def _standardised(rows: Tensor) -> Tensor:
    return F.batch_norm(rows, None, None, training=True, eps=1e-5)


def _missing_spread(rows: Tensor) -> Tensor:
    return F.relu(1 - (rows.var(dim=0) + 1e-4).sqrt()).mean()


def _covariance(rows: Tensor) -> Tensor:
    centred = rows - rows.mean(dim=0)
    return _off_diagonal(centred, centred) / (len(rows) - 1) ** 2 / rows.shape[1]


def _off_diagonal(first: Tensor, second: Tensor) -> Tensor:
    """The sum of squares of first^T second without its diagonal, through (N, N) where that is smaller than (D, D)."""
    if len(first) < first.shape[1]:
        everything = ((first @ first.T) * (second @ second.T)).sum()
        return everything - (first * second).sum(dim=0).square().sum()
    return (first.T @ second).fill_diagonal_(0).square().sum()
