"""The decoder of U-Net over a pyramid."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.contracts import Level
from visiontasks.errors import UsageError
from visiontasks.layers.blocks import conv_norm_relu


class UNet(nn.Module):
    """From the coarsest level on, each map is enlarged, joined to the next finer level and convolved twice.

    Ronneberger, Fischer, Brox 2015, U-Net, arXiv 1505.04597, with batch norm, padded convolutions and enlargement by
    the nearest value. Below the finest level, and where a pyramid has one level only, there is nothing to join: maps
    are enlarged by two and convolved until `stride` is reached.

    Shapes: a pyramid to logits (B, num_classes, h, w) at `stride` or the finest level's, whichever is finer.

    Args:
        width: channels at stride 4; twice as many at twice the stride, half as many at half of it.
        stride: of the logits, where the pyramid has no finer level.

    Raises:
        UsageError: if stride is below 1.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int, width: int = 64, stride: int = 4) -> None:
        super().__init__()
        if stride < 1:
            raise UsageError(
                f"head.stride={stride}, but logits have one of the image's size or coarser: use head.stride=1."
            )
        self.blocks = nn.ModuleList()
        channels, at = levels[-1]
        skips = list(reversed(levels[:-1]))
        while skips or at > stride:
            skip = skips.pop(0) if skips else Level(0, at // 2)
            out = max(8, width * skip.stride // 4)
            self.blocks.append(_block(channels + skip.channels, out))
            channels, at = out, skip.stride
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = features[-1]
        for index, block in enumerate(self.blocks):
            x = block(_join(x, features[-2 - index]) if index < len(features) - 1 else _double(x))
        return self.classifier(x)  # type: ignore[no-any-return]  # (B, K, h, w)


def _block(in_channels: int, channels: int) -> nn.Sequential:
    return nn.Sequential(conv_norm_relu(in_channels, channels, 3), conv_norm_relu(channels, channels, 3))


def _join(x: Tensor, skip: Tensor) -> Tensor:
    if x.shape[-2:] != skip.shape[-2:]:
        x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
    return torch.cat([x, skip], dim=1)  # (B, C + skip's C, h, w)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
