"""Sums and lists over processes, which are the identity where there is one process."""

from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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


@lru_cache(maxsize=1)
def _between_cpus(world: Any) -> Any:
    """The group of all processes, on gloo; made once for each world, by all of its processes together."""
    return world if dist.get_backend(world) == "gloo" else dist.new_group(backend="gloo")


def sum_over_processes(values: Tensor) -> Tensor:
    """The element-wise sum of a tensor over all processes, without gradient."""
    values = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def mean_over_processes(total: Tensor, count: Tensor) -> Tensor:
    """A loss whose gradient, averaged over processes as DDP does, is that of the global sum over the global count.

    A global count of zero gives zero, with zero gradient.
    """
    count = sum_over_processes(count)
    return total * world_size() / torch.where(count > 0, count, 1)
