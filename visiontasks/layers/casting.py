"""Weights that mixed precision casts."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def cast_once(device: str) -> Iterator[None]:
    """Within it autocast, where it is on, casts a weight once, however often it is used.

    Torch does so by itself. Lightning tells it not to, as a weight that was first cast without gradients gets none
    later: so what is computed within must all be with gradients, or all without.
    """
    if not torch.is_autocast_enabled(device) or torch.is_autocast_cache_enabled():
        yield
        return
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(False)
        torch.clear_autocast_cache()
