"""The feature pyramid that detection heads look at."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from visiontasks.contracts import Level
from visiontasks.errors import UsageError

STRIDES = (8, 16, 32, 64, 128)


class Pyramid(nn.Module):
    """A feature pyramid network over the wanted levels of a backbone, continued to coarser strides.

    Lin et al. 2016, Feature Pyramid Networks, arXiv 1612.03144. Coarser maps than the backbone's are made from the
    coarsest one by 3x3 convolutions of stride 2 with ReLU between them (Lin et al. 2017, arXiv 1708.02002) where they
    are learnt, else by taking every second value. Finer strides than the backbone's are left out.

    Shapes: a backbone's pyramid to a list of (B, width, h, w), one for each of `self.strides`.

    Raises:
        UsageError: if the strides do not double, or the backbone has none of them.
    """

    def __init__(self, levels: tuple[Level, ...], *, strides: Sequence[int], width: int, learnt: bool = True) -> None:
        super().__init__()
        self.used = usable(levels, strides)
        coarsest = levels[self.used[-1]].stride
        coarser = [stride for stride in strides if stride > coarsest]
        self.strides = (*(levels[index].stride for index in self.used), *coarser)
        self.network = FeaturePyramidNetwork([levels[index].channels for index in self.used], width)
        self.coarser = nn.ModuleList(_halving(width, learnt=learnt) for _ in coarser)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        maps: list[Tensor] = list(self.network({str(index): features[index] for index in self.used}).values())
        for number, halving in enumerate(self.coarser):
            x = maps[-1] if number == 0 or isinstance(halving, EverySecond) else F.relu(maps[-1])
            maps.append(halving(x))
        return maps

    def size(self, features: list[Tensor]) -> tuple[int, int]:
        """The height and width of the padded images that the features came from."""
        height, width = features[self.used[0]].shape[-2:]
        return height * self.strides[0], width * self.strides[0]


def usable(levels: tuple[Level, ...], strides: Sequence[int]) -> list[int]:
    """Gives the indices of the levels at the wanted strides, the last one at each."""
    wanted = list(strides)
    if not wanted or any(coarse != 2 * fine for fine, coarse in pairwise(wanted)):
        raise UsageError(f"head.strides={wanted} must double from one to the next: type head.strides=[8,16,32,64,128].")
    last = {level.stride: index for index, level in enumerate(levels)}
    used = [last[stride] for stride in wanted if stride in last]
    if not used:
        found = ", ".join(str(stride) for stride in last)
        raise UsageError(
            f"The backbone's strides are {found} and the head wants one or more of {wanted}: type a backbone with "
            "strides 8, 16 and 32, such as backbone=resnet18 or backbone=mobilenet_v2, or other head.strides."
        )
    return used


class HalvingConv(nn.Conv2d):
    """A 3x3 convolution of stride 2, (B, C, h, w) to (B, channels, ceil(h / 2), ceil(w / 2)).

    Where the result is one column wide it stays out of autocast: on a CPU, oneDNN's bfloat16 gradient of its weights is
    not finite there.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(in_channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 2:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class EverySecond(nn.Module):
    """Takes every second value, (B, C, h, w) to (B, C, ceil(h / 2), ceil(w / 2)), as a view."""

    def forward(self, x: Tensor) -> Tensor:
        return x[..., ::2, ::2]


def _halving(width: int, *, learnt: bool) -> nn.Module:
    if not learnt:
        return EverySecond()
    convolution = HalvingConv(width, width)
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
    return convolution
