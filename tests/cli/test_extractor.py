from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from visiontasks.cli.build import PARTS, build_extractor, build_task
from visiontasks.cli.command_line import CONF
from visiontasks.contracts import UsageError
from visiontasks.tasks.extractors import RandomFeatures

CLASSES = ("a", "b", "c")


def run(folder: Path, *overrides: str) -> tuple[Path, Any]:
    """A run folder with the checkpoint of a task that has learnt nothing, and the task."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", ["backbone=resnet20", "data=fashion_mnist", *overrides])
    parts: Any = OmegaConf.to_container(
        OmegaConf.masked_copy(composed, [part for part in PARTS if part in composed]), resolve=True
    )
    task = build_task(parts, classes=CLASSES)
    stored = {"config": task.config, "classes": list(CLASSES), "state_dict": task.state_dict()}
    (folder / "checkpoints").mkdir()
    torch.save(stored, folder / "checkpoints" / "best.ckpt")
    return folder, task.eval()


def test_a_classifier_of_ours_is_named_after_its_backbone_and_data(tmp_path: Path) -> None:
    folder, task = run(tmp_path)
    extractor = build_extractor(str(folder))
    assert (extractor.name, extractor.source) == ("resnet20_fashion_mnist", str(folder))
    assert (extractor.size, extractor.knows_classes) == ((28, 28), True)
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    features, logits = extractor(images)
    with torch.no_grad():
        torch.testing.assert_close(logits, task(task.images({"image": images})))
    assert features.shape == (2, 64)


def test_another_task_gives_its_backbone(tmp_path: Path) -> None:
    folder, _ = run(tmp_path, "task=pretraining", "data=cifar10", "data.image_size=[24,32]")
    extractor = build_extractor(str(folder / "checkpoints" / "best.ckpt"))
    assert (extractor.name, extractor.size, extractor.knows_classes) == ("resnet20_cifar10", (24, 32), False)


def test_a_library_network_takes_a_file(tmp_path: Path) -> None:
    from visiontasks.backbones import TorchvisionBackbone

    torch.manual_seed(0)
    backbone = TorchvisionBackbone(name="shufflenet_v2_x0_5")
    torch.save(backbone.net.state_dict(), tmp_path / "My weights.pth")
    extractor = build_extractor(f"torchvision:shufflenet_v2_x0_5:{tmp_path / 'My weights.pth'}")
    assert (extractor.name, extractor.size) == ("shufflenet_v2_x0_5_my_weights", (224, 224))
    assert torch.equal(extractor.task.backbone.net.conv1[0].weight, backbone.net.conv1[0].weight)


def test_random_features_need_nothing() -> None:
    assert isinstance(build_extractor("random"), RandomFeatures)


@pytest.mark.parametrize(
    ("named", "sentence"),
    [
        ("nowhere", "task.extractor=nowhere is no run of ours"),
        ("torchvision:resnet18:nowhere.pth", "nowhere.pth is no file"),
        ("torchvision:resnet0:nowhere.pth", "resnet0"),
    ],
)
def test_what_is_not_there_is_said(named: str, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        build_extractor(named)
