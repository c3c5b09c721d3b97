"""The semantic branch of Panoptic FPN."""

from math import gcd
from typing import ClassVar

from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from visiontasks.contracts import Level
from visiontasks.layers.blocks import initialise_for_relu, resized


class FPN(nn.Module):
    """A feature pyramid network whose levels are convolved and enlarged step by step to the finest, and added.

    Kirillov, Girshick, He, Dollar 2019, Panoptic Feature Pyramid Networks, arXiv 1901.02446, section 3.1, over Lin et
    al. 2017, arXiv 1612.03144. Each step is a 3x3 convolution, group norm, ReLU and bilinear enlargement.

    Shapes: a pyramid to logits (B, num_classes, h, w) at the finest level's stride.

    Args:
        pyramid_width: channels of the feature pyramid network.
        width: channels of the steps, in 32 groups or as many as divide both.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(
        self, *, levels: tuple[Level, ...], num_classes: int, pyramid_width: int = 256, width: int = 128
    ) -> None:
        super().__init__()
        self.pyramid = FeaturePyramidNetwork([level.channels for level in levels], pyramid_width)
        self.targets = [_targets(levels, index) for index in range(len(levels))]
        self.branches = nn.ModuleList(_branch(len(targets), pyramid_width, width) for targets in self.targets)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        named = {str(index): feature for index, feature in enumerate(features)}
        levels: list[Tensor] = list(self.pyramid(named).values())
        total = self._enlarged(levels, 0)  # (B, width, h, w)
        for index in range(1, len(levels)):
            total = total + self._enlarged(levels, index)
        return self.classifier(total)  # type: ignore[no-any-return]  # (B, K, h, w)

    def _enlarged(self, levels: list[Tensor], index: int) -> Tensor:
        x = levels[index]
        steps = self.branches[index].children()
        for step, target in zip(steps, self.targets[index], strict=True):
            x = resized(step(x), levels[target].shape[-2:])
        return x


def _targets(levels: tuple[Level, ...], index: int) -> list[int]:
    """Gives the levels whose sizes a branch passes on its way to the finest, one for each stride."""
    finer = [at for at in reversed(range(index)) if levels[at].stride < levels[at + 1].stride]
    return finer or [0]


def _branch(steps: int, in_channels: int, channels: int) -> nn.ModuleList:
    return nn.ModuleList(_step(in_channels if step == 0 else channels, channels) for step in range(steps))


def _step(in_channels: int, channels: int) -> nn.Sequential:
    step = nn.Sequential(
        nn.Conv2d(in_channels, channels, 3, padding=1, bias=False),
        nn.GroupNorm(gcd(32, channels), channels),
        nn.ReLU(inplace=True),
    )
    initialise_for_relu(step)
    return step
