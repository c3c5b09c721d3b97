"""Training and inference beside torchvision's FCOS, RetinaNet and Faster R-CNN: python benchmarks/detection.py

The same network, numbers of anchors and regions, uint8 batch and optimiser, alternating in one process; medians of
the ratios of neighbouring steps, ours over torchvision's. Memory is what autograd keeps for the backward pass. The last
line of a case says where our step's time goes. Three settings:

    float32     both sides in float32, their weights and images in torch's usual layout
    bfloat16    both sides with bfloat16 autocast, their weights and images channels-last
    default     each side as it comes: ours as in bfloat16, where the processor has it, torchvision's as in float32

--device cuda measures on a GPU.
"""

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torchvision.models.detection as tv
from memory import kept
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelP6P7

from visiontasks.backbones import TorchvisionBackbone
from visiontasks.cli.build import native_bfloat16
from visiontasks.heads import FCOS, FasterRCNN, RetinaNet
from visiontasks.heads.detection.pyramid import STRIDES
from visiontasks.tasks import Detection

CLASSES = tuple(map(str, range(20)))
RATIOS = (0.5, 1.0, 2.0)
REGIONS, PROPOSALS, HIDDEN = 128, 300, 1024
THRESHOLDS = {"score_threshold": 0.05, "nms_threshold": 0.5, "max_detections": 100}
SETTINGS = {"float32": (False, False), "bfloat16": (True, True), "default": (True, False)}  # fast: ours, torchvision's
Batch = dict[str, Any]


