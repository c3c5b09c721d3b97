"""Losses of pretraining, forward and backward, beside lightly's: python benchmarks/pretraining.py [--rounds 9]

The same float32 embeddings, alternating in one process; medians of the times and of the ratios within a round. The
last column is how far lightly's loss is from ours, relative to ours. Wants lightly, of the dev extra.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, SwaVLoss, VICRegLoss
from torch import Tensor

from visiontasks.losses import barlow_twins, dino, nt_xent, swav, vicreg

Loss = Callable[[Tensor], Tensor]  # of views (V, B, D)


def pairs() -> dict[str, tuple[Loss, Loss, tuple[int, int, int]]]:
    """Ours, lightly's, and the shape of the views they are given."""
    centred = DINOLoss(65536, center_momentum=1.0)
    zeros = torch.zeros(65536)
    rows: dict[str, tuple[Loss, Loss, tuple[int, int, int]]] = {
        f"NT-Xent, batch {batch}": (lambda v: nt_xent(*v), lambda v: NTXentLoss(0.1)(*v), (2, batch, 128))
        for batch in (256, 1024, 4096)
    }
    rows["Barlow Twins, batch 256"] = (lambda v: barlow_twins(*v), lambda v: BarlowTwinsLoss()(*v), (2, 256, 8192))
    rows["VICReg, batch 256"] = (lambda v: vicreg(*v), lambda v: VICRegLoss()(*v), (2, 256, 8192))
    rows["SwAV, 8 crops, batch 64"] = (
        lambda v: swav(v / 10),
        lambda v: SwaVLoss()(list(v[:2] / 10), list(v[2:] / 10)),
        (8, 64, 3000),
    )
    rows["DINO, 8 crops, batch 16"] = (
        lambda v: dino(v, v[:2], zeros),
        lambda v: centred(list(v[:2].detach()), list(v)),
        (8, 16, 65536),
    )
    return rows


def timed(loss: Loss, views: Tensor) -> float:
    """Milliseconds of one forward and backward pass."""
    views.grad = None
    start = time.perf_counter()
    loss(views).backward()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for name, (ours, peer, shape) in pairs().items():
        views = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        times = [(timed(ours, views), timed(peer, views)) for _ in range(options.rounds + 1)][1:]
        mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(second / first for first, second in times)
        difference = abs(peer(views).item() / ours(views).item() - 1)
        print(
            f"{name}: ours {mine:.1f} ms, lightly {theirs:.1f} ms, {ratio:.1f} times as fast; {difference:.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
