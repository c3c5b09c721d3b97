"""Timm's pyramids against timm's own networks."""

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save
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


TINY = "test_resnet"  # 0.5 M parameters


class Hub(BaseHTTPRequestHandler):
    """Stands in for the Hugging Face Hub: gives one file to all who ask, after some refusals."""

    content = b""
    refusals = 0

    def do_HEAD(self) -> None:
        self.send_response(200 if self.refusals == 0 else 503)
        type(self).refusals = max(0, self.refusals - 1)
        for name, value in {"X-Repo-Commit": "0" * 40, "ETag": "1", "Content-Length": str(len(self.content))}.items():
            self.send_header(name, value)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(self.content)

    def log_message(self, *_: object) -> None:
        pass


def meet(monkeypatch: pytest.MonkeyPatch, cache: Path, *, port: int) -> None:
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))


@pytest.fixture
def hub() -> Iterator[HTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_published_weights_arrive_from_a_hub_that_hesitates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HTTPServer
) -> None:
    network = timm.create_model(TINY)
    monkeypatch.setattr(Hub, "content", save(network.state_dict()))
    monkeypatch.setattr(Hub, "refusals", 3)
    meet(monkeypatch, tmp_path, port=hub.server_port)
    backbone = TimmBackbone(name=TINY, weights="imagenet")
    assert Hub.refusals == 0
    own = backbone.net.state_dict()
    assert own
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in own.items())

    meet(monkeypatch, tmp_path, port=1)  # no network any more: they are cached
    again = TimmBackbone(name=TINY, weights="imagenet")
    assert all(torch.equal(tensor, own[name]) for name, tensor in again.net.state_dict().items())


def test_without_a_network_the_error_names_the_remedy_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meet(monkeypatch, tmp_path, port=1)
    started = time.monotonic()
    with pytest.raises(UsageError, match=rf"timm's {TINY} .*refused.*backbone\.weights=PATH"):
        TimmBackbone(name=TINY, weights="imagenet")
    assert time.monotonic() - started < 15
