"""Training and evaluation mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def at_rest(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every part is in the mode in which it was."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
