"""A backbone goes on from another run."""

from pathlib import Path

import pytest
import torch

from visiontasks.backbones import CifarResNet
from visiontasks.contracts import UsageError
from visiontasks.transfer import init_backbone


def run_folder(path: Path, backbone: CifarResNet) -> Path:
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    (path / "checkpoints").mkdir()
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": state}, path / "checkpoints" / "last.ckpt")
    return path


def test_a_run_of_the_same_backbone_arrives_whole(tmp_path: Path) -> None:
    source, target = CifarResNet(depth=8), CifarResNet(depth=8)
    receipt = init_backbone(target, str(run_folder(tmp_path, source)))
    assert (receipt.share, receipt.missing, receipt.left_over) == (1.0, (), ())
    assert all(
        torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_a_run_of_another_backbone_is_refused_with_counts(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, CifarResNet(depth=14))
    with pytest.raises(UsageError, match=r"resnet8: \d+ of its \d+ tensors match, \d+ left over"):
        init_backbone(CifarResNet(depth=8), str(folder))
