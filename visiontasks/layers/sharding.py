"""Weights, gradients and the optimiser's state in shards over all processes: FSDP2 as a Lightning strategy."""

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard


class Sharded(ModelParallelStrategy):
    """Each process keeps one part of every parameter, and all of it only while a network computes.

    Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277. A checkpoint holds the whole weights, as one of a single process.
    """

    def __init__(self) -> None:
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False)

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()


def shard(module: nn.Module, mesh: Any) -> None:
    """Puts the parameters of each child of a module in shards over a mesh of processes; a second time does nothing."""
    for child in module.children():
        if next(child.parameters(), None) is not None and not isinstance(child, FSDPModule):
            fully_shard(child, mesh=mesh)
