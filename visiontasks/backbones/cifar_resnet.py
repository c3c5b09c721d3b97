"""The small residual networks for 32-pixel images."""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.backbones.chain import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    ChainBackbone,
    check_output_stride,
    for_channels,
    levels_at,
    step_names,
    trace,
)
from visiontasks.contracts import UsageError
from visiontasks.layers.freezing import freeze_stages
from visiontasks.weights import load_backbone

_WIDTHS = (16, 32, 64)


class CifarResNet(ChainBackbone):
    """The residual network for CIFAR, 6n + 2 layers deep, with identity shortcuts (option A), as strides 1, 2 and 4.

    He, Zhang, Ren, Sun 2015, Deep Residual Learning for Image Recognition, section 4.2, arXiv 1512.03385.
    The zero channels of a widening shortcut go half before and half behind, as the published weights expect.

    Args:
        depth: 20, 32, 44, 56, 110, or another 6n + 2.
        shortcut: False gives the plain network that the paper compares with.
        weights: None for a random start, or a file or run folder.
        in_channels: channels of the images; a published first convolution is adapted where it is not 3.
        frozen_stages: how many levels, with the stem, never change.
        output_stride: None; there is no stride beyond 4 to hold back.

    Raises:
        UsageError: if depth is not 6n + 2, output_stride is given, or the weights do not fit.
    """

    classifier_names = frozenset({"linear.weight", "linear.bias"})

    def __init__(
        self,
        *,
        depth: int = 20,
        shortcut: bool = True,
        weights: str | None = None,
        in_channels: int = 3,
        frozen_stages: int = 0,
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"backbone.depth={depth} is not 6n + 2: give 20, 32, 44, 56 or 110.")
        check_output_stride(output_stride)
        if output_stride is not None:
            raise UsageError(f"output_stride={output_stride}, but a CIFAR ResNet ends at stride 4: leave it null.")
        self.name = f"resnet{depth}"
        self.in_channels = in_channels
        self.mean = for_channels(IMAGENET_MEAN, in_channels)
        self.std = for_channels(IMAGENET_STD, in_channels)
        self.net = _network(in_channels=in_channels, blocks=(depth - 2) // 6, shortcut=shortcut)
        self.steps = step_names(self.net)
        self.taps = ("layer1", "layer2", "layer3")
        self.levels = levels_at(self.taps, trace(self.net, in_channels=in_channels))
        self.receipt = load_backbone(self, _path(weights)) if weights is not None else None
        freeze_stages(self, frozen_stages)


class _Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and the shortcut around them."""

    def __init__(self, in_channels: int, channels: int, *, stride: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.widening = (channels - in_channels) // 2
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))  # (B, channels, H / stride, W / stride)
        out = self.bn2(self.conv2(out))
        if self.shortcut:
            out = out + self._identity(x)
        return F.relu(out)

    def _identity(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.widening == 0:
            return x
        fewer = x[:, :, :: self.stride, :: self.stride]
        return F.pad(fewer, (0, 0, 0, 0, self.widening, self.widening))  # (B, channels, H / stride, W / stride)


def _network(*, in_channels: int, blocks: int, shortcut: bool) -> nn.Sequential:
    net = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(in_channels, _WIDTHS[0], 3, padding=1, bias=False),
            bn1=nn.BatchNorm2d(_WIDTHS[0]),
            relu=nn.ReLU(),
            layer1=_stage(_WIDTHS[0], _WIDTHS[0], stride=1, blocks=blocks, shortcut=shortcut),
            layer2=_stage(_WIDTHS[0], _WIDTHS[1], stride=2, blocks=blocks, shortcut=shortcut),
            layer3=_stage(_WIDTHS[1], _WIDTHS[2], stride=2, blocks=blocks, shortcut=shortcut),
        )
    )
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)  # section 4.2 takes it from He et al. 2015, arXiv 1502.01852
    return net


def _stage(in_channels: int, channels: int, *, stride: int, blocks: int, shortcut: bool) -> nn.Sequential:
    first = _Block(in_channels, channels, stride=stride, shortcut=shortcut)
    rest = [_Block(channels, channels, stride=1, shortcut=shortcut) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def _path(weights: str) -> str:
    if weights == "imagenet":
        raise UsageError("weights=imagenet, but a CIFAR ResNet has none: use weights=null or weights=PATH.")
    return weights
