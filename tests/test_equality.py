"""Every head and every loss of conf/ on several processes with unlike, uneven parts learns and measures what one does.

Not equal, and why: dropout, which each process draws for itself, is off here; batch norm is that of all processes, as
trainer.sync_batchnorm=true makes it; methods of pretraining compare images, and take equal parts. Games of generation
step two optimisers by themselves: tests/tasks/test_generation_processes.py and test_generation_metrics.py compare them.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from tests.test_combinations import CAUSAL, HEADS, SMALL, config, default_head
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
ROUNDED = 3e-5  # in float32 where a batch norm divides by small deviations; in float64 they are as near as the others
CANCELLING = {"rotation": 1e-5}  # of four turns nearly nothing is left: one process is off by 2e-6 in float32 itself
LONG_SUMS = {"fcn8s", "fcn16s", "fcn32s"}  # one process is off by 7e-6 in float32 itself
PURE = 1e-10  # in float64
CHOOSING = {"faster_rcnn", "mask_rcnn"}  # among near equals: in thirty steps one process is 1e-5 off by rounding
SIZES = (1, 2, 3, 5, 21, 22)  # images of an evaluation
OWN = {  # beside the heads with their usual losses, and the losses with their usual head
    "class weights": ("classification", "linear", "task.class_weights=[1,2,3,4,5,6]"),
    "label smoothing": ("classification", "linear", "task.label_smoothing=0.1"),
    "several labels": ("classification", "linear", "task.multi_label=true"),
    "weighted pixels": ("segmentation", "fcn", "task.class_weights=[1,2,3,4,5,6]"),
    "auxiliary": ("segmentation", "fcn", "task.auxiliary=0.4"),
}
ONE_LOSS = [task for task in HEADS if task != "generation"]
DENSITIES = {  # the heads of generation that have one loss
    "vae": ("generation", "vae", "task.image_size=64", "head.generator.width=4"),
    **{head: ("generation", head, "task.image_size=64", "head.values=8", "head.hidden=12") for head in CAUSAL},
}
Case = tuple[str, ...]  # task, head, overrides
Learnt = dict[str, Tensor]
Evaluated = dict[str, Tensor]


def cases() -> dict[str, Case]:
    """By name; a new file in conf/head or conf/loss is a new one."""
    found: dict[str, Case] = {head: (task, head) for task in ONE_LOSS for head in HEADS[task]}
    losses = [name for name in choices("loss") if name not in choices("task")]
    found |= {f"loss={loss}": ("segmentation", default_head("segmentation"), f"loss={loss}") for loss in losses}
    return found | OWN | DENSITIES


CASES = cases()
MEASURED = {task: (task, default_head(task)) for task in ONE_LOSS} | {
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
    changed = OmegaConf.create(usual(task, *loss, *([f"head={head}"] if task == "generation" else [])))
    if task != "generation":
        changed.head = OmegaConf.load(CONF / "head" / f"{head}.yaml")
    small = ["head.width=16"] if task == "detection" and head != "ssd" else []
    small += SMALL.get(head, []) if task != "generation" else []
    changed.merge_with_dotlist([*small, *(word for word in overrides if word not in loss)])
    if head in CAUSAL:
        changed.backbone.update({"depth": 2, "width": 6})
    else:
        changed.backbone = {"_target_": f"{__name__}.Plain"}
    container: Any = OmegaConf.to_container(changed, resolve=True)
    return container  # type: ignore[no-any-return]


@cache
def usual(task: str, *overrides: str) -> dict[str, Any]:
    return config(f"task={task}", *overrides)


def built(case: Case, dtype: torch.dtype = torch.float32) -> Task:
    """A small task, the same in every process, without dropout."""
    task = case[0]
    torch.manual_seed(0)
    made = build_task(composed(case), classes=CLASSES)
    for layer in made.modules():
        if isinstance(layer, nn.Dropout | nn.Dropout2d):
            layer.p = 0.0
        if task == "detection" and isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # scores that differ between places
    return made.to(dtype)


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


def normed(task: nn.Module) -> bool:
    return any(isinstance(layer, _BatchNorm) for layer in task.modules())


def learnt(case: Case, *, steps: int, dtype: torch.dtype) -> Learnt:
    """All gradients of the last step, and all weights after it, one after the other."""
    task = built(case, dtype)
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
            metric.distributed_available_fn = lambda: world_size() > 1  # torchmetrics knows nothing of `alone`
    own = list(range(rank(), images, world_size()))
    with torch.no_grad():
        for start in range(0, len(own), 2):
            task.evaluation_step(batch(own[start : start + 2], task, views=2 * (case[0] == "pretraining")))
    figures, tables = task.metrics.compute()
    if case[0] == "pretraining":
        figures.pop("loss")  # which compares the images of a batch
    return {name: value.double() for name, value in (figures | tables).items()}


def distance(found: Tensor, expected: Tensor) -> float:
    if not torch.equal(found.isnan(), expected.isnan()):
        return torch.inf
    found, expected = found.nan_to_num(), expected.nan_to_num()
    return ((found - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def compared(find: Callable[[], dict[str, Tensor]]) -> dict[str, float]:
    """The relative distance of what is found here from what one process finds; asked of the first process alone."""
    found = find()
    if rank() > 0:
        return {}
    with alone():
        expected = find()
    assert found.keys() == expected.keys()
    return {name: distance(value, expected[name]) for name, value in found.items()}


def measure(process: int, processes: int, folder: str, steps: int, full: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes)
    errors: dict[Any, dict[str, float]] = {}
    for name, case in CASES.items():
        for dtype in precisions(case, steps=steps, full=full):
            errors[name, dtype] = compared(lambda: learnt(case, steps=steps, dtype=dtype))  # noqa: B023
    for name, case in MEASURED.items() if steps == 1 else ():
        for size in SIZES if full or name != "masks of objects" else ():
            errors[name, size] = compared(lambda: measured(case, size))  # noqa: B023
    if process == 0:
        torch.save(errors, f"{folder}/errors.pt")
    dist.barrier()
    dist.destroy_process_group()


def precisions(case: Case, *, steps: int, full: bool) -> list[torch.dtype]:
    """Those in which a case is compared: float64 where what is rounded grows, in full float32 too.

    In thirty steps of float32 SimCLR's weights are 0.09 off on one process itself; in float64 processes agree to 1e-13.
    """
    if case[1] in CHOOSING:
        return [torch.float64 if steps > 1 else torch.float32]
    if not normed(built(case)) and case[1] not in LONG_SUMS:
        return [torch.float32]
    return [torch.float32, torch.float64] if full else [torch.float64]


def ran(folder: Path, processes: int, *, steps: int = 1, full: bool = False) -> Any:
    """The distances of what so many processes find from what one finds."""
    for case in (CASES | MEASURED).values():
        composed(case)  # once, for all processes
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not
    mp.start_processes(measure, args=(processes, str(folder), steps, full), nprocs=processes, start_method="fork")
    torch.set_num_threads(threads)
    return torch.load(folder / "errors.pt", weights_only=False)


def check_gradient(found: Any, name: str) -> None:
    limits = {torch.float32: TOLERANCE, torch.float64: PURE}
    errors = {dtype: found[name, dtype]["gradient"] for dtype in limits if (name, dtype) in found}
    limits[torch.float32] = ROUNDED if torch.float64 in errors else CANCELLING.get(name, TOLERANCE)
    assert errors
    assert all(error < limits[dtype] for dtype, error in errors.items()), errors


def check_figures(found: Any, name: str, images: int) -> None:
    assert not {figure: error for figure, error in found[name, images].items() if not error < TOLERANCE}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ran(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module", params=[2, 3])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ran(tmp_path_factory.mktemp("full"), request.param, full=True)


@pytest.fixture(scope="module", params=[2, 3])
def long(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return ran(tmp_path_factory.mktemp("long"), request.param, steps=30)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_two_processes_is_that_of_one(name: str, two: Any) -> None:
    check_gradient(two, name)


@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("name", [name for name in MEASURED if name != "masks of objects"])
def test_the_figures_of_two_processes_are_those_of_one(name: str, images: int, two: Any) -> None:
    check_figures(two, name, images)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_the_gradient_of_several_processes_is_that_of_one(name: str, full: Any) -> None:
    check_gradient(full, name)


@pytest.mark.exhaustive
@pytest.mark.parametrize("images", SIZES)
@pytest.mark.parametrize("name", MEASURED)
def test_the_figures_of_several_processes_are_those_of_one(name: str, images: int, full: Any) -> None:
    check_figures(full, name, images)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CASES)
def test_thirty_steps_of_several_processes_are_those_of_one(name: str, long: Any) -> None:
    (dtype,) = (dtype for case, dtype in long if case == name)
    assert long[name, dtype]["weights"] < (PURE if dtype == torch.float64 else 1e-5)


def test_every_head_and_loss_of_conf_is_a_case() -> None:
    games = set(HEADS["generation"]) - set(DENSITIES)
    heads = set(choices("head")) - set(choices("task")) - games
    losses = set(choices("loss")) - set(choices("task"))
    assert heads | {f"loss={loss}" for loss in losses} <= set(CASES)
