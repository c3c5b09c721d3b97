"""Stages of a backbone: which parameters belong to each, and how a stage is kept from changing or taken away."""

from collections.abc import Iterable, Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.func import functional_call

from visiontasks.contracts import Backbone, UsageError


class FreezableBackbone(Backbone):
    """A backbone whose frozen parts stay in evaluation mode, whatever train() is called.

    A part is frozen when it has parameters and none of them requires a gradient. `classifier_names` are the tensors
    of the published network that the backbone has no use for, `aliases` maps outdated published names to today's, and
    `probe_side` is the side in pixels of an image that the network takes.
    """

    classifier_names: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = {}
    probe_side: int = 64

    def train(self, mode: bool = True) -> "FreezableBackbone":
        super().train(mode)
        if mode:
            keep_frozen_in_eval(self)
        return self

    def shorten(self, count: int) -> None:
        """Takes away what only the levels after the first `count` need; `levels` is shortened by cut_stages."""
        raise UsageError(f"{type(self).__name__} cannot be cut to {count} stages: type transfer=last_stages, or full.")


def keep_frozen_in_eval(module: nn.Module) -> None:
    """Puts every submodule that has parameters, all of them frozen, into evaluation mode with all it holds."""
    for child in module.children():
        learns = [parameter.requires_grad for parameter in child.parameters()]
        if learns and not any(learns):
            child.eval()
        else:
            keep_frozen_in_eval(child)


def freeze_stages(backbone: Backbone, count: int) -> None:
    """Freezes the stem and the first `count` levels: no gradients, no moving statistics, no dropout.

    Raises:
        UsageError: if count is negative or larger than the number of levels.
    """
    if not 0 <= count <= len(backbone.levels):
        raise UsageError(
            f"frozen_stages={count}, but this backbone has {len(backbone.levels)} stages: "
            f"give a number from 0 to {len(backbone.levels)}."
        )
    if count == 0:
        return
    parameters = dict(backbone.named_parameters())
    for name in chain.from_iterable(stage_parameters(backbone)[:count]):
        parameters[name].requires_grad_(False)
    backbone.train(backbone.training)


def cut_stages(backbone: Backbone, count: int) -> None:
    """Keeps the first `count` levels: what only the others need is gone, and left over when weights are loaded.

    Raises:
        UsageError: if count is not between 1 and the number of levels, or the backbone cannot be cut.
    """
    if not 1 <= count <= len(backbone.levels):
        raise UsageError(
            f"transfer.keep={count}, but this backbone has {len(backbone.levels)} stages: "
            f"give a number from 1 to {len(backbone.levels)}."
        )
    if count == len(backbone.levels):
        return
    if not isinstance(backbone, FreezableBackbone):
        raise UsageError(f"{type(backbone).__name__} cannot be cut: derive it from FreezableBackbone.")
    before = set(backbone.state_dict())
    backbone.shorten(count)
    backbone.levels = backbone.levels[:count]
    gone = before - set(backbone.state_dict())
    backbone.classifier_names |= {name.removeprefix("net.") for name in gone}


def stage_parameters(backbone: Backbone) -> list[list[str]]:
    """Names the parameters of each level, fine to coarse: those that reach it and no finer one, the stem in the first.

    Autograd answers, on meta tensors: nothing is computed, no weight, statistic, gradient or random state is touched.
    """
    parameters = {name: _on_meta(parameter, learns=True) for name, parameter in backbone.named_parameters()}
    buffers = {name: _on_meta(buffer) for name, buffer in backbone.named_buffers()}
    side = getattr(backbone, "probe_side", 2 * backbone.levels[-1].stride)
    images = torch.empty(2, backbone.in_channels, side, side, device="meta")  # (B, C, H, W)
    with torch.enable_grad():
        features = functional_call(backbone, {**parameters, **buffers}, (images,))
    taken: set[str] = set()
    stages = []
    for feature in features:
        stage = [name for name in _reaching(feature, parameters) if name not in taken]
        taken.update(stage)
        stages.append(stage)
    return stages


def _reaching(feature: Tensor, parameters: Mapping[str, Tensor]) -> Iterable[str]:
    gradients = torch.autograd.grad(feature.sum(), list(parameters.values()), retain_graph=True, allow_unused=True)
    return [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _on_meta(tensor: Tensor, *, learns: bool = False) -> Tensor:
    return torch.empty_like(tensor, device="meta", requires_grad=learns)
