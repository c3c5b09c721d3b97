"""Contrastive losses of embeddings: each image against the other images of the global batch, or of a queue.

All compute in float32 or better, whatever autocast says, and return a mean whose gradient, averaged over processes, is
that of the whole batch. Embeddings of any length are scaled to 1. Every process holds equally many rows.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visiontasks.layers.distributed import gather_pair, rank
from visiontasks.layers.embeddings import in_full_precision, sharpen, unit

CHUNK = 2**20  # similarities that are held at a time


@in_full_precision
def nt_xent(first: Tensor, second: Tensor, *, temperature: float = 0.1) -> Tensor:
    """The cross-entropy of finding each view's partner among all other views of the global batch.

    Chen et al. 2020, SimCLR, arXiv 2002.05709. Shapes: first and second (B, D), two views of the same images; returns
    a scalar, the same on each process. Raises UsageError where the temperature is not more than 0.
    """
    views = unit(torch.cat(gather_pair(first, second)))  # (2N, D)
    apply: Callable[..., Tensor] = _NTXent.apply
    return apply(views, sharpen(views.detach(), temperature))


class _NTXent(torch.autograd.Function):
    """The loss of unit vectors and its gradient in one pass over chunks of rows.

    With P the softmax of the similarities without their diagonal, the gradient of the sum of losses with respect to
    the rows Z is ((P + P^T) Z - 2 Z[partner]) / temperature; `sharp` is Z / temperature.
    """

    @staticmethod
    def forward(ctx: Any, views: Tensor, sharp: Tensor) -> Tensor:
        partners = sharp.roll(len(views) // 2, 0)  # (2N, D)
        slopes = -2 * partners  # (2N, D)
        similar = (views * partners).sum(dim=1)  # (2N,)
        total = views.new_zeros(())
        step = max(1, CHUNK // len(views))
        for start in range(0, len(views), step):
            rows = sharp[start : start + step]  # (C, D)
            logits = rows @ views.T  # (C, 2N)
            logits.diagonal(start).fill_(-torch.inf)
            peaks = logits.amax(dim=1, keepdim=True)  # (C, 1)
            weights = logits.sub_(peaks).exp_()  # (C, 2N) chances times sums
            sums = weights.sum(dim=1, keepdim=True)  # (C, 1)
            total += (peaks + sums.log() - similar[start : start + step, None]).sum()
            if ctx.needs_input_grad[0]:
                slopes[start : start + step] += weights @ sharp / sums
                slopes.addmm_(weights.T, rows / sums)
        ctx.save_for_backward(slopes / len(views))
        return total / len(views)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (slopes,) = ctx.saved_tensors
        return gradient * slopes, None


@in_full_precision
def info_nce(queries: Tensor, keys: Tensor, negatives: Tensor, *, temperature: float = 0.2) -> Tensor:
    """The cross-entropy of finding each query's key among its own key and the negatives of a queue.

    He et al. 2019, MoCo, arXiv 1911.05722, with the temperature of MoCo v2, Chen et al. 2020, arXiv 2003.04297.
    Shapes: queries and keys (B, D); negatives (Q, D) of length 1, as `layers.queue.Queue` gives them. Keys and
    negatives get no gradient. Raises UsageError where the temperature is not more than 0.
    """
    queries = sharpen(unit(queries), temperature)
    positive = (queries * unit(keys.detach())).sum(dim=1)  # (B,)
    negative = (queries @ negatives.detach().T).logsumexp(dim=1)  # (B,)
    return -F.logsigmoid(positive - negative).mean()


@in_full_precision
def symmetric_info_nce(
    first: Tensor, second: Tensor, first_keys: Tensor, second_keys: Tensor, *, temperature: float = 0.2
) -> Tensor:
    """The cross-entropy of finding each query's key among the other view's keys of the global batch, both ways.

    Each of the two is multiplied by twice the temperature. Chen, Xie and He 2021, MoCo v3, arXiv 2104.02057.
    Shapes: all (B, D): predictions of two views, and the momentum encoder's keys of the same views, which get no
    gradient. Raises UsageError where the temperature is not more than 0.
    """
    keys = gather_pair(first_keys.detach(), second_keys.detach())
    return _in_batch(first, keys[1], temperature) + _in_batch(second, keys[0], temperature)


def _in_batch(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    logits = sharpen(unit(queries), temperature) @ unit(keys).T  # (B, N)
    targets = torch.arange(len(queries), device=queries.device) + rank() * len(queries)
    return 2 * temperature * F.cross_entropy(logits, targets)
