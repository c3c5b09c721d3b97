"""Pyramids from any network of timm."""

import inspect
import time
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import timm
import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import HfHubHTTPError
from torch import Tensor, nn

from visiontasks.backbones.chain import IMAGENET_MEAN, IMAGENET_STD, check_output_stride, for_channels
from visiontasks.contracts import Level, UsageError
from visiontasks.layers.freezing import FreezableBackbone, freeze_stages
from visiontasks.weights import Receipt, load_backbone

_FILES = ("model.safetensors", "pytorch_model.bin")  # what a repository of timm's holds, one or both
_PATIENCE = 4.0  # seconds to reach the Hub in
_ANY_SIZE = {"strict_img_size": False, "dynamic_img_size": True}  # how transformers are told to take every image size


class TimmBackbone(FreezableBackbone):
    """A network of timm without its classifier, as a pyramid.

    `net` keeps timm's names, so published weights load as they are. The levels are the last feature maps at each stride
    from 4 on that timm lists for the network, as (B, C, H, W) for transformers too; a plain vision transformer has one.
    A dilated network (output_stride) keeps these levels, each with the stride that it then has.

    Args:
        name: what timm calls the network; a tag behind a dot chooses among its published weights.
        weights: None for a random start, "imagenet" for timm's default ones, or a file or run folder.
        in_channels: channels of the images; the published first convolution is adapted where it is not 3.
        frozen_stages: how many levels, with the stem, never change.
        output_stride: 8 or 16, where timm can dilate the network.

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
        blueprint = _blueprint(name)
        self.name = name
        self.indices = _last_at_each_stride([int(info["reduction"]) for info in blueprint.feature_info])
        options = _options(type(blueprint), output_stride)
        self.net = _create(name, in_channels=in_channels, **options)
        self.levels = tuple(_level(self.net.feature_info[index]) for index in self.indices)
        _prune(self.net, self.indices)
        self.in_channels = in_channels
        self.mean = for_channels(blueprint.pretrained_cfg.get("mean", IMAGENET_MEAN), in_channels)
        self.std = for_channels(blueprint.pretrained_cfg.get("std", IMAGENET_STD), in_channels)
        self.probe_side = int(blueprint.pretrained_cfg["input_size"][-1])
        self.classifier_names = frozenset(blueprint.state_dict()) - frozenset(self.net.state_dict())
        self.receipt = self._load(name, weights, published=blueprint.pretrained_cfg)
        freeze_stages(self, frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.net.forward_intermediates(
            images, indices=list(self.indices), output_fmt="NCHW", intermediates_only=True
        )
        return features

    def shorten(self, count: int) -> None:
        self.indices = self.indices[:count]
        _prune(self.net, self.indices)

    def _load(self, name: str, weights: str | None, *, published: Mapping[str, Any]) -> Receipt | None:
        if weights is None:
            return None
        if weights == "imagenet":
            return load_backbone(self, _download(name, published.get("hf_hub_id")), source=f"timm's {name}")
        return load_backbone(self, weights)


def _blueprint(name: str) -> Any:
    """Builds the whole network without storage, to ask what it is."""
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=3, cutoff=0.5) or ["resnetv2_50"]
        raise UsageError(f"backbone.name={name} is no network of timm {timm.__version__}: try {', '.join(near)}.")
    network = _without_storage(name)
    if not hasattr(network, "forward_intermediates") or not hasattr(network, "prune_intermediate_layers"):
        raise UsageError(
            f"backbone.name={name}, but timm gives no feature maps of it: choose another, such as resnetv2_50."
        )
    return network


def _without_storage(name: str) -> Any:
    """The whole network on the meta device, but for those that timm < 1.0.30 sizes with tensors."""
    try:
        with torch.device("meta"):
            return timm.create_model(name)
    except RuntimeError:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name)


def _options(network: type[Any], output_stride: int | None) -> dict[str, Any]:
    known = inspect.signature(network.__init__).parameters
    options: dict[str, Any] = {key: value for key, value in _ANY_SIZE.items() if key in known}
    return options if output_stride is None else {**options, "output_stride": output_stride}


def _create(name: str, *, in_channels: int, **options: Any) -> Any:
    try:
        return timm.create_model(name, num_classes=0, in_chans=in_channels, **options)
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if "output_stride" not in options:
            raise
        raise UsageError(
            f"output_stride={options['output_stride']}, but timm cannot dilate {name}: use output_stride=null, or a "
            "backbone such as backbone=resnet50."
        ) from error


def _prune(network: Any, indices: tuple[int, ...]) -> None:
    """Takes out all that no level needs; timm < 1.0.31 leaves the head's norm, whose parameters would never learn."""
    network.prune_intermediate_layers(list(indices), prune_norm=True, prune_head=True)
    if isinstance(getattr(getattr(network, "head", None), "norm", None), nn.Module):
        network.head.norm = nn.Identity()


def _last_at_each_stride(strides: Sequence[int]) -> tuple[int, ...]:
    last = {stride: index for index, stride in enumerate(strides) if stride >= 4}
    return tuple(last.values())


def _level(info: dict[str, Any]) -> Level:
    return Level(channels=int(info["num_chs"]), stride=int(info["reduction"]))


def _download(name: str, repository: str | None) -> dict[str, Tensor]:
    """Takes timm's published weights from the Hugging Face cache, or from the network into it."""
    try:
        if repository:
            _reach(repository)
        state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    except (OSError, RuntimeError) as error:
        raise UsageError(
            f"The published weights of timm's {name} lie neither in {HF_HUB_CACHE} nor within reach ({error}): fetch "
            "them where there is a network and give the file by backbone.weights=PATH."
        ) from error
    return state


def _reach(repository: str) -> None:
    """Raises ConnectionError where no weights are cached and the Hub gives no answer, which timm waits 46 s to say."""
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in _FILES):
        return
    started = time.monotonic()
    while (error := _unanswered(hf_hub_url(repository, _FILES[0]))) is not None:
        if time.monotonic() - started > _PATIENCE:
            raise ConnectionError(str(error)) from error
        time.sleep(1)


def _unanswered(url: str) -> Exception | None:
    try:
        get_hf_file_metadata(url)
    except HfHubHTTPError:
        return None  # a refusal is an answer
    except Exception as error:  # of whichever HTTP client the library has
        return error
    return None
