"""How close generated images are to real ones, and how diverse they are, told from the features of both."""

from typing import NamedTuple

import torch
from torch import Tensor

from visiontasks.contracts import UsageError
from visiontasks.layers.embeddings import unit

BLOCK = 2**24  # distances that are held at once


def frechet_distance(real: Tensor, generated: Tensor) -> Tensor:
    """The squared Frechet distance between two normal distributions fitted to features: FID, 0 is best.

    Heusel et al. 2017, arXiv 1706.08500. The trace of the root of the covariances' product is the sum of the roots of
    the symmetric L' S L's eigenvalues, where one covariance is L L' and S the other; fewer images than dimensions, and
    dimensions that never change, do no harm.
    Shapes: (N, D) and (M, D), 2 images or more each; returns a float64 scalar.
    """
    first, second = _centred(real), _centred(generated)
    few, many = sorted((first.rows, second.rows), key=len)
    means = (first.mean - second.mean).square().sum()
    root = _root(few)  # (D, R)
    products = many @ root  # (M, R)
    shared = torch.linalg.eigvalsh(products.T @ products).clamp(min=0).sqrt().sum()
    distance: Tensor = means + few.square().sum() + many.square().sum() - 2 * shared
    return distance


class _Centred(NamedTuple):
    """Features as their mean and as rows whose products are the covariance."""

    mean: Tensor  # (D,)
    rows: Tensor  # (N, D): rows' rows = covariance


def _centred(features: Tensor) -> _Centred:
    _check_several(features)
    rows = features.double()
    mean = rows.mean(dim=0)
    return _Centred(mean, (rows - mean) / (len(rows) - 1) ** 0.5)


def _root(rows: Tensor) -> Tensor:
    """Some L, (D, R), for which L L' is the covariance rows' rows; R is the smaller of N and D."""
    if len(rows) <= rows.shape[1]:
        return rows.T
    covariance = rows.T @ rows
    lower, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return lower  # type: ignore[no-any-return]
    values, vectors = torch.linalg.eigh(covariance)  # some combination of dimensions never changes
    return vectors * values.clamp(min=0).sqrt()  # type: ignore[no-any-return]


def kernel_distance(
    real: Tensor, generated: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """The squared maximum mean discrepancy under the kernel (x'y / D + 1)^3, without bias: KID, 0 is best.

    Binkowski et al. 2018, arXiv 1801.01401: mean and standard deviation over pairs of subsets drawn by the seed, of
    subset_size images, or of all where there are fewer. Shapes: (N, D) and (M, D), 2 images or more each; returns two
    float64 scalars.
    """
    _check_several(real)
    _check_several(generated)
    size = min(subset_size, len(real), len(generated))
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        [rows.double()[torch.randperm(len(rows), generator=generator)[:size]] for rows in (real, generated)]
        for _ in range(1 if size == len(real) == len(generated) else subsets)
    ]
    values = torch.stack([_discrepancy(*pair) for pair in drawn])
    return values.mean(), values.std(correction=0)


