"""The discriminator of DCGAN, without its last layer: strided convolutions and nothing else."""

from collections import OrderedDict
from itertools import pairwise

from torch import nn

from visiontasks.backbones.chain import ChainBackbone, check_output_stride, dilate, levels_at, step_names, trace
from visiontasks.contracts import UsageError
from visiontasks.layers.freezing import freeze_stages
from visiontasks.weights import load_backbone

_DEEPEST = 6


class DCGAN(ChainBackbone):
    """Convolutions of 4x4 with stride 2, batch norm but after the first, and leaky ReLU: strides 2, 4, 8, 16.

    Radford, Metz, Chintala 2015, Unsupervised Representation Learning with DCGAN, arXiv 1511.06434.

    Args:
        depth: how many convolutions, each of which is a level.
        width: channels of the first one, doubled in each that follows.
        weights: None for a random start, or a file or run folder.
        in_channels: channels of the images; a stored first convolution is adapted where it is not 3.
        frozen_stages: how many levels never change.
        output_stride: None, or the coarsest stride itself: convolutions of even size cannot be dilated.

    Raises:
        UsageError: if there is no such depth or output_stride, or the weights do not fit.
    """

    def __init__(
        self,
        *,
        depth: int = 4,
        width: int = 64,
        weights: str | None = None,
        in_channels: int = 3,
        frozen_stages: int = 0,
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= depth <= _DEEPEST:
            raise UsageError(f"backbone.depth={depth} is no number of convolutions: give 1 to {_DEEPEST}.")
        check_output_stride(output_stride)
        self.name = "dcgan"
        self.in_channels = in_channels
        self.mean = self.std = (0.5,) * in_channels
        self.net = _network([in_channels, *(width << power for power in range(depth))])
        traces = trace(self.net, in_channels=in_channels)
        if output_stride is not None:
            dilate(self.net, traces, output_stride=output_stride)
        self.steps = self.taps = step_names(self.net)
        self.levels = levels_at(self.taps, traces)
        self.receipt = load_backbone(self, _path(weights)) if weights is not None else None
        freeze_stages(self, frozen_stages)


def _network(widths: list[int]) -> nn.Sequential:
    stages = [_stage(*pair, normed=at > 0) for at, pair in enumerate(pairwise(widths))]
    net = nn.Sequential(OrderedDict((f"stage{at}", stage) for at, stage in enumerate(stages, start=1)))
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)  # section 3
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return net


def _stage(inner: int, outer: int, *, normed: bool) -> nn.Sequential:
    norm = [nn.BatchNorm2d(outer)] if normed else []
    return nn.Sequential(nn.Conv2d(inner, outer, 4, 2, 1, bias=not normed), *norm, nn.LeakyReLU(0.2, inplace=True))


def _path(weights: str) -> str:
    if weights == "imagenet":
        raise UsageError("weights=imagenet, but DCGAN's discriminator has none: use weights=null or weights=PATH.")
    return weights
