"""Networks that are one chain of steps: a Sequential, the outputs of some of whose steps make the pyramid."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from visiontasks.contracts import Level, UsageError
from visiontasks.layers.freezing import FreezableBackbone

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_CONTAINERS = ("features", "layers", "trunk_output")  # what torchvision calls a Sequential of unlike steps
_SIDE = 128  # pixels of the image that a trace follows: twice the coarsest stride that is asked for, and to spare


class ChainBackbone(FreezableBackbone):
    """A backbone that runs the steps of a Sequential in order; the outputs of those named in taps are its levels."""

    net: nn.Sequential
    steps: tuple[str, ...]
    taps: tuple[str, ...]

    def forward(self, images: Tensor) -> list[Tensor]:
        return run_chain(self.net, images, steps=self.steps, taps=self.taps)

    def shorten(self, count: int) -> None:
        end = self.steps.index(self.taps[count - 1]) + 1
        for step in self.steps[end:]:
            parent, _, child = step.rpartition(".")
            delattr(self.net.get_submodule(parent), child)
        self.steps, self.taps = self.steps[:end], self.taps[:count]


class Trace(NamedTuple):
    """Where one module lies in a network: the strides of its input and output, and the channels of its output."""

    entered: int
    left: int
    channels: int


def run_chain(net: nn.Sequential, images: Tensor, *, steps: Sequence[str], taps: Iterable[str]) -> list[Tensor]:
    """Runs the steps in order and returns the outputs of those named in taps."""
    features = []
    x = images
    for step in steps:
        x = net.get_submodule(step)(x)
        if step in taps:
            features.append(x)
    return features


def step_names(net: nn.Sequential) -> tuple[str, ...]:
    """Names the steps of a chain, with torchvision's containers opened: `layer1`, or `features.7`."""
    nested = (
        [f"{name}.{inner}" for inner, _ in child.named_children()] if name in _CONTAINERS else [name]
        for name, child in net.named_children()
    )
    return tuple(chain.from_iterable(nested))


def trace(net: nn.Sequential, *, in_channels: int) -> dict[str, Trace]:
    """Traces every module that turns one map into another, without computing anything (meta tensors)."""
    traces: dict[str, Trace] = {}
    hooks = [module.register_forward_hook(_recorder(name, traces)) for name, module in net.named_modules()]
    state = chain(net.named_parameters(), net.named_buffers())
    on_meta = {name: torch.empty_like(tensor, device="meta") for name, tensor in state}
    functional_call(net, on_meta, (torch.empty(2, in_channels, _SIDE, _SIDE, device="meta"),))
    for hook in hooks:
        hook.remove()
    return traces


def _recorder(name: str, traces: dict[str, Trace]) -> Any:
    def record(_: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(inputs[0], Tensor) and isinstance(output, Tensor) and output.ndim == 4:
            traces[name] = Trace(_SIDE // inputs[0].shape[-1], _SIDE // output.shape[-1], output.shape[1])

    return record


def last_at_each_stride(steps: Iterable[str], traces: Mapping[str, Trace], *, finest: int) -> tuple[str, ...]:
    """Picks the last step at each stride, from the finest stride asked for on, fine to coarse."""
    last = {traces[step].left: step for step in steps if traces[step].left >= finest}
    return tuple(last.values())


def levels_at(taps: Iterable[str], traces: Mapping[str, Trace]) -> tuple[Level, ...]:
    return tuple(Level(channels=traces[tap].channels, stride=traces[tap].left) for tap in taps)


def dilate(net: nn.Sequential, traces: Mapping[str, Trace], *, output_stride: int) -> None:
    """Holds a network at output_stride: what strode beyond it no longer strides, and what follows is dilated.

    The weights stay as they are and, where nothing pools globally on the way, so do the outputs on the coarse grid
    (Holschneider et al. 1990, the algorithme a trous; Chen et al. 2014, arXiv 1412.7062).

    Raises:
        UsageError: if the network pools, or has convolutions of even size, beyond output_stride.
    """
    beyond = {name: module for name, module in net.named_modules() if name in traces and _strides(traces[name])}
    for name, module in beyond.items():
        if traces[name].left > output_stride and not _can_dilate(module):
            raise UsageError(
                f"output_stride={output_stride}, but this network reaches stride {traces[name].left} by {module}, "
                "which cannot be dilated: use output_stride=null, or a backbone that strides by odd convolutions, "
                "such as resnet50, mobilenet_v2 or regnet_y_400mf."
            )
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d):
            _dilate_convolution(module, traces[name], output_stride)


def _strides(where: Trace) -> bool:
    return where.left > where.entered


def _can_dilate(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return all(size % 2 == 1 for size in module.kernel_size)
    return not isinstance(module, nn.MaxPool2d | nn.AvgPool2d)


def _dilate_convolution(convolution: nn.Conv2d, where: Trace, output_stride: int) -> None:
    if where.left > output_stride:
        convolution.stride = (1, 1)
    if where.entered > output_stride and max(convolution.kernel_size) > 1:
        rate = where.entered // output_stride
        convolution.dilation = (rate, rate)
        convolution.padding = tuple(rate * int(side) for side in convolution.padding)


def check_output_stride(output_stride: int | None) -> None:
    """Raises UsageError unless output_stride is one that backbones know."""
    if output_stride not in (None, 8, 16):
        raise UsageError(f"output_stride={output_stride}, but a backbone is held at 8 or 16, or left alone by null.")


def for_channels(statistics: Sequence[float], in_channels: int) -> tuple[float, ...]:
    """Gives one value a channel: as published for three channels, their average for any other number."""
    if in_channels == len(statistics):
        return tuple(statistics)
    return (sum(statistics) / len(statistics),) * in_channels
