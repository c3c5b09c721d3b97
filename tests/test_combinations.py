"""Every backbone of conf/ under every head of conf/ that fits: one training step each."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import Tensor

from visiontasks.cli.build import PARTS, build_task
from visiontasks.cli.command_line import CONF, choices
from visiontasks.contracts import UsageError
from visiontasks.heads import Jigsaw
from visiontasks.tasks import Generation
from visiontasks.tasks.base import Task

ROOT = Path(__file__).parents[1]


def heads() -> dict[str, list[str]]:
    """The heads of conf/ by the task that they serve; aliases, which bear the name of a task, left out."""
    served: dict[str, list[str]] = {}
    for name in sorted(set(choices("head")) - set(choices("task"))):
        chosen = OmegaConf.load(CONF / "head" / f"{name}.yaml")
        target = chosen.get("head", chosen)["_target_"]
        served.setdefault(get_class(target).serves, []).append(name)
    return served


def causal(head: str) -> bool:
    """Whether a head of generation comes with a backbone of its own, and fits no other."""
    target = OmegaConf.load(CONF / "head" / f"{head}.yaml")
    return getattr(get_class(target.get("head", target)["_target_"]), "causal", False)


HEADS = heads()
CAUSAL = [head for head in HEADS["generation"] if causal(head)]
CELLS = [(task, backbone, head) for task, heads in HEADS.items() for backbone in choices("backbone") for head in heads]
FAMILIES = ("vgg11_bn", "resnet18", "resnet20", "mobilenet_v2", "densenet121", "shufflenet_v2", "convnext_tiny", "timm")
SMALL = {
    "vgg": ["head.hidden=64", "head.grid=2"],
    "moco": ["head.queue=64"],
    "moco_v3": ["head.hidden=64"],
    "byol": ["head.hidden=64"],
    "simsiam": ["head.dim=64"],
    "barlow_twins": ["head.dim=64"],
    "vicreg": ["head.dim=64"],
    "swav": ["head.hidden=64"],
    "dino": ["head.hidden=64", "head.outputs=64"],
    "jigsaw": ["head.permutations=9", "head.hidden=64"],
    **{head: ["head.generator.width=8", "data.image_size=64"] for head in HEADS["generation"] if head not in CAUSAL},
    **{head: ["head.hidden=24", "data.image_size=64"] for head in CAUSAL},
}


def default_head(task: str) -> str:
    """The head that a task has where none is named."""
    return str(OmegaConf.load(CONF / "head" / f"{task}.yaml")["defaults"][0])


def usual(task: str, backbone: str, head: str) -> bool:
    """Whether every run of the tests takes this step: one backbone under every head, each family under one head."""
    return backbone == "resnet18" or (backbone in FAMILIES and head == default_head(task))


def config(*overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", list(overrides))
    parts = [part for part in (*PARTS, "trainer") if part in composed]  # the task looks at the trainer
    container: Any = OmegaConf.to_container(OmegaConf.masked_copy(composed, parts), resolve=True)
    return container  # type: ignore[no-any-return]


def step(task: Task) -> float:
    """One optimiser step on four images; returns the loss."""
    boxes = torch.tensor([[8.0, 16.0, 40.0, 56.0], [2.0, 2.0, 62.0, 60.0], [44.0, 4.0, 56.0, 18.0]])
    places = torch.arange(64)
    inside = (places >= boxes[:, :2, None]) & (places < boxes[:, 2:, None])  # (3, 2, 64) columns, rows
    regions = (inside[:, 1, :, None] & inside[:, 0, None]).to(torch.uint8)  # (3, 64, 64)
    batch = {
        "image": torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8),
        "index": torch.arange(4),
        "label": torch.tensor([0, 1, 2, 0]),
        "mask": torch.randint(0, 3, (4, 64, 64), dtype=torch.uint8),
        "bboxes": [boxes, boxes[:0], boxes[1:], boxes[2:]],
        "labels": [torch.tensor(labels, dtype=torch.int64) for labels in ([0, 1, 2], [], [1, 2], [2])],
        "masks": [regions, regions[:0], regions[1:], regions[2:]],
    }
    views = getattr(task.head, "fewest", 0)
    side = 128 if isinstance(task.head, Jigsaw) else 64
    batch |= {"views": [torch.randint(0, 256, (4, 3, side, side), dtype=torch.uint8) for _ in range(views)]}
    optimizer = torch.optim.Adam(task.parameters(), lr=1e-3)  # moves all that has a gradient, and none far
    task.train()
    loss: Tensor = both_losses(task, batch) if isinstance(task, Generation) else task.training_step(batch, 0)
    loss.backward()
    optimizer.step()
    return loss.item()


def both_losses(task: Generation, batch: dict[str, Any]) -> Tensor:
    """What the critic and the generator are to make small, which a trainer has them do by turns."""
    drawn = task.draw_for(batch)
    return task.critic_loss(batch["image"].float() / 127.5 - 1, drawn) + task.generator_loss(drawn)


def one_step(task: str, backbone: str, head: str) -> None:
    torch.manual_seed(0)
    parts = config(f"task={task}", f"backbone={backbone}", f"head={head}", *SMALL.get(head, []))
    if task == "detection" and not {level.stride for level in instantiate(parts["backbone"]).levels} & {8, 16, 32}:
        with pytest.raises(UsageError, match="strides"):
            build_task(parts, classes=("a", "b", "c"))
        return
    if head in CAUSAL:
        with pytest.raises(UsageError, match=r"learns each pixel from those before it, and .* sees them all"):
            build_task(parts, classes=("a", "b", "c"))
        return
    if head == "wgan_gp" and backbone.startswith("mobilenet_v3"):
        with pytest.raises(UsageError, match=r"a layer without a second derivative \(hardsigmoid"):
            build_task(parts, classes=("a", "b", "c"))
        return
    learns(build_task(parts, classes=("a", "b", "c")), least=0.5 if head == "ssd" else 0.7)


def learns(built: Task, *, least: float) -> None:
    """Two steps move more than a share of the weights.

    Stochastic depth leaves blocks out; SSD's coarse levels see no object here.
    """
    learning = [parameter for parameter in built.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in learning]
    assert math.isfinite(step(built))
    assert math.isfinite(step(built))  # a head that starts at zero moves the backbone in the second step
    moved = sum(not torch.equal(old, new) for old, new in zip(before, learning, strict=True))
    assert moved > least * len(before)


@pytest.mark.parametrize(("task", "backbone", "head"), [cell for cell in CELLS if usual(*cell)])
def test_a_family_of_backbones_under_a_head(task: str, backbone: str, head: str) -> None:
    one_step(task, backbone, head)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("task", "backbone", "head"), [cell for cell in CELLS if not usual(*cell)])
def test_a_backbone_under_a_head(task: str, backbone: str, head: str) -> None:
    one_step(task, backbone, head)


@pytest.mark.parametrize("head", CAUSAL)
def test_an_autoregressive_head_on_its_own_backbone(head: str) -> None:
    small = ("backbone.width=12", "backbone.depth=2", "head.hidden=24", "head.values=8", "data.image_size=64")
    torch.manual_seed(0)
    learns(build_task(config("task=generation", f"head={head}", *small), classes=("a", "b", "c")), least=0.9)


def test_every_task_has_heads() -> None:
    assert set(HEADS) == set(choices("task"))


def test_the_documented_table_is_that_of_conf() -> None:
    table = (ROOT / "docs" / "combinations.md").read_text()
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[1:] == choices("backbone")
