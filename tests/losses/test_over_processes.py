"""Two and three processes that hold different images learn what one process learns from all of them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from visiontasks.errors import UsageError
from visiontasks.layers.batch_norm import ProcessBatchNorm, ProcessBatchNorms
from visiontasks.layers.distributed import alone, rank, world_size
from visiontasks.layers.queue import Queue
from visiontasks.losses.clustering import swav
from visiontasks.losses.contrastive import info_nce, nt_xent, symmetric_info_nce
from visiontasks.losses.distillation import Centre, dino, negative_cosine
from visiontasks.losses.redundancy import barlow_twins, vicreg
from visiontasks.tasks.collapse import collapse_gauges

D = 8
NEGATIVES = Queue(D, 9)().double()
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {  # of views (4, B, D)
    "nt_xent": lambda v: nt_xent(v[0], v[1]),
    "info_nce": lambda v: info_nce(v[0], v[1], NEGATIVES.to(v.dtype)),
    "symmetric_info_nce": lambda v: symmetric_info_nce(*v),
    "negative_cosine": lambda v: negative_cosine(v[0], v[1]),
    "barlow_twins": lambda v: barlow_twins(v[0], v[1]),
    "barlow_twins, wide": lambda v: barlow_twins(*v[:2].repeat(1, 1, 3)),
    "vicreg": lambda v: vicreg(v[0], v[1]),
    "vicreg, wide": lambda v: vicreg(*v[:2].repeat(1, 1, 3)),
    "swav": lambda v: swav(v / 10),
    "swav with a queue": lambda v: swav(v / 10, past=NEGATIVES.expand(2, 9, D)),
    "dino": lambda v: dino(v / 10, v[:2].flip(0) / 10, v.new_ones(D)),
}
Errors = list[dict[object, float]]  # of each process
CASES = [(torch.float32, 4, 1e-6), (torch.float64, 4, 1e-10), (torch.float64, 1, 1e-10)]  # images on each process
NORMS: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: nn.BatchNorm2d(3),
    "without weights": lambda: nn.BatchNorm2d(3, affine=False),
    "without memory": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "with an average of all": lambda: nn.BatchNorm2d(3, momentum=None),
    "with an activation": lambda: BatchNormAct2d(3, act_layer=nn.SiLU, inplace=False),
}


def own(rows: Tensor) -> Tensor:
    """This process's part of rows, in equal parts."""
    return rows.chunk(world_size())[rank()]


def learnt(loss: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The gradient of an encoder's weights, averaged over processes as DDP does; images (B, 4, D)."""
    weights = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(images.dtype)
    weights.requires_grad_()
    loss((images @ weights).transpose(0, 1)).backward()
    assert weights.grad is not None
    if world_size() > 1:
        dist.all_reduce(weights.grad)
    return weights.grad / world_size()


def loss_errors(images: int, dtype: torch.dtype) -> dict[str, float]:
    """Of each loss, the distance of the gradient from that of one process, relative to the latter or 1e-3."""
    views = torch.randn(images, 4, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    errors = {}
    for name, loss in LOSSES.items():
        found = learnt(loss, own(views))
        with alone():
            expected = learnt(loss, views)
        errors[name] = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-3)).item()
    return errors


