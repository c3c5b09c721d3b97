"""Two processes train a generator and its critic as one does on the whole batch."""

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.optim import SGD

from tests.tasks.generation_parts import fit, images, made
from visiontasks.contracts import Batch
from visiontasks.layers.batch_norm import ProcessBatchNorms
from visiontasks.layers.distributed import rank, world_size

FEW = 4  # steps
MANY = 30
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "non_saturating": ("non_saturating", {}),
    "in one pass": ("non_saturating", {}),
    "hinge": ("hinge", {"critic_steps": 2}),
    "wasserstein": ("wasserstein", {}),
    "conditional": ("conditional", {"diffaugment": ("translation",)}),
}
ACCUMULATED = 2
CALM = partial(SGD, lr=0.001, momentum=0.5)  # at 0.01 thirty steps make 1e-3 of a change of 1e-7 on one process itself


def weights(name: str, steps: int) -> dict[str, Tensor]:
    """What is left of a training of so many steps, each of two batches of sixteen images."""
    kind, options = CASES[name]
    task = made(kind, **options, task={"accumulate_grad_batches": ACCUMULATED, "optimizer": CALM})
    if name == "in one pass":
        task._at_once = lambda _: True  # type: ignore[method-assign]
    own = [_share(batch) for batch in images(32 * steps, batch_size=16)]
    together: dict[str, Any] = {"devices": world_size(), "use_distributed_sampler": False}
    if world_size() > 1:
        together |= {"strategy": "ddp", "sync_batchnorm": True, "plugins": [ProcessBatchNorms()]}
    trainer = fit(task, own, **together)
    assert trainer.global_step == steps
    return {key: value.clone() for key, value in task.state_dict().items() if value.is_floating_point()}


def _share(batch: Batch) -> Batch:
    return {key: values[rank() :: world_size()] for key, values in batch.items()}


def learn(process: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(process), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    torch.save({name: weights(name, steps) for name in CASES}, f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


def compared(folder: Path, steps: int) -> dict[str, list[float]]:
    """The relative distance of both processes' weights from those of one process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not
    expected = {name: weights(name, steps) for name in CASES}
    mp.start_processes(learn, args=(str(folder), steps), nprocs=2, start_method="fork")
    torch.set_num_threads(threads)
    found = [torch.load(folder / f"{process}.pt") for process in range(2)]
    return {name: [_distance(each[name], expected[name]) for each in found] for name in CASES}


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    rows = [torch.cat([each[key].flatten() for key in expected]) for each in (found, expected)]
    return float((rows[0] - rows[1]).norm() / rows[1].norm())


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[float]]:
    return compared(tmp_path_factory.mktemp("processes"), FEW)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_steps_of_one(name: str, errors: dict[str, list[float]]) -> None:
    assert max(errors[name]) < 1e-5


@pytest.mark.exhaustive
def test_so_they_do_for_thirty_steps_of_accumulated_batches(tmp_path: Path) -> None:
    for name, distances in compared(tmp_path, MANY).items():
        assert max(distances) < 1e-5, name
