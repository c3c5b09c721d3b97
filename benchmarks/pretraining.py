"""Losses and whole steps of pretraining beside lightly's: python benchmarks/pretraining.py [--rounds 9] [losses|steps]

Losses, forward and backward: the same float32 embeddings; the last column is how far lightly's loss is from ours,
relative to ours. Steps: SimCLR with ResNet-18 on 64 images of 96 px, forward, backward and AdamW, ours from the uint8
views that leave our loader, lightly's parts in the loop of its documentation from the normalised views that leave its
own. Both alternate in one process; medians of the times and of the ratios within a round. Wants lightly, of the dev
extra.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, SwaVLoss, VICRegLoss
from lightly.models.modules import SimCLRProjectionHead
from torch import Tensor, nn
from torchvision.models import resnet18

from visiontasks.backbones import TorchvisionBackbone
from visiontasks.cli.build import native_bfloat16
from visiontasks.losses import barlow_twins, dino, nt_xent, swav, vicreg
from visiontasks.tasks import Pretraining

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


class Lightlys(nn.Module):
    """SimCLR of lightly's parts: each view by itself, as in its documentation."""

    def __init__(self) -> None:
        super().__init__()
        network = resnet18()
        self.backbone = nn.Sequential(*list(network.children())[:-1])
        self.head = SimCLRProjectionHead(512, 512, 128)
        self.criterion = NTXentLoss(0.1)

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        loss: Tensor = self.criterion(*[self.head(self.backbone(view).flatten(1)) for view in (first, second)])
        return loss


def stepped(network: nn.Module, loss: Callable[[], Tensor], *, bfloat16: bool = False) -> Callable[[], float]:
    """What takes one step of AdamW and gives its milliseconds."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    return step


def our_step(*, native: bool) -> Callable[[], float]:
    """A step of ours in float32 or, natively, in bfloat16 with channels last, as `train.py` chooses it."""
    task = Pretraining(backbone=TorchvisionBackbone(name="resnet18"), channels_last=native)
    task.to(memory_format=task.memory_format).train()
    pixels = torch.randint(0, 256, (2, 64, 96, 96, 3), dtype=torch.uint8).permute(0, 1, 4, 2, 3)
    batch = {"views": list(pixels), "index": torch.arange(64)}
    return stepped(task, lambda: task.training_step(batch, 0), bfloat16=native)


def steps(rounds: int) -> None:
    network = Lightlys().train()
    views = torch.randn(2, 64, 3, 96, 96)
    sides = {"lightly": stepped(network, lambda: network(*views)), "ours in float32": our_step(native=False)}
    if native_bfloat16():
        sides["ours as it comes"] = our_step(native=True)
    times = [{name: step() for name, step in sides.items()} for _ in range(rounds + 1)][1:]
    for name in sides:
        ratio = statistics.median(each[name] / each["lightly"] for each in times)
        print(f"step, {name}: {statistics.median(each[name] for each in times):.0f} ms, x {ratio:.2f} of lightly's")


def losses(rounds: int) -> None:
    for name, (ours, peer, shape) in pairs().items():
        views = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
        times = [(timed(ours, views), timed(peer, views)) for _ in range(rounds + 1)][1:]
        mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
        ratio = statistics.median(second / first for first, second in times)
        difference = abs(peer(views).item() / ours(views).item() - 1)
        print(
            f"{name}: ours {mine:.1f} ms, lightly {theirs:.1f} ms, {ratio:.1f} times as fast; {difference:.0e}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=["losses", "steps"], help="both where neither is named")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    for what in [options.what] if options.what else ["losses", "steps"]:
        {"losses": losses, "steps": steps}[what](options.rounds)


if __name__ == "__main__":
    main()
