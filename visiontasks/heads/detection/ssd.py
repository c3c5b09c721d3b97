"""SSD: boxes of several shapes at every place of the backbone's own maps and a few coarser ones."""

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, SSDMatcher
from torchvision.models.detection.ssd import SSDHead

from visiontasks.contracts import Level
from visiontasks.heads.detection.geometry import Anchors, assigned
from visiontasks.heads.detection.pyramid import STRIDES, HalvingConv, usable
from visiontasks.heads.detection.raw import Dense, Detection, Target, Terms
from visiontasks.heads.detection.selecting import dense_detections

_FIRST_NORM = 20.0  # of the finest map's features, Liu, Rabinovich, Berg 2015, arXiv 1506.04579


class SSD(nn.Module):
    """One-stage detection with default boxes on the backbone's own levels, and on coarser ones made from the last.

    Liu, Anguelov, Erhan, Szegedy, Reed, Fu, Berg 2015, SSD, arXiv 1512.02325, with the hardest background chosen image
    by image; an image without objects learns as much background as one at a single anchor. The paper's boxes are in
    parts of an image of 300 pixels; these are in strides. The last layers and their names are those of torchvision's
    SSDHead.

    Shapes: a pyramid to Dense with K + 1 scores, the first for background.

    Args:
        strides: of the levels.
        width: channels of the coarser levels.
        anchor_scale: side of a level's smaller square in strides; the larger one is sqrt(2) times as long.
        ratios: long over short side of the other boxes; each lies and stands.
        overlap: IoU from which on a box belongs to an object; each object's best box does so anyway.
        hardest: background boxes that are learnt, for each one that belongs to an object.
        candidates: best entries a level that go on to the suppression of overlaps.

    Raises:
        UsageError: if the strides do not double, or the backbone has none of them.
    """

    serves: ClassVar[str] = "detection"
    losses: ClassVar[tuple[str, ...]] = ("classification", "boxes")

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        strides: Sequence[int] = STRIDES,
        width: int = 256,
        anchor_scale: float = 3.0,
        ratios: Sequence[float] = (2.0, 3.0),
        overlap: float = 0.5,
        hardest: int = 3,
        candidates: int = 1000,
    ) -> None:
        super().__init__()
        self.hardest, self.candidates = hardest, candidates
        self.used = usable(levels, strides)
        coarsest = levels[self.used[-1]]
        coarser = [stride for stride in strides if stride > coarsest.stride]
        channels = [levels[index].channels for index in self.used] + [width] * len(coarser)
        self.strides = (*(levels[index].stride for index in self.used), *coarser)
        self.norm = nn.Parameter(torch.full((channels[0], 1, 1), _FIRST_NORM))
        self.coarser = nn.ModuleList(_halving(before, width) for before in channels[len(self.used) - 1 : -1])
        self.anchors = Anchors(
            [_boxes(stride * anchor_scale, ratios) for stride in self.strides], self.strides, offset=0.5
        )
        self.layers = SSDHead(channels, self.anchors.per_place, num_classes + 1)
        self.coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.matcher = SSDMatcher(overlap)

    def forward(self, features: list[Tensor]) -> Dense:
        maps = [features[index] for index in self.used]
        height, width = maps[0].shape[-2:]
        for halving in self.coarser:
            maps.append(halving(maps[-1]))
        maps[0] = F.normalize(maps[0].float(), dim=1) * self.norm
        scored = self.layers(maps)
        return Dense(
            logits=scored["cls_logits"],
            codes=scored["bbox_regression"],
            quality=None,
            anchors=self.anchors(maps),
            counts=self.anchors.counts(maps),
            size=(height * self.strides[0], width * self.strides[0]),
        )

    def loss(self, raw: Dense, targets: list[Target], *, keys: Tensor | None = None) -> Terms:  # noqa: ARG002
        """Cross-entropy and smooth L1 loss, each with the number of anchors on objects as its count."""
        labels, image, place, truth = assigned(self.matcher, raw.anchors, targets)
        wanted = self.coder.encode_single(truth, raw.anchors[place])
        errors = F.cross_entropy(raw.logits.float().flatten(0, 1), labels.flatten() + 1, reduction="none")
        errors = errors.view_as(labels)  # (B, P)
        count = raw.anchors.new_tensor(len(image))
        return {
            "classification": (errors[self._learnt(errors.detach(), labels >= 0)].sum(), count),
            "boxes": (F.smooth_l1_loss(raw.codes[image, place].float(), wanted, reduction="sum"), count),
        }

    def _learnt(self, errors: Tensor, objects: Tensor) -> Tensor:
        """Where there are objects, and each image's background with the largest errors, (B, P)."""
        number = self.hardest * objects.sum(dim=1, keepdim=True).clamp(min=1)  # (B, 1)
        order = errors.masked_fill(objects, -1.0).argsort(dim=1, descending=True)
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        return objects | (rank < number)

    def detections(
        self, raw: Dense, *, score_threshold: float, nms_threshold: float, max_detections: int
    ) -> list[Detection]:
        """The objects of each image, best first."""
        return dense_detections(
            raw,
            raw.logits.float().softmax(dim=-1)[..., 1:],
            self.coder.decode_single,
            candidates=self.candidates,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )


def _boxes(side: float, ratios: Sequence[float]) -> Tensor:
    """Gives two squares and, for each ratio, a lying and a standing box around the origin, (2 + 2 R, 4)."""
    larger = side * 2**0.5
    sizes = [(side, side), (larger, larger)]
    for ratio in ratios:
        sizes += [(side * ratio**0.5, side / ratio**0.5), (side / ratio**0.5, side * ratio**0.5)]
    halves = torch.tensor(sizes) / 2  # (A, 2)
    return torch.cat([-halves, halves], dim=1)


def _halving(in_channels: int, channels: int) -> nn.Sequential:
    block = nn.Sequential(
        nn.Conv2d(in_channels, channels // 2, 1),
        nn.ReLU(inplace=True),
        HalvingConv(channels // 2, channels),
        nn.ReLU(inplace=True),
    )
    for layer in block:
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return block
