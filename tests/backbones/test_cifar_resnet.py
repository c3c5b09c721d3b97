"""The CIFAR residual network against the paper and against published weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.backbones import CifarResNet
from visiontasks.contracts import Level, UsageError


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_sizes_are_those_of_the_papers_table_6(depth: int, millions: float) -> None:
    backbone = CifarResNet(depth=depth)
    parameters = sum(parameter.numel() for parameter in backbone.parameters()) + 64 * 10 + 10
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05 if depth == 110 else 0.006)
    layers = sum(isinstance(module, torch.nn.Conv2d) for module in backbone.modules()) + 1
    assert layers == depth


def test_levels() -> None:
    assert CifarResNet().levels == (Level(16, 1), Level(32, 2), Level(64, 4))


def test_plain_network_has_the_same_parameters_and_no_shortcut() -> None:
    residual, plain = CifarResNet().eval(), CifarResNet(shortcut=False).eval()
    plain.load_state_dict(residual.state_dict())
    for module in plain.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.zeros_(module.weight)
    images = torch.randn(1, 3, 32, 32)
    assert all(feature.abs().max() == 0 for feature in plain(images))
    residual.load_state_dict({**plain.state_dict(), "net.bn1.weight": torch.ones(16)})
    stem = residual.net[:3](images)
    torch.testing.assert_close(residual(images)[0], stem)


def test_published_weights_compute_the_published_network(shared_data: Path) -> None:
    path = shared_data / "weights" / "cifar10_resnet20.pth"
    backbone = CifarResNet(weights=str(path)).eval()
    assert backbone.receipt is not None
    assert backbone.receipt.left_over == ("linear.weight", "linear.bias")
    assert len(backbone.receipt.missing) == 19
    state = torch.load(path, weights_only=True)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(backbone(images)[-1], functional_resnet20(images, state), rtol=1e-4, atol=1e-4)


def functional_resnet20(x: Tensor, state: dict[str, Tensor]) -> Tensor:
    """The published network written down once more, from its weights alone."""
    x = F.relu(norm(F.conv2d(x, state["conv1.weight"], padding=1), "bn1", state))
    for stage in (1, 2, 3):
        for block in range(3):
            name = f"layer{stage}.{block}"
            stride = 2 if stage > 1 and block == 0 else 1
            out = F.conv2d(x, state[f"{name}.conv1.weight"], stride=stride, padding=1)
            out = F.relu(norm(out, f"{name}.bn1", state))
            out = norm(F.conv2d(out, state[f"{name}.conv2.weight"], padding=1), f"{name}.bn2", state)
            if stride == 2:
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                x = torch.cat([zeros, x[:, :, ::2, ::2], zeros], dim=1)
            x = F.relu(out + x)
    return x


def norm(x: Tensor, name: str, state: dict[str, Tensor]) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 18}, "6n \\+ 2"),
        ({"output_stride": 8}, "leave it null"),
        ({"output_stride": 3}, "output_stride=3"),
        ({"weights": "imagenet"}, "weights=PATH"),
    ],
)
def test_mistakes_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        CifarResNet(**options)