def _discrepancy(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased estimate for equally many rows (n, D) of both."""
    n = len(first)
    within = [kernel.sum() - kernel.trace() for kernel in (_cubic(first, first), _cubic(second, second))]
    return (within[0] + within[1]) / (n * (n - 1)) - 2 * _cubic(first, second).mean()


def _cubic(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.T / first.shape[1] + 1) ** 3


def inception_score(logits: Tensor, *, splits: int = 10) -> Tensor:
    """How sure a classifier is of each image and how evenly of all classes, from 1 to K: the more the better.

    Salimans et al. 2016, arXiv 1606.03498: the exponential of the mean divergence of an image's class probabilities
    from those of its split, meant over splits. A split takes every `splits`-th image, so that an order by classes does
    no harm. Shapes: (N, K); returns a float64 scalar.
    """
    probabilities = logits.double().softmax(dim=1)  # (N, K)
    parts = [probabilities[first::splits] for first in range(min(splits, len(probabilities)))]
    return torch.stack([_divergence(part).exp() for part in parts]).mean()


def _divergence(probabilities: Tensor) -> Tensor:
    marginal = probabilities.mean(dim=0)  # (K,)
    entropies = torch.special.entr(probabilities).sum(dim=1)  # (N,)
    divergence: Tensor = torch.special.entr(marginal).sum() - entropies.mean()
    return divergence


def neighbourhoods(real: Tensor, generated: Tensor, *, neighbours: int = 5) -> dict[str, Tensor]:
    """How much two sets of features lie in each other's neighbourhoods: precision, recall, density and coverage.

    An image's neighbourhood is the ball up to its `neighbours`-th nearest image of its own set. precision is the share
    of generated images in a real one's, recall the share of real images in a generated one's (Kynkaanniemi et al. 2019,
    arXiv 1904.06991); density counts the real neighbourhoods around a generated image over `neighbours`, and coverage
    is the share of real neighbourhoods with a generated image (Naeem et al. 2020, arXiv 2002.09797).
    Shapes: (N, D) and (M, D), 2 images or more each; returns float64 scalars. Memory does not grow with N x M.
    """
    real, generated = real.double(), generated.double()
    real_radii, generated_radii = (radii(rows, neighbours=neighbours) for rows in (real, generated))
    surrounding, recalled = [], torch.zeros_like(real_radii, dtype=torch.bool)
    covered = recalled.clone()
    size = max(1, BLOCK // len(real))
    for rows, reach in zip(torch.split(generated, size), torch.split(generated_radii, size), strict=True):
        distances = _distances(rows, real)  # (m, N)
        inside = distances <= real_radii
        surrounding.append(inside.sum(dim=1))
        covered |= inside.any(dim=0)
        recalled |= (distances <= reach[:, None]).any(dim=0)
    around = torch.cat(surrounding).double()  # (M,)
    return {
        "precision": (around > 0).double().mean(),
        "recall": recalled.double().mean(),
        "density": around.mean() / min(neighbours, len(real) - 1),
        "coverage": covered.double().mean(),
    }


def radii(features: Tensor, *, neighbours: int) -> Tensor:
    """The distance of each row to its `neighbours`-th nearest other one, or to the last where there are fewer.

    Shapes: (N, D), 2 rows or more; returns (N,).
    """
    _check_several(features)
    nearest = min(neighbours, len(features) - 1)
    found = []
    for first in range(0, len(features), size := max(1, BLOCK // len(features))):
        distances = _distances(features[first : first + size], features)  # (n, N)
        own = torch.arange(len(distances), device=distances.device)
        distances[own, first + own] = 0  # and not what is left of rounding
        found.append(distances.kthvalue(nearest + 1, dim=1).values)
    return torch.cat(found)


def nearest(queries: Tensor, bank: Tensor, *, count: int = 1) -> tuple[Tensor, Tensor]:
    """The distances and the rows of the `count` nearest of a bank to each query, nearest first.

    Shapes: (N, D) and (M, D), M of `count` or more; returns float64 (N, count) and int64 (N, count).
    """
    blocks = torch.split(queries.double(), max(1, BLOCK // len(bank)))
    found = [_distances(block, bank.double()).topk(count, dim=1, largest=False) for block in blocks]
    return torch.cat([values for values, _ in found]), torch.cat([rows for _, rows in found])


def _distances(first: Tensor, second: Tensor) -> Tensor:
    """Euclidean distances between rows, (N, M)."""
    return torch.cdist(first, second, compute_mode="use_mm_for_euclid_dist")


def effective_number(features: Tensor) -> Tensor:
    """How many different directions features have, from 1 to the smaller of N and D: the Vendi score under the cosine.

    Friedman and Dieng 2022, arXiv 2210.02410. Shapes: (N, D); returns a float64 scalar.
    """
    rows = unit(features.double())
    products = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    shares = torch.linalg.eigvalsh(products / len(rows)).clamp(min=0)
    number: Tensor = torch.special.entr(shares).sum().exp()
    return number


def _check_several(features: Tensor) -> None:
    if len(features) < 2:
        raise UsageError(f"{len(features)} image has no distribution to be compared: measure 2 or more.")
