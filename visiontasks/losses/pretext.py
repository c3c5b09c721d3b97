"""Losses of pretexts as (sum, count): what was taken from an image is put back.

All compute in float32 or better, whatever autocast says.
"""

import torch
from torch import Tensor


def soft_cross_entropy(logits: Tensor, places: Tensor, shares: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy of pixels whose truth is spread over a few classes each, times a weight for each pixel.

    Zhang, Isola and Efros 2016, arXiv 1603.08511, equation 2, of which this is the mean over pixels.
    Shapes: logits (B, K, h, w); places (B, N, h, w) class indices, and their shares, which sum to 1; weight (B, h, w).
    The count is that of the pixels.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    surprise = -logits.log_softmax(dim=1).gather(1, places)  # (B, N, h, w)
    total = ((surprise * shares).sum(dim=1) * weight).sum()
    return total, total.new_tensor(weight.numel())


def weighted_square(values: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The squared error of each value times the weight of its pixel.

    Pathak et al. 2016, arXiv 1604.07379, equation 1, where weight is 1 in the hole.
    Shapes: values and target (B, C, H, W); weight (B, 1, H, W). The count is the weights' sum over the values.
    """
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    total = ((values - target).square() * weight).sum()
    return total, weight.sum() * values.shape[1]