def norm_error(make: Callable[[], nn.Module]) -> float:
    """The largest relative distance of a norm's results, gradients and memory from those of one process.

    Processes hold 2, 3, ... images of different sizes.
    """
    random = torch.Generator().manual_seed(0)
    sizes = [(2 + process, 3, 1 + process, 4) for process in range(world_size())]
    parts = [torch.randn(size, generator=random, dtype=torch.float64) * 5 + 3 for size in sizes]
    slopes = [torch.randn(size, generator=random, dtype=torch.float64) for size in sizes]
    whole, part = (nn.Sequential(make()).double() for _ in range(2))
    ProcessBatchNorms().apply(part)
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in parts], dim=1)[None, :, None].requires_grad_()
    mine = parts[rank()].clone().requires_grad_()
    for _ in range(2):
        expected, found = whole(flat), part(mine)
    (expected * torch.cat([x.transpose(0, 1).flatten(1) for x in slopes], dim=1)[None, :, None]).sum().backward()
    (found * slopes[rank()]).sum().backward()
    for parameter in part.parameters():
        dist.all_reduce(parameter.grad)
    pairs = [(joined(found), expected), (joined(mine.grad), flat.grad)]
    pairs += [(a.grad, b.grad) for a, b in zip(part.parameters(), whole.parameters(), strict=True)]
    pairs += zip(part.buffers(), whole.buffers(), strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def joined(x: Tensor | None) -> Tensor:
    """All processes' values of each channel, (1, C, 1, N)."""
    assert x is not None
    parts: list[Tensor | None] = [None] * world_size()
    dist.all_gather_object(parts, x.detach().transpose(0, 1).flatten(1))
    return torch.cat([part for part in parts if part is not None], dim=1)[None, :, None]


def kept(rows: Tensor) -> dict[str, Tensor]:
    """What is kept over steps, and the gauges."""
    queue, centre = Queue(D, 7), Centre(D)
    for step in range(3):
        queue.push(rows + step)
        centre.update(rows + step)
    return {"queue": queue(), "centre": centre.centre, **collapse_gauges(rows, rows.flip(1))}


def state_errors() -> dict[str, float]:
    """The distance of what this process keeps from what one process keeps."""
    rows = torch.randn(2 * world_size(), D, generator=torch.Generator().manual_seed(0))
    found = kept(own(rows))
    with alone():
        expected = kept(rows)
    return {name: (found[name] - expected[name]).abs().max().item() for name in expected}


def measure(process: int, processes: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=processes)
    errors = {("norm", name): norm_error(make) for name, make in NORMS.items()}
    errors |= {("state", name): error for name, error in state_errors().items()}
    for dtype, each, _ in CASES:
        errors |= {(dtype, each, name): error for name, error in loss_errors(each * processes, dtype).items()}
    with pytest.raises(UsageError, match="equally many"):
        nt_xent(*torch.ones(2, 1 + process, D))
    torch.save(errors, f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def errors(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Errors:
    """What every one of so many processes measured."""
    processes, folder = request.param, tmp_path_factory.mktemp("processes")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process must not wait for threads that it has not
    mp.start_processes(measure, args=(processes, str(folder)), nprocs=processes, start_method="fork")
    torch.set_num_threads(threads)
    return [torch.load(folder / f"{process}.pt", weights_only=False) for process in range(processes)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("dtype", "each", "tolerance"), CASES)
def test_the_gradient_is_that_of_the_whole_batch(
    name: str, dtype: torch.dtype, each: int, tolerance: float, errors: Errors
) -> None:
    assert max(found[dtype, each, name] for found in errors) < tolerance


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_is_that_of_the_whole_batch(name: str, errors: Errors) -> None:
    assert max(found["norm", name] for found in errors) < 1e-15


@pytest.mark.parametrize("name", ["queue", "centre", "feature_std", "effective_rank", "alignment", "uniformity"])
def test_every_process_keeps_and_sees_what_one_would(name: str, errors: Errors) -> None:
    assert max(found["state", name] for found in errors) < 1e-6


def test_norms_are_put_in_place_and_back() -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(BatchNormAct2d(3), nn.BatchNorm2d(3)), nn.BatchNorm2d(3))
    network[2].eval()
    names, images = list(network.state_dict()), torch.randn(4, 2, 5, 5)
    layers = [network[1][0], network[1][1], network[2]]
    expected = network(images)
    for layer in layers:
        layer.reset_running_stats()
    plugin = ProcessBatchNorms()
    plugin.apply(network)
    assert [type(layer) for layer in (network[1][0], network[1][1], network[2])] == [ProcessBatchNorm] * 3
    assert list(network.state_dict()) == names
    assert torch.equal(network(images), expected)
    assert not network[2].training
    network.double().eval()
    plugin.revert(network)
    assert [network[1][0], network[1][1], network[2]] == layers
    assert list(network.state_dict()) == names
    assert {tensor.dtype for tensor in network.state_dict().values()} == {torch.float64, torch.long}
    assert not any(layer.training for layer in layers)


def against_torch(process: int, folder: str) -> None:
    """The largest relative distance of results and gradients from those of nn.SyncBatchNorm, on one GPU."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    random = torch.Generator().manual_seed(process)
    images, slopes = (torch.randn(2 + process, 3, 5, 4, generator=random).cuda() for _ in range(2))
    found = []
    for make in (nn.SyncBatchNorm.convert_sync_batchnorm, ProcessBatchNorms().apply):
        norm = make(nn.Sequential(nn.BatchNorm2d(3))).cuda()
        own = images.clone().requires_grad_()
        result = norm(own)
        (result * slopes).sum().backward()
        found.append([result, own.grad, *(each.grad for each in norm.parameters()), *norm.buffers()])
    errors = [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*found, strict=True)]
    torch.save(max(errors), f"{folder}/{process}.pt")
    dist.destroy_process_group()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="nn.SyncBatchNorm runs on a GPU alone")
def test_batch_norm_is_that_of_torch(tmp_path: Path) -> None:
    mp.spawn(against_torch, args=(str(tmp_path),), nprocs=2)
    assert max(torch.load(tmp_path / f"{process}.pt") for process in range(2)) < 1e-5
