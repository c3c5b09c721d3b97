"""What a training step keeps in memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def kept(loss: Callable[[], Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps for the backward pass of a loss, which is then taken."""
    storages: dict[int, Any] = {}

    def note(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss()
    total = sum(storage.nbytes() for storage in storages.values())
    value.backward()
    return total
