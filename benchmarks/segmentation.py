"""A training step beside segmentation_models_pytorch's U-Net and torchvision's FCN: python benchmarks/segmentation.py

The same backbone, uint8 batch, precision, layout, cross-entropy and optimiser, alternating in one process; medians of
the ratios of neighbouring steps. Memory is what autograd keeps for the backward pass. Wants
segmentation_models_pytorch, which the project itself does not: pip install segmentation-models-pytorch
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from memory import kept
from torch import Tensor, nn
from torchvision.models.segmentation import fcn_resnet50

from visiontasks.backbones import TorchvisionBackbone
from visiontasks.cli.build import native_bfloat16
from visiontasks.heads import FCN, UNet
from visiontasks.tasks import Segmentation

CLASSES = tuple(map(str, range(11)))
Step = Callable[[dict[str, Tensor]], Tensor]


class Peer(nn.Module):
    """A published network with the loss of its documentation."""

    def __init__(self, network: nn.Module, task: Segmentation) -> None:
        super().__init__()
        self.network = network.to(memory_format=task.memory_format)
        self.prepare = task.images

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        logits = self.network(self.prepare(batch))
        logits = logits["out"] if isinstance(logits, dict) else logits
        return F.cross_entropy(logits.float(), batch["mask"].long(), ignore_index=255)


def task(backbone: str, head: Any, **options: Any) -> Segmentation:
    """Ours, in the layout of a default run."""
    network = TorchvisionBackbone(name=backbone, **options)
    made = Segmentation(backbone=network, head=head, classes=CLASSES, channels_last=native_bfloat16())
    return made.to(memory_format=made.memory_format)


def unet_pair(backbone: str) -> tuple[nn.Module, nn.Module]:
    """Our U-Net and smp's, each as it comes."""
    import segmentation_models_pytorch as smp

    mine = task(backbone, UNet)
    return mine, Peer(smp.Unet(backbone, encoder_weights=None, classes=len(CLASSES)), mine)


def fcn_pair(backbone: str) -> tuple[nn.Module, nn.Module]:
    """Our FCN on a backbone dilated to stride 8, and torchvision's."""
    mine = task(backbone, FCN, output_stride=8)
    return mine, Peer(fcn_resnet50(weights=None, weights_backbone=None, num_classes=len(CLASSES)), mine)


def lost(step: Step, batch: dict[str, Tensor]) -> Tensor:
    """The loss in a default run's precision."""
    with torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16()):
        return step(batch)


def timed(step: Step, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    """Seconds of one optimiser step."""
    start = time.perf_counter()
    lost(step, batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - start


def compare(name: str, pair: tuple[nn.Module, nn.Module], batch: dict[str, Tensor], rounds: int) -> None:
    """Prints milliseconds and megabytes of both, and the ratios."""
    mine, peer = pair[0].train(), pair[1].train()
    steps: list[Step] = [partial(mine.training_step, batch_idx=0), peer]  # type: ignore[arg-type]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=1e-4, fused=True) for part in (mine, peer)]
    times = [
        [timed(step, optimizer, batch) for step, optimizer in zip(steps, optimizers, strict=True)]
        for _ in range(rounds + 2)
    ][2:]
    ours, theirs = (1e3 * statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(first / second for first, second in times)
    memory = [kept(partial(lost, step, batch)) / 1e6 for step in steps]
    print(
        f"{name}: ours {ours:.0f} ms, theirs {theirs:.0f} ms, ratio {ratio:.2f} (target 1.00); "
        f"ours {memory[0]:.0f} MB, theirs {memory[1]:.0f} MB, ratio {memory[0] / memory[1]:.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    for size, images in ((64, 32), (224, 4)):
        batch = {
            "image": torch.randint(0, 256, (images, 3, size, size), dtype=torch.uint8),
            "mask": torch.randint(0, len(CLASSES), (images, size, size), dtype=torch.uint8),
        }
        for backbone in ("resnet18", "resnet50", "mobilenet_v2"):
            compare(f"U-Net, {backbone}, {images} x {size} px", unet_pair(backbone), batch, options.rounds)
        compare(f"FCN, resnet50, {images} x {size} px", fcn_pair("resnet50"), batch, options.rounds)


if __name__ == "__main__":
    main()
