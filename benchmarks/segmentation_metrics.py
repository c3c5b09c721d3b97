"""What evaluation and the losses cost an image of 513 x 513 pixels and 21 classes.

    python benchmarks/segmentation_metrics.py [--rounds 15] [--size 513] [--classes 21]

Ours and the peer take turns in one process on one thread; the times are medians over the rounds, and the ratios
medians of the ratios within a round. The peers are torchmetrics' masked confusion matrix, Tensor.argmax, and
F.cross_entropy forward and backward, which every loss is compared with in each memory layout.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.classification import MulticlassConfusionMatrix

from visiontasks.losses import dice, focal, lovasz, ohem, pixel_cross_entropy
from visiontasks.tasks.segmentation_metrics import BoundaryF1, PixelConfusion, image_iou, predicted_classes

LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
LOSSES = {"cross-entropy": pixel_cross_entropy, "focal": focal, "ohem": ohem, "dice": dice, "lovasz": lovasz}


def scene(size: int, classes: int) -> tuple[Tensor, Tensor]:
    """A prediction and a truth (1, H, W) of smooth regions with eight classes and a frame of ignored pixels."""
    random = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, min(8, classes), 9, 9, generator=random)
    labels = F.interpolate(coarse, size=(size, size), mode="bicubic").argmax(dim=1).to(torch.uint8)
    target = labels.clone()
    target[:, :20], target[:, :, :20] = 255, 255
    return labels.roll((2, 3), (1, 2)), target


def alternate(ours: Callable[[], object], peer: Callable[[], object], rounds: int) -> tuple[float, float, float]:
    """Milliseconds of ours and of the peer, and the ratio, after one round to warm up."""
    times = [(_milliseconds(ours), _milliseconds(peer)) for _ in range(rounds + 1)][1:]
    mine, theirs = zip(*times, strict=True)
    return statistics.median(mine), statistics.median(theirs), statistics.median(a / b for a, b in times)


def _milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - start)


def step(loss: Callable[..., Tensor], logits: Tensor, *arguments: Tensor) -> None:
    logits.grad = None
    loss(logits, *arguments).backward()


def mean(loss: Callable[..., tuple[Tensor, Tensor]], logits: Tensor, target: Tensor) -> Tensor:
    total, count = loss(logits, target)
    return total / count


def plain(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), target, ignore_index=255)


def show(name: str, times: tuple[float, float, float], peer: str, target: str = "") -> None:
    print(f"{name:32} {times[0]:8.2f} ms, {peer} {times[1]:8.2f} ms: x {times[2]:.3f}{target}")


def metrics(size: int, classes: int, rounds: int) -> None:
    predicted, target = scene(size, classes)
    ours, peer = PixelConfusion(classes), MulticlassConfusionMatrix(classes, ignore_index=255, validate_args=False)
    both = [lambda: ours.update(predicted, target), lambda: peer.update(predicted, target.long())]
    show("confusion matrix", alternate(*both, rounds), "torchmetrics", " (target 1 ms)")
    boundary = BoundaryF1(classes)
    show("boundary F1", alternate(lambda: boundary.update(predicted, target), both[1], rounds), "torchmetrics")
    show("IoU of each image", alternate(lambda: image_iou(predicted, target, classes), both[1], rounds), "torchmetrics")
    for name, layout in LAYOUTS.items():
        logits = torch.randn(1, classes, size, size).contiguous(memory_format=layout)
        pair = alternate(lambda x=logits: predicted_classes(x), lambda x=logits: x.argmax(dim=1), rounds)  # type: ignore[misc]
        show(f"classes, {name}", pair, "argmax")


def losses(size: int, classes: int, rounds: int) -> None:
    _, target = scene(size, classes)
    for kind in (torch.float32, torch.bfloat16):
        for layout_name, layout in LAYOUTS.items():
            logits = torch.randn(1, classes, size, size).to(kind).contiguous(memory_format=layout).requires_grad_()
            for name, loss in LOSSES.items():
                work = lambda f=loss, x=logits: step(lambda *batch: mean(f, *batch), x, target)  # noqa: E731
                peer = lambda x=logits: step(plain, x, target.long())  # noqa: E731
                show(f"{name}, {layout_name}, {str(kind)[6:]}", alternate(work, peer, rounds), "F.cross_entropy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--size", type=int, default=513)
    parser.add_argument("--classes", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    metrics(options.size, options.classes, options.rounds)
    losses(options.size, options.classes, options.rounds)


if __name__ == "__main__":
    main()