class Halved(ExtraFPNBlock):
    """Two coarser levels of every second value, as our Faster R-CNN has them."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        coarser = [results[-1][..., ::2, ::2], results[-1][..., ::4, ::4]]
        return results + coarser, [*names, "p6", "p7"]


class Maps(nn.Module):
    """Our backbone under torchvision's feature pyramid, as its detectors want them."""

    def __init__(self, backbone: TorchvisionBackbone, *, learnt: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.used = [index for index, level in enumerate(backbone.levels) if level.stride in STRIDES]
        channels = [backbone.levels[index].channels for index in self.used]
        self.pyramid = FeaturePyramidNetwork(channels, 256, LastLevelP6P7(256, 256) if learnt else Halved())
        self.out_channels = 256

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps = self.backbone(images)
        levels = self.pyramid({str(index): maps[index] for index in self.used}).values()
        return OrderedDict((str(index), level) for index, level in enumerate(levels))


class Mine(nn.Module):
    """Our task's step and inference without its metrics."""

    def __init__(self, task: Detection, *, fast: bool) -> None:
        super().__init__()
        self.task = task
        self.fast = fast

    def loss(self, batch: Batch) -> Tensor:
        with precision(batch["image"], fast=self.fast):
            terms = self.task.head.loss(self.task(self.task.images(batch)), batch["targets"], keys=batch["index"])
        return torch.stack([total / count.clamp(min=1) for total, count in terms.values()]).sum()

    def detections(self, batch: Batch) -> Any:
        with precision(batch["image"], fast=self.fast):
            return self.task.head.detections(self.task(self.task.images(batch)), **THRESHOLDS)


class Peer(nn.Module):
    """A detector of torchvision; its labels start at `first`."""

    def __init__(self, detector: nn.Module, *, first: int, fast: bool) -> None:
        super().__init__()
        self.detector = detector
        self.first = first
        self.fast = fast

    def loss(self, batch: Batch) -> Tensor:
        targets = [one | {"labels": one["labels"] + self.first} for one in batch["targets"]]
        with precision(batch["image"], fast=self.fast):
            losses = self.detector.train()(self._images(batch), targets)
        return torch.stack([loss.float() for loss in losses.values()]).sum()

    def detections(self, batch: Batch) -> Any:
        with precision(batch["image"], fast=self.fast):
            return self.detector.eval()(self._images(batch))

    def _images(self, batch: Batch) -> list[Tensor]:
        return list(batch["image"].float() / 255)


def precision(images: Tensor, *, fast: bool) -> AbstractContextManager[Any]:
    return torch.autocast(images.device.type, torch.bfloat16, enabled=fast)


def mine(head: Any, *, fast: bool) -> Mine:
    """Our task, in bfloat16 and channels-last or in float32 and torch's usual layout."""
    task = Detection(backbone=TorchvisionBackbone(name="resnet18"), head=head, classes=CLASSES, channels_last=fast)
    return Mine(task.to(memory_format=task.memory_format), fast=fast)


def peer(kind: Callable[..., nn.Module], size: int, *, learnt: bool, first: int, fast: bool, **options: Any) -> Peer:
    """torchvision's detector, likewise."""
    maps = Maps(TorchvisionBackbone(name="resnet18"), learnt=learnt)
    detector = kind(maps, len(CLASSES) + first, min_size=size, max_size=size, **options)
    layout = torch.channels_last if fast else torch.contiguous_format
    return Peer(detector, first=first, fast=fast).to(memory_format=layout)


def fcos_pair(size: int, fast: tuple[bool, bool]) -> tuple[Mine, Peer]:
    """FCOS with branches of four convolutions."""
    options = {"score_thresh": 0.05, "nms_thresh": 0.5}
    return mine(partial(FCOS, width=256), fast=fast[0]), peer(
        tv.FCOS, size, learnt=True, first=0, fast=fast[1], **options
    )


def retinanet_pair(size: int, fast: tuple[bool, bool]) -> tuple[Mine, Peer]:
    """RetinaNet with nine anchors a place."""
    sides = [[4 * stride * 2 ** (step / 3) for step in range(3)] for stride in STRIDES]
    anchors = AnchorGenerator(sides, (RATIOS,) * len(STRIDES))
    options = {"anchor_generator": anchors, "score_thresh": 0.05, "nms_thresh": 0.5}
    return mine(partial(RetinaNet, width=256), fast=fast[0]), peer(
        tv.RetinaNet, size, learnt=True, first=0, fast=fast[1], **options
    )


def faster_rcnn_pair(size: int, fast: tuple[bool, bool]) -> tuple[Mine, Peer]:
    """Faster R-CNN with as many proposals and regions learnt on both sides."""
    head = partial(FasterRCNN, width=256, hidden=HIDDEN, regions_learnt=REGIONS, proposals=PROPOSALS)
    options = {
        "rpn_anchor_generator": AnchorGenerator([[4 * stride] for stride in STRIDES], (RATIOS,) * len(STRIDES)),
        "box_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        "rpn_pre_nms_top_n_train": 1000,
        "rpn_post_nms_top_n_train": PROPOSALS,
        "rpn_post_nms_top_n_test": PROPOSALS,
        "box_batch_size_per_image": REGIONS,
    }
    return mine(head, fast=fast[0]), peer(tv.FasterRCNN, size, learnt=False, first=1, fast=fast[1], **options)


PAIRS = {"FCOS": fcos_pair, "RetinaNet": retinanet_pair, "Faster R-CNN": faster_rcnn_pair}


def made_batch(size: int, images: int, device: str) -> Batch:
    """Noise with ten objects an image."""
    corners = torch.rand(images, 10, 2) * size * 0.7
    sides = (0.05 + 0.25 * torch.rand(images, 10, 2)) * size
    boxes = torch.cat([corners, corners + sides], dim=2)
    labels = torch.randint(0, len(CLASSES), (images, 10))
    pixels = torch.randint(0, 256, (images, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    pairs = zip(boxes.to(device), labels.to(device), strict=True)
    targets = [{"boxes": own, "labels": named} for own, named in pairs]
    return {"image": pixels.to(device), "targets": targets, "index": torch.arange(images, device=device)}


def trained(model: Mine | Peer, optimizer: torch.optim.Optimizer, batch: Batch) -> float:
    """Seconds of one optimiser step."""
    model.train()
    start = now()
    model.loss(batch).backward()
    optimizer.step()
    optimizer.zero_grad()
    return now() - start


@torch.no_grad()
def inferred(model: Mine | Peer, batch: Batch) -> float:
    """Seconds of the detections of a batch."""
    model.eval()
    start = now()
    model.detections(batch)
    return now() - start


def now() -> float:
    """The clock once the accelerator, where there is one, has done its work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def shares(model: Mine, batch: Batch) -> dict[str, float]:
    """Parts of one step's time: backbone, head and loss forwards, and everything's backward."""
    task, marks = model.task.train(), [now()]
    with precision(batch["image"], fast=model.fast):
        features = task.backbone(task.images(batch))
        marks.append(now())
        raw = task.head(features)
        marks.append(now())
        terms = task.head.loss(raw, batch["targets"], keys=batch["index"])
        marks.append(now())
    torch.stack([total for total, _ in terms.values()]).sum().backward()
    marks.append(now())
    model.zero_grad()
    parts = [after - before for before, after in pairwise(marks)]
    return {name: part / sum(parts) for name, part in zip(("backbone", "head", "loss", "backward"), parts, strict=True)}


def compare(name: str, setting: str, *, rounds: int, batch: Batch) -> None:
    """Prints what a step, inference and memory cost of torchvision's."""
    torch.manual_seed(0)
    device = batch["image"].device
    models = [model.to(device) for model in PAIRS[name](batch["image"].shape[-1], SETTINGS[setting])]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-4) for model in models]
    steps, inferences = [], []
    for _ in range(rounds + 1):
        steps.append([trained(model, own, batch) for model, own in zip(models, optimizers, strict=True)])
        inferences.append([inferred(model, batch) for model in models])
    step, theirs = (statistics.median(column) for column in zip(*steps[1:], strict=True))
    print(f"{name}, {setting}: a step {step:.3f} s, torchvision {theirs:.3f} s; ours x ", end="")
    print(f"{statistics.median(ours / peers for ours, peers in steps[1:]):.2f} (target 0.90), inference x ", end="")
    print(f"{statistics.median(ours / peers for ours, peers in inferences[1:]):.2f} (1.00), memory x ", end="")
    memory = [kept(partial(model.train().loss, batch)) for model in models]
    print(f"{memory[0] / memory[1]:.2f} (1.00)")
    print("  " + ", ".join(f"{part} {share:.0%}" for part, share in shares(models[0], batch).items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    given = parser.parse_args()
    halves = given.device != "cpu" or native_bfloat16()
    settings = [setting for setting in given.settings if halves or setting == "float32"]
    batch = made_batch(given.size, given.batch, given.device)
    for name in given.heads:
        for setting in settings:
            compare(name, setting, rounds=given.rounds, batch=batch)


if __name__ == "__main__":
    main()
