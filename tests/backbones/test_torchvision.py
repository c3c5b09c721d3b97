"""Torchvision's pyramids against torchvision's own networks."""

from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from visiontasks.backbones import TorchvisionBackbone
from visiontasks.contracts import UsageError
from visiontasks.weights import load_backbone

NODES = {  # what torchvision calls the block outputs that are our levels
    "vgg11_bn": ["features.7", "features.14", "features.21", "features.28"],
    "resnet18": ["layer1", "layer2", "layer3", "layer4"],
    "mobilenet_v2": ["features.3", "features.6", "features.13", "features.18"],
    "mobilenet_v3_small": ["features.1", "features.3", "features.8", "features.12"],
    "mnasnet1_0": ["layers.8", "layers.9", "layers.11", "layers.16"],
    "efficientnet_b0": ["features.2", "features.3", "features.5", "features.8"],
    "densenet121": ["features.denseblock1", "features.denseblock2", "features.denseblock3", "relu"],
    "googlenet": ["conv3", "inception3b", "inception4e", "inception5b"],
    "shufflenet_v2_x1_0": ["maxpool", "stage2", "stage3", "conv5"],
    "regnet_y_400mf": ["trunk_output.block1", "trunk_output.block2", "trunk_output.block3", "trunk_output.block4"],
    "convnext_tiny": ["features.1", "features.3", "features.5", "features.7"],
}
OPTIONS = {"googlenet": {"aux_logits": False, "transform_input": False, "init_weights": False}}


def images(side: int = 64) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


def published(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **{**OPTIONS.get(name, {}), **options}).eval()


def ours(name: str, network: Any, **options: Any) -> TorchvisionBackbone:
    backbone = TorchvisionBackbone(name=name, **options)
    receipt = load_backbone(backbone, network.state_dict(), source=name)
    assert receipt.share == 1
    assert set(receipt.left_over) == set(network.state_dict()) - {key.removeprefix("net.") for key in receipt.arrived}
    backbone.eval()
    return backbone


@pytest.mark.parametrize("name", NODES)
def test_levels_are_the_block_outputs_of_the_published_network(name: str) -> None:
    network = published(name)
    extractor = create_feature_extractor(network, {node: node for node in NODES[name]}, suppress_diff_warning=True)
    with torch.no_grad():
        expected = extractor.eval()(images())
        found = ours(name, network)(images())
    for feature, node in zip(found, NODES[name], strict=True):
        torch.testing.assert_close(feature, expected[node])


@pytest.mark.parametrize(("name", "inner"), [("alexnet", 5), ("squeezenet1_1", 9)])
def test_padding_for_the_grid_leaves_the_inner_features_as_published(name: str, inner: int) -> None:
    network = published(name)
    with torch.no_grad():
        expected = network.features(images(256))
        found = ours(name, network)(images(256))[-1]
    assert found.shape[-1] == expected.shape[-1] + 1
    torch.testing.assert_close(found[..., :inner, :inner], expected[..., :inner, :inner])


