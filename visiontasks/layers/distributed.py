"""Sums over processes, which are the identity where there is one process."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
