"""How surprising pictures are to a density, in nats an image.

All compute in float32 or better, whatever autocast says.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def discretised_logistic(pixels: Tensor, means: Tensor, log_scales: Tensor, *, top: int = 255) -> Tensor:
    """The surprise of whole numbers 0 to top under logistic distributions, each rounded to the nearest of them.

    The negative logarithm of the share of the distribution that lies within 1/2 of the number; what lies below 0 or
    above top belongs to these, so that the shares of all numbers sum to 1 (Kingma et al. 2016, arXiv 1606.04934,
    appendix; Salimans et al. 2017, arXiv 1701.05517).
    Shapes: pixels and means (B, C, H, W), log_scales one that they broadcast with, in units of the numbers; returns
    (B, C, H, W).
    """
    kind = torch.promote_types(means.dtype, torch.float32)
    pixels, means, log_scales = pixels.to(kind), means.to(kind), log_scales.to(kind)
    sharpness = torch.exp(-log_scales)
    above, below = (pixels + 0.5 - means) * sharpness, (pixels - 0.5 - means) * sharpness
    below_top, above_zero = pixels < top, pixels > 0
    edges = F.logsigmoid(above).where(below_top, 0) + F.logsigmoid(-below).where(above_zero, 0)
    width = torch.log(-torch.expm1(-sharpness))  # sigma(a) - sigma(b) = sigma(a) sigma(-b) (1 - exp(b - a))
    surprise: Tensor = -(edges + width.where(below_top & above_zero, 0))
    return surprise


def gaussian_divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of diagonal normal distributions from the standard one.

    Kingma and Welling 2013, arXiv 1312.6114, appendix B. Shapes: (B, D) both; returns (B,).
    """
    kind = torch.promote_types(mean.dtype, torch.float32)
    mean, log_variance = mean.to(kind), log_variance.to(kind)
    divergence: Tensor = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1)
    return divergence


def categorical(logits: Tensor, levels: Tensor) -> Tensor:
    """The surprise of whole numbers under a softmax over all that there are.

    Shapes: logits (B, C, L, H, W); levels (B, C, H, W) int64 below L; returns (B, C, H, W).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    surprise: Tensor = F.cross_entropy(logits.transpose(1, 2), levels, reduction="none")
    return surprise


def bits_per_dim(nats: Tensor, dimensions: int) -> Tensor:
    """Nats an image as bits a pixel and channel."""
    bits: Tensor = nats / (dimensions * math.log(2))
    return bits