def test_dilated_resnet50_equals_torchvisions() -> None:
    network = published("resnet50", replace_stride_with_dilation=[False, True, True])
    backbone = ours("resnet50", network, output_stride=8)
    assert [level.stride for level in backbone.levels] == [4, 8, 8, 8]
    extractor = create_feature_extractor(network, NODES["resnet18"])
    with torch.no_grad():
        for feature, expected in zip(backbone(images()), extractor(images()).values(), strict=True):
            torch.testing.assert_close(feature, expected)


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet18", "resnext50_32x4d", "mobilenet_v2", "mnasnet1_0", "shufflenet_v2_x1_0"])
def test_dilation_computes_the_same_on_the_coarse_grid(name: str, output_stride: int) -> None:
    network = published(name)
    whole, dilated = ours(name, network), ours(name, network, output_stride=output_stride)
    assert [level.stride for level in dilated.levels] == [min(level.stride, output_stride) for level in whole.levels]
    with torch.no_grad():
        for coarse, fine in zip(whole(images()), dilated(images()), strict=True):
            step = fine.shape[-1] // coarse.shape[-1]
            torch.testing.assert_close(fine[..., ::step, ::step], coarse, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf"])
def test_networks_with_global_gates_dilate(name: str) -> None:
    backbone = TorchvisionBackbone(name=name, output_stride=8)
    assert [feature.shape[-1] for feature in backbone(images())] == [16, 8, 8, 8]


@pytest.mark.parametrize("name", ["vgg11", "alexnet", "densenet121", "googlenet", "convnext_tiny"])
def test_networks_that_cannot_dilate_say_what_can(name: str) -> None:
    with pytest.raises(UsageError, match=r"cannot be dilated: use .*resnet50"):
        TorchvisionBackbone(name=name, output_stride=8)


def test_squeezenet_already_ends_at_16() -> None:
    assert TorchvisionBackbone(name="squeezenet1_1", output_stride=16).levels[-1].stride == 16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, r"backbone\.name=resnet19 .* try resnet18"),
        ({"name": "vit_b_16"}, "backbone=timm"),
        ({"name": "resnet18", "output_stride": 4}, "output_stride=4"),
        ({"name": "resnet18", "frozen_stages": 5}, "from 0 to 4"),
        ({"name": "resnet18", "weights": "imagnet"}, "weights=imagnet is no file"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        TorchvisionBackbone(**options)
    assert "\n" not in str(error.value)


def test_statistics_are_those_of_the_published_weights() -> None:
    assert TorchvisionBackbone(name="resnet18").mean == (0.485, 0.456, 0.406)
    googlenet = TorchvisionBackbone(name="googlenet")
    assert (googlenet.mean, googlenet.std) == ((0.5,) * 3, (0.5,) * 3)


def test_googlenet_sees_what_its_own_transform_makes_of_imagenets_statistics() -> None:
    network = published("googlenet", transform_input=True)
    pixels = images().sigmoid()
    mean, std = (torch.tensor(values)[:, None, None] for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    transformed = network._transform_input((pixels - mean) / std)
    torch.testing.assert_close((pixels - 0.5) / 0.5, transformed, rtol=1e-5, atol=1e-5)


def test_imagenet_weights_come_from_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = published("squeezenet1_1")
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(network.state_dict(), cache / Path(url).name)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    backbone = TorchvisionBackbone(name="squeezenet1_1", weights="imagenet")
    assert backbone.receipt is not None
    assert set(backbone.receipt.left_over) == {"classifier.1.weight", "classifier.1.bias"}
    torch.testing.assert_close(backbone.net.get_parameter("features.0.weight"), network.features[0].weight)


def test_a_download_with_the_wrong_hash_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = tmp_path / "served.pth"
    torch.save(published("squeezenet1_1").state_dict(), served)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(torch.hub, "urlopen", lambda *_, **__: urlopen(served.as_uri()))
    with pytest.raises(UsageError, match=r"invalid hash value \(expected \"b8a52dc0\""):
        TorchvisionBackbone(name="squeezenet1_1", weights="imagenet")
    assert list((tmp_path / "home" / "hub" / "checkpoints").iterdir()) == []


def test_without_a_network_the_error_names_file_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise OSError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", offline)
    with pytest.raises(UsageError, match=r"hub/checkpoints/resnet18-f37072fd\.pth.*backbone\.weights=PATH"):
        TorchvisionBackbone(name="resnet18", weights="imagenet")


def test_densenets_published_names_of_old(tmp_path: Path) -> None:
    network = published("densenet121")
    old = {
        key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2.") if "denselayer" in key else key: value
        for key, value in network.state_dict().items()
    }
    torch.save(old, tmp_path / "densenet121.pth")
    backbone = TorchvisionBackbone(name="densenet121", weights=str(tmp_path / "densenet121.pth"))
    found = backbone.net.get_parameter("features.denseblock1.denselayer2.norm1.weight")
    torch.testing.assert_close(found, network.get_parameter("features.denseblock1.denselayer2.norm1.weight"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mobilenet_v2", "mobilenet_v2_features_fp16.pth"),
        ("vgg16", "vgg16_features_fp16.pth"),
        ("alexnet", "alexnet_features_fp16.pth"),
    ],
)
def test_real_published_weights_compute_what_torchvision_computes(shared_data: Path, name: str, file: str) -> None:
    path = shared_data / "weights" / file
    backbone = TorchvisionBackbone(name=name, weights=str(path)).eval()
    network = published(name)
    state = torch.load(path, weights_only=True)
    network.features.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    with torch.no_grad():
        expected = network.features(images(224))
        found = backbone(images(224))[-1]
    inner = 4 if name == "alexnet" else 7  # what lies further out sees the padding through its convolutions
    torch.testing.assert_close(found[..., :inner, :inner], expected[..., :inner, :inner], rtol=1e-4, atol=1e-4)


def test_batch_norm_conversion_reaches_the_steps_that_run() -> None:
    backbone = TorchvisionBackbone(name="resnet18")
    backbone = nn.SyncBatchNorm.convert_sync_batchnorm(backbone)  # type: ignore[no-untyped-call]
    assert isinstance(backbone.net.get_submodule(backbone.steps[1]), nn.SyncBatchNorm)
