"""Atrous spatial pyramid pooling, alone and with a decoder."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead

from visiontasks.contracts import Level
from visiontasks.errors import UsageError
from visiontasks.layers.blocks import conv_norm_relu, initialise_for_relu, nearest_skip, resized


class DeepLabV3(nn.Module):
    """Four parallel convolutions and image pooling over the coarsest level, and one convolution over all of them.

    Chen, Papandreou, Schroff, Adam 2017, Rethinking Atrous Convolution, arXiv 1706.05587. Meant for a backbone held at
    output_stride 8 or 16. The layers and their names are those of torchvision's DeepLabHead.

    Shapes: a pyramid to logits (B, num_classes, h, w) at the coarsest level's stride.

    Args:
        rates: dilations of the 3x3 convolutions; None for the paper's reach in pixels of the image: 12, 24 and 36 at
            stride 8, 6, 12 and 18 at stride 16.

    Raises:
        UsageError: when it trains on a batch of one image, which the batch norm after the pooling cannot.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int, rates: Sequence[int] | None = None) -> None:
        super().__init__()
        self.layers = DeepLabHead(levels[-1].channels, num_classes, rates or _rates(levels[-1].stride))
        initialise_for_relu(self.layers)

    def forward(self, features: list[Tensor]) -> Tensor:
        _check_batch(self.layers[0], features[-1])
        return self.layers(features[-1])  # type: ignore[no-any-return]  # (B, K, h, w)


class DeepLabV3Plus(nn.Module):
    """DeepLabV3's pooling pyramid, enlarged to a finer level and refined with it by two 3x3 convolutions.

    Chen, Zhu, Papandreou, Schroff, Adam 2018, Encoder-Decoder with Atrous Separable Convolution, arXiv 1802.02611, in
    its form with plain convolutions. The finer level is the one nearest stride 4.

    Shapes: a pyramid to logits (B, num_classes, h, w) at the finer level's stride.

    Args:
        rates: dilations of the 3x3 convolutions of the pyramid, as in DeepLabV3.
        skip_width: channels that the finer level is reduced to.
        width: channels of the pyramid and of the decoder.

    Raises:
        UsageError: when it trains on a batch of one image, which the batch norm after the pooling cannot.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        rates: Sequence[int] | None = None,
        skip_width: int = 48,
        width: int = 256,
    ) -> None:
        super().__init__()
        self.skip = nearest_skip(levels, 4)
        self.pyramid = ASPP(levels[-1].channels, rates or _rates(levels[-1].stride), width)
        initialise_for_relu(self.pyramid)
        self.reduce = conv_norm_relu(levels[self.skip].channels, skip_width, 1)
        self.refine = nn.Sequential(conv_norm_relu(width + skip_width, width, 3), conv_norm_relu(width, width, 3))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        _check_batch(self.pyramid, features[-1])
        skip = self.reduce(features[self.skip])  # (B, skip_width, h, w)
        pooled = resized(self.pyramid(features[-1]), skip.shape[-2:])  # (B, width, h, w)
        return self.classifier(self.refine(torch.cat([pooled, skip], dim=1)))  # type: ignore[no-any-return]  # (B, K, h, w)


def _rates(stride: int) -> tuple[int, ...]:
    """Gives the dilations that reach 96, 192 and 288 pixels of the image."""
    return tuple(max(1, pixels // stride) for pixels in (96, 192, 288))


def _check_batch(pyramid: nn.Module, features: Tensor) -> None:
    norm = pyramid.get_submodule("convs")[-1][2]  # type: ignore[index]
    if isinstance(norm, nn.BatchNorm2d) and norm.training and len(features) == 1:
        raise UsageError(
            "The batch has 1 image, but the batch norm after DeepLab's image pooling needs 2 or more to train: "
            "use data.batch_size=2 or more."
        )
