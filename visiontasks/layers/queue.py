"""A memory of the last embeddings."""

import torch
from torch import Tensor, nn

from visiontasks.layers.distributed import gather
from visiontasks.layers.embeddings import unit


class Queue(nn.Module):
    """The last `length` embeddings of all processes, first in, first out, the same on each; random vectors at first.

    He et al. 2019, arXiv 1911.05722. The buffer `rows` (length, D) holds vectors of length 1, and `position` the row
    that is the next to be replaced.
    """

    rows: Tensor
    position: Tensor

    def __init__(self, dim: int, length: int = 65536) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(0)  # the same on each process
        self.register_buffer("rows", unit(torch.randn(length, dim, generator=random)))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def forward(self) -> Tensor:
        """Gives a copy of the rows, (length, D), so that the queue may move on before the backward pass."""
        return self.rows.clone()

    @torch.no_grad()
    def push(self, rows: Tensor) -> None:
        """Replaces the oldest rows by new ones of all processes, each (B, D), scaled to length 1."""
        length = len(self.rows)
        new = unit(gather(rows).to(self.rows.dtype))  # (B * processes, D)
        places = (self.position + torch.arange(len(new), device=new.device)) % length
        self.rows.index_copy_(0, places[-length:], new[-length:])
        self.position.copy_((self.position + len(new)) % length)
