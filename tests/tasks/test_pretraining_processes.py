"""Every method of pretraining on two processes learns, keeps and measures what one does on the whole batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from tests.tasks.pretraining_parts import PRETEXTS, SMALL, Tiny, batch, maker
from visiontasks.contracts import Batch
from visiontasks.layers.batch_norm import ProcessBatchNorms
from visiontasks.layers.distributed import alone, rank, world_size
from visiontasks.tasks import Pretraining

IMAGES = 8
Found = dict[str, Tensor]
VIEWS = {"SwAV": 3, "DINO": 3} | dict.fromkeys(PRETEXTS, 1)
OPTIONS: dict[str, dict[str, Any]] = {"SwAV": {"queue": 8}}


class Learner(nn.Module):
    """A task whose forward is its training step, as a trainer wraps it."""

    def __init__(self, name: str, *, checkpointing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        head = maker(name, **OPTIONS.get(name, {}))
        self.task = Pretraining(backbone=Tiny(), head=head, checkpointing=checkpointing).double()

    def forward(self, images: Batch) -> Tensor:
        return self.task.training_step(images, 0)


def learnt(name: str, *, checkpointing: bool = False) -> Found:
    """The gradients, and what is kept after three steps of plain gradient descent."""
    learner = Learner(name, checkpointing=checkpointing)
    learner.task._progress = lambda: 0.5  # type: ignore[method-assign]
    if world_size() > 1:
        ProcessBatchNorms().apply(learner)
    model = DistributedDataParallel(learner) if world_size() > 1 else learner
    optimizer = SGD([each for each in learner.parameters() if each.requires_grad], lr=0.01)
    each = IMAGES // world_size()
    for step in range(3):
        optimizer.zero_grad()
        start = step * IMAGES + rank() * each
        model(batch(range(start, start + each), views=VIEWS.get(name, 2))).backward()
        learner.task.head.before_step()
        gradients = {key: value.grad.clone() for key, value in learner.named_parameters() if value.grad is not None}
        optimizer.step()
        learner.task.after_step(0.5)
    return {f"gradient {key}": value for key, value in gradients.items()} | {
        key: value for key, value in learner.state_dict().items() if value.is_floating_point()
    }


def measured() -> Found:
    """The figures of five images, three of them on the first of two processes."""
    task = Learner("SimCLR").task.eval()
    own = range(rank(), 5, world_size())
    task.evaluation_step(batch(own))
    figures, _ = task.metrics.compute()
    figures.pop("loss")  # of unlike batches
    return figures


def distances(found: Found, expected: Found) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {
        key: ((value - expected[key]).abs().max() / expected[key].abs().max().clamp(min=1e-6)).item()
        for key, value in found.items()
    }


def measure(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    errors = {}
    for name, checkpointing in [*((name, False) for name in SMALL | PRETEXTS), ("SimCLR", True), ("BYOL", True)]:
        found = learnt(name, checkpointing=checkpointing)
        with alone():
            expected = learnt(name)
        errors[name, checkpointing] = distances(found, expected)
    found = measured()
    with alone():
        errors["figures", False] = distances(found, measured())
    torch.save(errors, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, bool], dict[str, float]]]:
    """What both processes measured."""
    folder = tmp_path_factory.mktemp("processes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not
    mp.start_processes(measure, args=(str(folder),), nprocs=2, start_method="fork")
    torch.set_num_threads(threads)
    return [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(2)]


@pytest.mark.parametrize("name", SMALL)
def test_two_processes_learn_and_keep_what_one_does(name: str, errors: Any) -> None:
    for found in errors:
        wrong = {key: error for key, error in found[name, False].items() if not error < 1e-9}
        assert not wrong


@pytest.mark.parametrize("name", PRETEXTS)
def test_so_they_do_where_images_are_altered(name: str, errors: Any) -> None:
    for found in errors:
        wrong = {key: error for key, error in found[name, False].items() if not error < 1e-6}
        assert not wrong  # targets and cross-entropy are in float32


@pytest.mark.parametrize("name", ["SimCLR", "BYOL"])
def test_so_they_do_where_activations_are_computed_again(name: str, errors: Any) -> None:
    for found in errors:
        wrong = {key: error for key, error in found[name, True].items() if not error < 1e-9}
        assert not wrong


def test_gauges_are_over_all_processes(errors: Any) -> None:
    for found in errors:
        assert max(found["figures", False].values()) < 1e-6


def test_something_is_compared(errors: Any, tmp_path: Path) -> None:
    names = errors[0]["BYOL", False]
    assert any(key.startswith("gradient task.head.predictor") for key in names)
    assert any(key.startswith("task.teacher.backbone") and "running_mean" in key for key in names)
