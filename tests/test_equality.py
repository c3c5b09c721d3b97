"""Every head and every loss of conf/ on several processes with unlike, uneven parts learns and measures what one does.

Not equal, and why: dropout, which each process draws for itself, is off here; batch norm is that of all processes, as
trainer.sync_batchnorm=true makes it; methods of pretraining compare images, and take equal parts.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from tests.test_combinations import HEADS, SMALL, config, default_head
from visiontasks.cli.build import build_task
from visiontasks.cli.command_line import CONF, choices
from visiontasks.contracts import IGNORE, Backbone, Batch, Level
from visiontasks.layers.batch_norm import ProcessBatchNorms
from visiontasks.layers.distributed import alone, rank, world_size
from visiontasks.tasks.base import Task

SIDE = 64
CLASSES = ("a", "b", "c", "d", "e", "f")
PARTS = {2: ((0, 1, 3, 4, 5), (2,)), 3: ((0, 1, 5), (2,), (3, 4))}  # image 2 has no object, and no pixel that counts
EQUAL = {2: ((0, 1, 2), (3, 4, 5)), 3: ((0, 1), (2, 3), (4, 5))}
EMPTY = 2
TOLERANCE = 1e-6  # relative to the norm, in float32
SIZES = (1, 2, 3, 5, 21, 22)  # images of an evaluation
OWN = {  # beside the heads with their usual losses, and the losses with their usual head
    "class weights": ("classification", "linear", "task.class_weights=[1,2,3,4,5,6]"),
    "label smoothing": ("classification", "linear", "task.label_smoothing=0.1"),
    "several labels": ("classification", "linear", "task.multi_label=true"),
    "weighted pixels": ("segmentation", "fcn", "task.class_weights=[1,2,3,4,5,6]"),
    "auxiliary": ("segmentation", "fcn", "task.auxiliary=0.4"),
}
Case = tuple[str, ...]  # task, head, overrides
Learnt = dict[str, Tensor]
Evaluated = dict[str, Tensor]


def cases() -> dict[str, Case]:
    """By name; a new file in conf/head or conf/loss is a new one."""
    found: dict[str, Case] = {head: (task, head) for task, heads in HEADS.items() for head in heads}
    losses = [name for name in choices("loss") if name not in choices("task")]
    found |= {f"loss={loss}": ("segmentation", default_head("segmentation"), f"loss={loss}") for loss in losses}
    return found | OWN


CASES = cases()
MEASURED = {task: (task, default_head(task)) for task in HEADS} | {
    "several labels": OWN["several labels"],
    "masks of objects": ("detection", "mask_rcnn"),
}


class Plain(Backbone):
    """Three convolutions."""

    levels = (Level(8, 8), Level(12, 16), Level(16, 32))
    in_channels = 3
    mean = std = (0.5, 0.5, 0.5)

    def __init__(self) -> None:
        super().__init__()
        steps = ((3, 8, 8), (8, 12, 2), (12, 16, 2))
        self.stages = nn.ModuleList(nn.Conv2d(before, after, stride, stride) for before, after, stride in steps)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = [images]
        for stage in self.stages:
            maps.append(stage(maps[-1]).relu())
        return maps[1:]


class Learner(nn.Module):
    """A task whose forward is its training step, as a trainer wraps it."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task

    def forward(self, images: Batch) -> Tensor:
        return self.task.training_step(images, 0)  # type: ignore[no-any-return]


@cache
def composed(case: Case) -> dict[str, Any]:
    """The config of a case: a composition for each task and loss, in which the rest is changed."""
    task, head, *overrides = case
    loss = [word for word in overrides if word.startswith("loss=")]
    changed = OmegaConf.create(usual(task, *loss))
    changed.head = OmegaConf.load(CONF / "head" / f"{head}.yaml")
    small = ["head.width=16"] if task == "detection" and head != "ssd" else []
    changed.merge_with_dotlist([*SMALL.get(head, []), *small, *(word for word in overrides if word not in loss)])
    changed.backbone = {"_target_": f"{__name__}.Plain"}
    container: Any = OmegaConf.to_container(changed, resolve=True)
    return container  # type: ignore[no-any-return]


@cache
def usual(task: str, *loss: str) -> dict[str, Any]:
    return config(f"task={task}", *loss)


def built(case: Case) -> Task:
    """A small task, the same in every process, without dropout."""
    task = case[0]
    torch.manual_seed(0)
    made = build_task(composed(case), classes=CLASSES)
    for layer in made.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
        if task == "detection" and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # scores that differ between places
    return made


def batch(images: Sequence[int], task: Task, *, views: int) -> Batch:
    """Images of noise with all annotations, each a function of its number alone."""
    samples = [sample(index, views) for index in images]
    joined: Batch = {name: torch.stack([each[name] for each in samples]) for name in ("image", "mask", "label")}
    joined |= {name: [each[name] for each in samples] for name in ("bboxes", "labels", "masks", "crowd", "area")}
    joined["views"] = list(torch.stack([each["views"] for each in samples]).unbind(1)) if views else []
    if getattr(task, "multi_label", False):
        joined["label"] = (torch.arange(len(CLASSES)) <= joined["label"][:, None]).float()
    return joined | {"index": torch.tensor(images)}


