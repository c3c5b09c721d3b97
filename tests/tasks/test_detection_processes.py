"""Every detection head on two processes with uneven numbers of images and objects learns as one process does."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from visiontasks.cli.command_line import CONF
from visiontasks.contracts import Backbone, Batch, Level
from visiontasks.tasks import Detection

SMALL: dict[str, dict[str, Any]] = {
    "fcos": {},
    "retinanet": {},
    "ssd": {},
    "faster_rcnn": {"hidden": 32, "proposals": 40, "anchors_learnt": 24, "regions_learnt": 12},
    "mask_rcnn": {"hidden": 32, "proposals": 40, "anchors_learnt": 24, "regions_learnt": 12, "mask_width": 8},
}
OBJECTS = (5, 1, 0, 1, 3)  # in each image
SHARES = (((0, 1), (2, 3, 4)), ((0, 1, 3, 4), (2,)))  # the images of each process; in the second, one sees no object
SIDE = 64
Step = tuple[Tensor, Tensor]  # the loss and all gradients, one after the other


class Plain(Backbone):
    """Three convolutions without batch norm, whose statistics would be each process's own."""

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

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        chosen = instantiate(OmegaConf.load(CONF / "head" / f"{name}.yaml"), _convert_="all", width=16, **SMALL[name])
        self.task = Detection(backbone=Plain(), classes=("a", "b", "c"), head=chosen)
        for layer in self.task.head.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight)  # scores that differ between places

    def forward(self, batch: Batch) -> Tensor:
        return self.task.training_step(batch, 0)


def batch(images: Sequence[int]) -> Batch:
    """Some of five images of noise, with as many objects as OBJECTS says."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (len(OBJECTS), 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    corners = torch.randint(0, SIDE // 2, (len(OBJECTS), max(OBJECTS), 2), generator=generator)
    sides = torch.randint(10, SIDE // 2, corners.shape, generator=generator)
    boxes = torch.cat([corners, corners + sides], dim=2)
    labels = torch.randint(0, 3, corners.shape[:2], generator=generator)
    places = torch.arange(SIDE)
    inside = (places >= boxes[..., :2, None]) & (places < boxes[..., 2:, None])  # (B, M, 2, SIDE) columns, rows
    masks = (inside[:, :, 1, :, None] & inside[:, :, 0, None]).to(torch.uint8)
    return {
        "image": pixels[list(images)],
        "index": torch.tensor(images),
        **{
            name: [values[index, : OBJECTS[index]] for index in images]
            for name, values in (("bboxes", boxes.float()), ("labels", labels), ("masks", masks))
        },
    }


def step(model: nn.Module, images: Sequence[int]) -> Step:
    loss = model(batch(images))
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])


def one_of_two(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    steps = {name: [step(DistributedDataParallel(Learner(name)), share[rank]) for share in SHARES] for name in SMALL}
    torch.save(steps, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[Step]]]:
    folder = tmp_path_factory.mktemp("ranks")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not
    mp.start_processes(one_of_two, args=(str(folder),), nprocs=2, start_method="fork")
    torch.set_num_threads(threads)
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("share", range(len(SHARES)))
@pytest.mark.parametrize("name", SMALL)
def test_two_processes_learn_as_one(name: str, share: int, ranks: list[dict[str, list[Step]]]) -> None:
    (first, gradient), (second, other) = (rank[name][share] for rank in ranks)
    loss, expected = step(Learner(name), sorted(sum(SHARES[share], ())))
    assert torch.equal(gradient, other)
    assert (gradient - expected).norm() < 1e-6 * expected.norm()
    assert ((first + second) / 2).item() == pytest.approx(loss.item(), rel=1e-6)
