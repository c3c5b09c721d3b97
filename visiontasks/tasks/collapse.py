"""Gauges of embeddings that show a collapse: to a point, to few dimensions, or unevenly over the sphere."""

import math

import torch
from torch import Tensor

from visiontasks.layers.distributed import gather_pair
from visiontasks.layers.embeddings import unit


@torch.no_grad()
def collapse_gauges(first: Tensor, second: Tensor) -> dict[str, Tensor]:
    """All gauges of the embeddings of two views over the global batch, by name, the same on each process.

    Shapes: both (B, D), equally many on each process.
    """
    first, second = gather_pair(first.detach(), second.detach())
    return {
        "feature_std": feature_std(first),
        "effective_rank": effective_rank(first),
        "alignment": alignment(first, second),
        "uniformity": uniformity(first),
    }


def feature_std(embeddings: Tensor) -> Tensor:
    """The standard deviation of a dimension of unit vectors over that of an even spread: 1 is best, 0 a point.

    Chen and He 2020, SimSiam, arXiv 2011.10566, figure 2, times the root of D. Shapes: (N, D); returns a scalar.
    """
    directions = unit(embeddings.double())
    return directions.std(dim=0, correction=0).mean() * math.sqrt(embeddings.shape[1])


def effective_rank(embeddings: Tensor) -> Tensor:
    """The exponential of the entropy of the singular values, from 1 to the smaller of N and D.

    Garrido et al. 2022, RankMe, arXiv 2210.02885. Shapes: (N, D); returns a scalar.
    """
    rows = embeddings.double()
    products = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    values: Tensor = torch.linalg.eigvalsh(products).clamp(min=0).sqrt()  # (min(N, D),) singular values
    shares = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return (-shares * shares.log()).sum().exp()


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """The mean squared distance between the directions of two views: 0 is best.

    Wang and Isola 2020, arXiv 2005.10242. Shapes: both (N, D); returns a scalar.
    """
    return (unit(first.double()) - unit(second.double())).square().sum(dim=1).mean()


def uniformity(embeddings: Tensor) -> Tensor:
    """The logarithm of the mean of exp(-2 d^2) over pairs of directions at a distance d: 0 is a point, -4 about even.

    Wang and Isola 2020, arXiv 2005.10242. Shapes: (N, D), N of 2 or more; returns a scalar.
    """
    return (-2 * torch.pdist(unit(embeddings.double())).square()).exp().mean().log()
