"""Fully convolutional heads: the first ones with summed skips, and the two convolutions of today."""

from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.fcn import FCNHead

from visiontasks.contracts import Level
from visiontasks.layers.blocks import initialise_for_relu, resized


class FCN(nn.Module):
    """A 3x3 convolution to a quarter of the channels, batch norm, ReLU, dropout of 0.1 and a 1x1 convolution.

    Shapes: a pyramid to logits (B, num_classes, h, w) at the coarsest level's stride. The layers and their names are
    those of torchvision's FCNHead.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int) -> None:
        super().__init__()
        self.layers = FCNHead(levels[-1].channels, num_classes)
        initialise_for_relu(self.layers)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.layers(features[-1])  # type: ignore[no-any-return]  # (B, K, h, w)


class SkipFCN(nn.Module):
    """Scores on the coarsest levels, each enlarged by a learnable transposed convolution and added to the next finer.

    Shelhamer, Long, Darrell 2015, Fully Convolutional Networks for Semantic Segmentation, arXiv 1605.06211: FCN-32s,
    FCN-16s and FCN-8s are 0, 1 and 2 skips. The scores start at zero, the enlargements as bilinear interpolation, one
    filter a class. VGG's two fully connected layers, which the paper turns into convolutions, are left out.

    Shapes: a pyramid to logits (B, num_classes, h * s, w * s) where s is the stride of the finest level in use and
    (h, w) its size: those of the image where that is a multiple of the coarsest stride.

    Args:
        skips: how many levels beside the coarsest are scored; all there are, where a pyramid has fewer.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int, skips: int = 2) -> None:
        super().__init__()
        used = levels[-1 - skips :]
        self.scores = nn.ModuleList(_score(level.channels, num_classes) for level in used)
        targets = (1, *(level.stride for level in used[:-1]))
        factors = [level.stride // target for level, target in zip(used, targets, strict=True)]
        self.enlargements = nn.ModuleList(_enlargement(num_classes, factor) for factor in factors)

    def forward(self, features: list[Tensor]) -> Tensor:
        logits: Tensor = self.scores[-1](features[-1])
        for index in range(len(self.scores) - 2, -1, -1):
            skip = self.scores[index](features[index - len(self.scores)])  # (B, K, h, w)
            logits = skip + resized(self.enlargements[index + 1](logits), skip.shape[-2:])
        return self.enlargements[0](logits)  # type: ignore[no-any-return]  # (B, K, H, W)


def _score(channels: int, num_classes: int) -> nn.Conv2d:
    score = nn.Conv2d(channels, num_classes, 1)
    nn.init.zeros_(score.weight)
    nn.init.zeros_(score.bias)  # type: ignore[arg-type]
    return score


class _Enlargement(nn.ConvTranspose2d):
    """A transposed convolution (B, K, h, w) to (B, K, h * factor, w * factor), at first bilinear interpolation.

    It stays out of autocast: in bfloat16 the CPU takes up to 150 times as long.
    """

    def __init__(self, num_classes: int, factor: int) -> None:
        kernel = 2 * factor - factor % 2
        super().__init__(
            num_classes,
            num_classes,
            kernel,
            stride=factor,
            padding=(kernel - factor) // 2,
            groups=num_classes,
            bias=False,
        )
        self.weight.data.copy_(_bilinear(kernel, factor))

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype), output_size)


def _enlargement(num_classes: int, factor: int) -> nn.Module:
    return nn.Identity() if factor == 1 else _Enlargement(num_classes, factor)


def _bilinear(kernel: int, factor: int) -> Tensor:
    """Gives the weights (kernel, kernel) by which a transposed convolution interpolates."""
    distances = (torch.arange(kernel) - (kernel - 1) / 2).abs()
    line = 1 - distances / factor
    return torch.outer(line, line)
