"""Pieces that dense heads share."""

from collections.abc import Sequence
from math import log2

import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.contracts import Level


def conv_norm_relu(in_channels: int, channels: int, kernel: int) -> nn.Sequential:
    """Makes a convolution that keeps the map's size, batch norm and ReLU, with initial weights for ReLU."""
    block = nn.Sequential(
        nn.Conv2d(in_channels, channels, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
    )
    initialise_for_relu(block)
    return block


def initialise_for_relu(module: nn.Module) -> None:
    """Draws the weights of the convolutions without bias, those before a norm and ReLU, from He's normal distribution.

    He, Zhang, Ren, Sun 2015, Delving Deep into Rectifiers, arXiv 1502.01852.
    """
    for convolution in module.modules():
        if isinstance(convolution, nn.Conv2d) and convolution.bias is None:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")


def resized(maps: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (B, C, h, w) at another height and width, bilinear; those that have them already are passed on."""
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    return F.interpolate(maps, size=tuple(size), mode="bilinear", align_corners=False)


def nearest_skip(levels: tuple[Level, ...], stride: int) -> int:
    """Gives the index of the level whose stride is nearest to one, leaving out the coarsest unless it is alone."""
    skips = levels[:-1] or levels
    return min(range(len(skips)), key=lambda index: abs(log2(skips[index].stride / stride)))
