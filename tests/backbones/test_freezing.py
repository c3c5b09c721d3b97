"""Freezing, on networks small enough to see through."""

import pytest
import torch
from torch import Tensor, nn

from visiontasks.backbones import CifarResNet, TorchvisionBackbone
from visiontasks.contracts import Level, UsageError
from visiontasks.layers.freezing import FreezableBackbone, freeze_stages, stage_parameters


class Tiny(FreezableBackbone):
    """A stem, a fine stage with dropout, a coarse one, and a branch around it."""

    levels = (Level(4, 2), Level(4, 4))
    in_channels = 1

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.fine = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Dropout(0.5))
        self.coarse = nn.Sequential(nn.Conv2d(4, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.around = nn.Conv2d(4, 4, 1, stride=2)

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(self.stem(images))
        return [fine, self.coarse(fine) + self.around(fine)]


def test_stages_are_what_reaches_a_level_and_no_finer_one() -> None:
    assert stage_parameters(Tiny()) == [
        ["stem.weight", "stem.bias", "fine.0.weight", "fine.0.bias"],
        ["coarse.0.weight", "coarse.0.bias", "coarse.1.weight", "coarse.1.bias", "around.weight", "around.bias"],
    ]


def test_stages_of_the_residual_networks_follow_their_layers() -> None:
    for backbone, layers in ((CifarResNet(depth=8), 3), (TorchvisionBackbone(name="resnet18"), 4)):
        stages = stage_parameters(backbone)
        assert [{name.split(".")[1] for name in stage} for stage in stages] == [
            {"conv1", "bn1", "layer1"},
            *({f"layer{index}"} for index in range(2, layers + 1)),
        ]


def test_asking_for_the_stages_changes_nothing() -> None:
    backbone = Tiny()
    backbone.stem.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.random.get_rng_state()
    assert "stem.weight" in stage_parameters(backbone)[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert not backbone.stem.weight.requires_grad
    assert backbone.training


def test_frozen_stages_stay_in_eval_and_do_not_move() -> None:
    backbone = Tiny()
    freeze_stages(backbone, 1)
    assert not any(module.training for module in (backbone.stem, *backbone.fine.modules()))
    assert all(module.training for module in (backbone, *backbone.coarse.modules(), backbone.around))
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    optimiser = torch.optim.SGD(backbone.parameters(), lr=0.1)
    for _ in range(3):
        backbone.train()(torch.randn(4, 1, 16, 16))[-1].square().sum().backward()
        optimiser.step()
    moved = {name for name, value in backbone.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[0] for name in moved} == {"coarse", "around"}


def test_all_stages_frozen_leave_nothing_in_training() -> None:
    backbone = Tiny()
    freeze_stages(backbone, 2)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert not any(module.training for child in backbone.train().children() for module in child.modules())


def test_thawed_parts_train_again() -> None:
    backbone = Tiny()
    freeze_stages(backbone, 2)
    backbone.coarse.requires_grad_(True)
    backbone.train()
    assert all(module.training for module in backbone.coarse.modules())
    assert not backbone.fine.training


@pytest.mark.parametrize("count", [-1, 3])
def test_more_stages_than_there_are(count: int) -> None:
    with pytest.raises(UsageError, match=f"frozen_stages={count}, but this backbone has 2 stages"):
        freeze_stages(Tiny(), count)