def sample(index: int, views: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(index)
    side = 2 * SIDE  # of views, which jigsaw cuts
    objects = 0 if index == EMPTY else 1 + index % 3
    corners = torch.randint(0, SIDE // 2, (objects, 2), generator=random)
    boxes = torch.cat([corners, corners + torch.randint(10, SIDE // 2, corners.shape, generator=random)], dim=1)
    places = torch.arange(SIDE)
    inside = (places >= boxes[:, :2, None]) & (places < boxes[:, 2:, None])  # (N, 2, SIDE) columns, rows
    mask = torch.randint(0, len(CLASSES), (SIDE, SIDE), dtype=torch.uint8, generator=random)
    mask[: 8 * (index % 5)] = IGNORE
    return {
        "image": torch.randint(0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=random),
        "views": torch.randint(0, 256, (views, 3, side, side), dtype=torch.uint8, generator=random),
        "mask": mask if index != EMPTY else torch.full_like(mask, IGNORE),
        "label": torch.randint(0, len(CLASSES), (), generator=random),
        "bboxes": boxes.float(),
        "labels": torch.randint(0, len(CLASSES), (objects,), generator=random),
        "masks": (inside[:, 1, :, None] & inside[:, 0, None]).to(torch.uint8),
        "crowd": torch.zeros(objects, dtype=torch.uint8),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).double(),
    }


def learnt(case: Case, *, steps: int) -> Learnt:
    """All gradients of the last step, and all weights after it, one after the other."""
    task = built(case)
    learner: nn.Module = Learner(task)
    if world_size() > 1:
        ProcessBatchNorms().apply(learner)
        learner = DistributedDataParallel(learner)
    own = own_part(case[0])
    optimizer = torch.optim.SGD([each for each in task.parameters() if each.requires_grad], lr=1e-3, momentum=0.9)
    task.train()
    for step in range(steps):
        optimizer.zero_grad()
        images = [index + 6 * step if index != EMPTY else index for index in own]
        loss = learner(batch(images, task, views=getattr(task.head, "fewest", 0)))
        loss.backward()
        gradients = [each.grad.flatten() for each in task.parameters() if each.grad is not None]
        optimizer.step()
    weights = torch.cat([each.detach().flatten() for each in task.parameters()])
    return {"gradient": torch.cat(gradients), "weights": weights}


def own_part(task: str) -> Sequence[int]:
    """The images of this process; all of them where it is alone."""
    if world_size() == 1:
        return range(6)
    return (EQUAL if task == "pretraining" else PARTS)[world_size()][rank()]


def measured(case: Case, images: int) -> Evaluated:
    """The figures of so many images, every so-manieth of them in this process, in batches of two."""
    task = built(case).eval()
    for metric in task.metrics.modules():
        if isinstance(metric, Metric):
            metric.sync_on_compute = world_size() > 1  # torchmetrics knows nothing of `alone`
    own = list(range(rank(), images, world_size()))
    with torch.no_grad():
        for start in range(0, len(own), 2):
            task.evaluation_step(batch(own[start : start + 2], task, views=2 * (case[0] == "pretraining")))
    figures, tables = task.metrics.compute()
    if case[0] == "pretraining":
        figures.pop("loss")  # which compares the images of a batch
    return {name: value.double() for name, value in (figures | tables).items()}


def distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def compared(find: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
    """The relative distance of what is found here from what one process finds."""
    found = find()
    with alone() if world_size() > 1 else nullcontext():
        expected = find()
    assert found.keys() == expected.keys()
    same = {name: torch.equal(value.isnan(), expected[name].isnan()) for name, value in found.items()}
    return {
        name: distance(value.nan_to_num(), expected[name].nan_to_num()) if same[name] else torch.inf
        for name, value in found.items()
    }


def measure(process: int, processes: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes)
    errors: dict[Any, dict[str, float]] = {}
    for name, case in CASES.items():
        errors[name] = compared(lambda: learnt(case, steps=steps))  # noqa: B023
    for name, case in MEASURED.items() if steps == 1 else ():
        errors |= {(name, size): compared(lambda: measured(case, size)) for size in SIZES}  # noqa: B023
    torch.save(errors, f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


def ran(folder: Path, processes: int, *, steps: int) -> list[Any]:
    """What every one of so many processes measured."""
    for case in (CASES | MEASURED).values():
        composed(case)  # once, for all processes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not
    mp.start_processes(measure, args=(processes, str(folder), steps), nprocs=processes, start_method="fork")
    torch.set_num_threads(threads)
    return [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(processes)]


def worst(found: list[Any], key: Any) -> dict[str, float]:
    return {name: max(each[key][name] for each in found) for name in found[0][key]}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ran(tmp_path_factory.mktemp("two"), 2, steps=1)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ran(tmp_path_factory.mktemp("three"), 3, steps=1)


@pytest.fixture(scope="module", params=[2, 3])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return ran(tmp_path_factory.mktemp("long"), request.param, steps=30)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_two_processes_is_that_of_one(name: str, two: list[Any]) -> None:
    assert worst(two, name)["gradient"] < TOLERANCE


@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("name", MEASURED)
def test_the_figures_of_two_processes_are_those_of_one(name: str, images: int, two: list[Any]) -> None:
    wrong = {figure: error for figure, error in worst(two, (name, images)).items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_three_processes_is_that_of_one(name: str, three: list[Any]) -> None:
    assert worst(three, name)["gradient"] < TOLERANCE


@pytest.mark.exhaustive
@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("name", MEASURED)
def test_the_figures_of_three_processes_are_those_of_one(name: str, images: int, three: list[Any]) -> None:
    wrong = {figure: error for figure, error in worst(three, (name, images)).items() if not error < TOLERANCE}
    assert not wrong


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_thirty_steps_of_several_processes_are_those_of_one(name: str, long: list[Any]) -> None:
    assert worst(long, name)["weights"] < 1e-5


def test_every_head_and_loss_of_conf_is_a_case() -> None:
    heads = set(choices("head")) - set(choices("task"))
    losses = set(choices("loss")) - set(choices("task"))
    assert heads | {f"loss={loss}" for loss in losses} <= set(CASES)
