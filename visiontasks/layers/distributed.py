"""Sums and rows over processes, which are the identity where there is one process."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from visiontasks.errors import UsageError

T = TypeVar("T")

_ON_GLOO: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # by the world, such as one on NCCL
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if _together() else 1


def rank() -> int:
    """The number of this process among those that train together, from 0 on."""
    return dist.get_rank() if _together() else 0


@contextmanager
def alone() -> Iterator[None]:
    """Within it this process counts as the only one, as evaluation needs, where processes have unequal batches."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def anywhere(here: bool) -> bool:
    """Whether something is so in any process; it is asked from CPU to CPU, so that no GPU has to wait."""
    if world_size() == 1:
        return here
    answer = torch.tensor(int(here))
    dist.all_reduce(answer, dist.ReduceOp.MAX, group=_between_cpus(dist.group.WORLD))
    return bool(answer)


def collected(value: T) -> list[T]:
    """What each process gives, by rank, in all of them; from CPU to CPU, as `anywhere`."""
    if world_size() == 1:
        return [value]
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, value, group=_between_cpus(dist.group.WORLD))
    return parts


def announced(name: str, number: int | None = None) -> int | None:
    """The number that the first process to do so has announced under a name; no process waits for another one."""
    store = dist.distributed_c10d._get_default_store()
    if number is not None:
        return int(store.compare_set(name, "", str(number)))
    return int(store.get(name)) if store.check([name]) else None


def wait_at_most(seconds: float) -> None:
    """Has this process fail where it waits longer than that for another one."""
    if world_size() == 1:
        return
    set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout  # torch < 2.14
    for group in {dist.group.WORLD, _between_cpus(dist.group.WORLD)}:
        set_timeout(timedelta(seconds=seconds), group)


def in_order(parts: list[tuple[Tensor, ...]], device: torch.device) -> list[Tensor]:
    """The columns of the rows of all processes, sorted by the second column, the images' positions.

    Processes may have unequally many rows, or none; a position's own rows stay in their order.
    """
    columns = [torch.cat(column).cpu() for column in zip(*parts, strict=True)]
    everyone = [part for part in collected(columns) if part]
    whole = [torch.cat(column) for column in zip(*everyone, strict=True)]
    order = whole[1].argsort(stable=True)
    return [column[order].to(device) for column in whole]


def _between_cpus(world: Any) -> Any:
    """The group of all processes, on gloo; made once for each world, by all of its processes together.

    Nothing here keeps a group for longer than the world: gloo's threads, where they outlive it, can abort the process
    at its end.
    """
    if dist.get_backend(world) == "gloo":
        return world
    if world not in _ON_GLOO:
        _ON_GLOO[world] = dist.new_group(backend="gloo")
    return _ON_GLOO[world]


def sum_over_processes(values: Tensor) -> Tensor:
    """The element-wise sum of a tensor over all processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def share_first(tensors: Iterable[Tensor]) -> None:
    """Gives every process, in place, what the first one has."""
    if world_size() == 1:
        return
    for tensor in tensors:
        dist.broadcast(tensor, src=0, group=_between_cpus(dist.group.WORLD) if tensor.device.type == "cpu" else None)


def mean_over_processes(total: Tensor, count: Tensor) -> Tensor:
    """A loss whose gradient, averaged over processes as DDP does, is that of the global sum over the global count.

    A global count of zero gives zero, with zero gradient.
    """
    count = sum_over_processes(count)
    return total * (world_size() / torch.where(count > 0, count, 1))


@torch.no_grad()
def average_over_processes(values: list[Tensor], number: Tensor) -> list[Tensor]:
    """Tensors, each of which becomes its mean over all processes, in one exchange; so does the number, a scalar."""
    if world_size() > 1:
        everything = [*values, number]
        flat = torch.cat([value.flatten() for value in everything])  # of one type
        dist.all_reduce(flat)
        parts = torch.split(flat / world_size(), [value.numel() for value in everything])
        torch._foreach_copy_(everything, [part.view_as(value) for part, value in zip(parts, everything, strict=True)])
    return values


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes in the order of ranks, for a loss that all processes then compute alike.

    Its gradient is that of this process's rows times the number of processes, so that DDP's average over processes is
    the gradient of the whole batch; the backward pass exchanges nothing.
    Shapes: rows (B, ...); returns (B * processes, ...). Raises UsageError on each process where B differs between them,
    as it may in evaluation, which has `alone`.
    """
    if world_size() == 1:
        return rows
    _check_equal(len(rows))
    apply: Callable[..., Tensor] = _Gather.apply
    return apply(rows)


def gather_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two tensors of one shape, each as `gather` gives it, in one exchange."""
    if world_size() == 1:
        return first, second
    pairs = gather(torch.stack((first, second), dim=1))  # (B * processes, 2, ...)
    return pairs[:, 0], pairs[:, 1]


def _check_equal(count: int) -> None:
    counts = torch.empty(world_size(), dtype=torch.long)
    dist.all_gather_into_tensor(counts, torch.tensor([count]), group=_between_cpus(dist.group.WORLD))
    if (counts != count).any():
        raise UsageError(
            f"The processes' batches hold {counts.tolist()} images and must hold equally many to be compared: "
            "leave trainer.use_distributed_sampler=false, with which the data's own sampler sees to that."
        )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.own = slice(rank() * len(rows), (rank() + 1) * len(rows))
        ctx.processes = world_size()
        everything = rows.new_empty(ctx.processes * len(rows), *rows.shape[1:])
        dist.all_gather_into_tensor(everything, rows.contiguous())
        return everything

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        processes: int = ctx.processes
        return gradient[ctx.own] * processes


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and not _ALONE.get()
