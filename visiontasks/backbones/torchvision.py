"""Pyramids from torchvision's classification networks."""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, NamedTuple

import torch
import torchvision.models
from torch import Tensor, nn

from visiontasks.backbones.chain import (
    ChainBackbone,
    check_output_stride,
    dilate,
    for_channels,
    last_at_each_stride,
    levels_at,
    step_names,
    trace,
)
from visiontasks.contracts import UsageError
from visiontasks.layers.freezing import freeze_stages
from visiontasks.weights import Receipt, load_backbone


class _Family(NamedTuple):
    """How torchvision writes one family of networks: the children that run in a chain before the classifier."""

    pattern: str
    children: str
    options: Mapping[str, object] = {}


_RESNET = "conv1 bn1 relu maxpool layer1 layer2 layer3 layer4"
_GOOGLENET = (
    "conv1 maxpool1 conv2 conv3 maxpool2 inception3a inception3b maxpool3 inception4a inception4b inception4c "
    "inception4d inception4e maxpool4 inception5a inception5b"
)
_FAMILIES = (
    _Family(r"(alexnet|convnext|densenet|efficientnet|mobilenet|squeezenet|vgg)\w*", "features"),
    _Family(r"(resnet|resnext|wide_resnet)\w+", _RESNET),
    _Family(r"mnasnet\w+", "layers"),
    _Family(r"regnet\w+", "stem trunk_output"),
    _Family(r"shufflenet\w+", "conv1 maxpool stage2 stage3 stage4 conv5"),
    _Family(r"googlenet", _GOOGLENET, {"init_weights": True}),
)


