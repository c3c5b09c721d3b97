"""Which anchors and proposals a two-stage detector learns from."""

import torch
from torch import Tensor


def generators(keys: Tensor | None, images: int) -> list[torch.Generator]:
    """Gives one generator an image, on the CPU, that depends on the image's key alone; without keys, on nothing."""
    seeds = [0] * images if keys is None else keys.tolist()
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def balanced(labels: Tensor, *, size: int, fraction: float, generator: torch.Generator) -> Tensor:
    """Draws up to `size` indices, of which at most a fraction are of objects; the rest is background.

    Shapes: labels (N,), 0 and above for objects, -1 for background, anything lower for what is never drawn, to
    indices (n,), those of objects first.
    """
    noise = torch.rand(len(labels), generator=generator).to(labels.device)
    objects = _drawn(noise, labels >= 0, int(size * fraction))
    background = _drawn(noise, labels == -1, size - len(objects))
    return torch.cat([objects, background])


def _drawn(noise: Tensor, allowed: Tensor, limit: int) -> Tensor:
    places = allowed.nonzero()[:, 0]
    return places[noise[places].topk(min(limit, len(places))).indices]
