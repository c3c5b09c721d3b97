"""Timm's pyramids against timm's own networks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from visiontasks.backbones import TimmBackbone
from visiontasks.contracts import UsageError
from visiontasks.layers.freezing import stage_parameters
from visiontasks.weights import load_backbone

STRIDES = {
    "resnetv2_18": [4, 8, 16, 32],
    "mobilenetv4_conv_small_035": [4, 8, 16, 32],
    "convnext_atto": [4, 8, 16, 32],
    "regnetx_002": [4, 8, 16, 32],
    "swin_tiny_patch4_window7_224": [4, 8, 16, 32],
    "vit_tiny_patch16_224": [16],
}


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", STRIDES)
def test_pyramids_of_every_kind(name: str) -> None:
    backbone = TimmBackbone(name=name, frozen_stages=1)
    assert [level.stride for level in backbone.levels] == STRIDES[name]
    features = backbone.train()(images())
    assert [tuple(f.shape) for f in features] == [(2, c, 64 // s, 64 // s) for c, s in backbone.levels]
    stages = stage_parameters(backbone)
    assert {name for stage in stages for name in stage} == {name for name, _ in backbone.named_parameters()}
    frozen = {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}
    assert frozen == set(stages[0])


@pytest.mark.parametrize("name", ["resnetv2_18", "convnext_atto", "swin_tiny_patch4_window7_224"])
def test_levels_are_the_modules_that_timm_lists(name: str) -> None:
    network = timm.create_model(name).eval()
    seen: dict[str, Tensor] = {}
    listed = [info["module"] for info in network.feature_info if info["reduction"] >= 4]
    for module in listed:
        network.get_submodule(module).register_forward_hook(keep(seen, module))
    side = network.pretrained_cfg["input_size"][-1]
    backbone = TimmBackbone(name=name)
    load_backbone(backbone, network.state_dict(), source=name)
    with torch.no_grad():
        network(images(side))
        found = backbone.eval()(images(side))
    for level, feature, module in zip(backbone.levels, found, listed, strict=True):
        expected = seen[module] if seen[module].shape[1] == level.channels else seen[module].permute(0, 3, 1, 2)
        torch.testing.assert_close(feature, expected, rtol=1e-4, atol=1e-4)


def keep(seen: dict[str, Tensor], name: str) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(_: nn.Module, __: object, output: Tensor) -> None:
        seen[name] = output

    return hook


def test_real_published_weights_load_by_their_own_names(shared_data: Path) -> None:
    path = shared_data / "weights" / "efficientnet_lite0_timm_fp16.pth"
    backbone = TimmBackbone(name="tf_efficientnet_lite0", weights=str(path)).eval()
    assert (backbone.mean, backbone.std) == ((0.5,) * 3, (0.5,) * 3)
    assert backbone.receipt is not None
    assert backbone.receipt.share == 1
    network = timm.create_model("tf_efficientnet_lite0").eval()
    network.load_state_dict({key: value.float() for key, value in torch.load(path, weights_only=True).items()})
    with torch.no_grad():
        expected = network.forward_features(images())
        found = network.bn2(network.conv_head(backbone(images())[-1]))
    torch.testing.assert_close(found, expected)


def test_output_stride_is_timms_own() -> None:
    backbone = TimmBackbone(name="resnet18", output_stride=8)
    assert [level.stride for level in backbone.levels] == [4, 8, 8, 8]
    assert [feature.shape[-1] for feature in backbone(images())] == [16, 8, 8, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnetv2_51"}, "try resnetv2_50"),
        ({"name": "vit_tiny_patch16_224", "output_stride": 8}, "cannot dilate vit_tiny_patch16_224"),
        ({"name": "resnet18", "output_stride": 3}, "output_stride=3"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TimmBackbone(**options)


def test_without_a_network_the_error_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model

    def offline(name: str, *, pretrained: bool = False, **options: object) -> Any:
        if pretrained:
            raise OSError("no network")
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UsageError, match=r"resnet18 .*no network.*backbone\.weights=PATH"):
        TimmBackbone(name="resnet18", weights="imagenet")