class TorchvisionBackbone(ChainBackbone):
    """A classification network of torchvision without its classifier, as a pyramid.

    `net` keeps torchvision's names, so published weights load as they are. The levels are the last block outputs at
    each of the strides 4, 8, 16 and 32 that the network has, for VGG the outputs of its pools. A dilated network
    (output_stride) keeps these levels, each with the stride that it then has: 4, 8, 8, 8 for output_stride=8.

    Args:
        name: what torchvision.models calls the network.
        weights: None for a random start, "imagenet" for torchvision's newest published ones, or a file or run folder.
        in_channels: channels of the images; the published first convolution is adapted where it is not 3.
        frozen_stages: how many levels, with the stem, never change.
        output_stride: 8 or 16, to hold the coarser stages at this stride by dilation.

    Raises:
        UsageError: on an unknown name, weights that do not fit, or a stride that the network cannot be held at.
    """

    def __init__(
        self,
        *,
        name: str,
        weights: str | None = None,
        in_channels: int = 3,
        frozen_stages: int = 0,
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        check_output_stride(output_stride)
        family = _family(name)
        self.name = name
        network = torchvision.models.get_model(name, weights=None, **family.options)
        self.net = _chain(network, family)
        _replace_first_convolution(self.net, in_channels)
        self.in_channels = in_channels
        self.mean, self.std = _statistics(name, in_channels)
        self.classifier_names = frozenset(network.state_dict()) - frozenset(self.net.state_dict())
        self.aliases = _aliases(self.net)
        self.steps = step_names(self.net)
        traces = trace(self.net, in_channels=in_channels)
        self.taps = last_at_each_stride(_candidates(self.net, self.steps, name), traces, finest=4)
        if output_stride is not None:
            dilate(self.net, traces, output_stride=output_stride)
            traces = trace(self.net, in_channels=in_channels)
        self.levels = levels_at(self.taps, traces)
        self.receipt = self._load(name, weights)
        freeze_stages(self, frozen_stages)

    def _load(self, name: str, weights: str | None) -> Receipt | None:
        if weights is None:
            return None
        if weights == "imagenet":
            return load_backbone(self, _download(name), source=f"torchvision's {name}")
        return load_backbone(self, weights)


def _family(name: str) -> _Family:
    known = [known for known in torchvision.models.list_models(module=torchvision.models) if _match(known)]
    family = _match(name)
    if family is None or name not in known:
        near = get_close_matches(name, known, n=3, cutoff=0.6) or ["resnet50", "mobilenet_v2"]
        raise UsageError(
            f"backbone.name={name} is no network that the torchvision backbone knows: try {', '.join(near)}, "
            f"or backbone=timm backbone.name={name}."
        )
    return family


def _match(name: str) -> _Family | None:
    return next((family for family in _FAMILIES if re.fullmatch(family.pattern, name)), None)


def _chain(network: nn.Module, family: _Family) -> nn.Sequential:
    """Strings the children before the classifier together, under their own names, so that the grid comes out exact.

    AlexNet and SqueezeNet lose a row and a column where they do not pad. Zeros to the right and below, and pools that
    keep their last, incomplete window, give the missing ones; all that the published network computes stays as it is.
    """
    chain = nn.Sequential()
    first = _first_convolution(network)
    lost = max(0, first.kernel_size[0] - first.stride[0] - 2 * int(first.padding[0]))
    if lost:
        chain.add_module("pad", nn.ZeroPad2d((0, lost, 0, lost)))
    for child in family.children.split():
        chain.add_module(child, network.get_submodule(child))
    if isinstance(network, torchvision.models.DenseNet):
        chain.add_module("relu", nn.ReLU())  # which its forward applies as a function, before the classifier
    for module in chain.modules():
        if isinstance(module, nn.MaxPool2d) and module.padding == 0:
            module.ceil_mode = True
    return chain


def _candidates(net: nn.Sequential, steps: tuple[str, ...], name: str) -> tuple[str, ...]:
    if name.startswith("vgg"):
        return tuple(step for step in steps if isinstance(net.get_submodule(step), nn.MaxPool2d))
    return steps


def _first_convolution(network: nn.Module) -> nn.Conv2d:
    return next(module for module in network.modules() if isinstance(module, nn.Conv2d))


def _replace_first_convolution(net: nn.Sequential, in_channels: int) -> None:
    old = _first_convolution(net)
    if in_channels == old.in_channels:
        return
    name = next(name for name, module in net.named_modules() if module is old)
    new = nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        stride=old.stride,  # type: ignore[arg-type]
        padding=old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )
    fan_in_ratio = old.in_channels / in_channels
    nn.init.normal_(new.weight, std=float(old.weight.detach().std()) * fan_in_ratio**0.5)  # outputs keep their variance
    net.set_submodule(name, new)


def _statistics(name: str, in_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if (
        name == "googlenet"
    ):  # its published weights see (x - 0.5) / 0.5, which its transform_input otherwise brings about
        return for_channels((0.5,) * 3, in_channels), for_channels((0.5,) * 3, in_channels)
    transform: Any = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return for_channels(transform.mean, in_channels), for_channels(transform.std, in_channels)


def _aliases(net: nn.Sequential) -> dict[str, str]:
    """Maps the names in DenseNet's published files, `denselayer1.norm.1.weight`, to today's `denselayer1.norm1`."""
    names = net.state_dict()
    dotted = {re.sub(r"(denselayer\d+\.(?:norm|conv))(\d)", r"\1.\2", name): name for name in names}
    return {old: new for old, new in dotted.items() if old != new}


def _download(name: str) -> dict[str, Tensor]:
    """Takes torchvision's newest ImageNet weights from torch.hub's cache, or from the network into it."""
    published = torchvision.models.get_model_weights(name).DEFAULT
    try:
        state: dict[str, Tensor] = published.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        file = f"{torch.hub.get_dir()}/checkpoints/{published.url.rpartition('/')[2]}"
        raise UsageError(
            f"The ImageNet weights of {name} did not arrive from {published.url} ({error}): put that file at {file}, "
            "or give your own by backbone.weights=PATH."
        ) from error
    return state
