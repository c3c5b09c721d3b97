"""FCOS: every place of a map is inside an object or not, and says how far the object's sides are."""

from collections.abc import Sequence
from functools import partial
from math import gcd, inf
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxLinearCoder
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import generalized_box_iou_loss

from visiontasks.contracts import Level
from visiontasks.heads.detection.focal import focal_sum
from visiontasks.heads.detection.geometry import BACKGROUND, Anchors, by_anchor, padded_targets
from visiontasks.heads.detection.pyramid import STRIDES, Pyramid
from visiontasks.heads.detection.raw import Dense, Detection, Target, Terms
from visiontasks.heads.detection.selecting import dense_detections

_FIRST_DISTANCE = 2.0  # strides: torchvision's ReLU would hold back every second box that starts at zero


class FCOS(nn.Module):
    """Fully convolutional one-stage detection: class scores, distances to the four sides and centreness at each place.

    Tian, Shen, Chen, He 2019, FCOS, arXiv 1904.01355, with centre sampling and IoU loss of arXiv 2006.09214. The
    branches and their names are those of torchvision's FCOS.

    Shapes: a pyramid to Dense, whose anchors are squares of one stride around the places.

    Args:
        strides: of the feature pyramid.
        width: channels of the feature pyramid and of the branches; 256 in the paper.
        convs: 3x3 convolutions with group norm in each branch, in 32 groups, or fewer of four channels and more.
        reach: a level learns the objects whose farthest side is `reach` / 2 to `reach` strides away; the finest one
            also nearer, the coarsest one also farther ones.
        radius: of the part around an object's centre that belongs to it, in strides.
        offset: of the first place from the image's corner, in strides.
        candidates: best entries a level that go on to the suppression of overlaps.

    Raises:
        UsageError: if the strides do not double, or the backbone has none of them.
    """

    serves: ClassVar[str] = "detection"
    losses: ClassVar[tuple[str, ...]] = ("classification", "boxes", "centreness")

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        strides: Sequence[int] = STRIDES,
        width: int = 128,
        convs: int = 4,
        reach: float = 8.0,
        radius: float = 1.5,
        offset: float = 0.5,
        candidates: int = 1000,
    ) -> None:
        super().__init__()
        self.reach, self.radius, self.candidates = reach, radius, candidates
        self.pyramid = Pyramid(levels, strides=strides, width=width)
        self.anchors = Anchors(
            [_square(stride) for stride in self.pyramid.strides], self.pyramid.strides, offset=offset
        )
        norm: Any = partial(nn.GroupNorm, gcd(32, width // 4, width))
        self.classification_head = FCOSClassificationHead(width, 1, num_classes, convs, norm_layer=norm)
        self.regression_head = FCOSRegressionHead(width, 1, convs, norm_layer=norm)
        nn.init.constant_(self.regression_head.bbox_reg.bias, _FIRST_DISTANCE)
        for layer in (*self.classification_head.conv, *self.regression_head.conv):
            if isinstance(layer, nn.ReLU):
                layer.inplace = True  # group norm needs its input again, not its output
        self.coder = BoxLinearCoder(normalize_by_size=True)

    def forward(self, features: list[Tensor]) -> Dense:
        maps = self.pyramid(features)
        scoring, regression = self.classification_head, self.regression_head
        sized = [regression.conv(level) for level in maps]
        return Dense(
            logits=scoring(maps),
            codes=by_anchor([regression.bbox_reg(level) for level in sized], 4).relu(),
            quality=by_anchor([regression.bbox_ctrness(level) for level in sized], 1)[..., 0],
            anchors=self.anchors(maps),
            counts=self.anchors.counts(maps),
            size=self.pyramid.size(features),
        )

    def loss(self, raw: Dense, targets: list[Target], *, keys: Tensor | None = None) -> Terms:  # noqa: ARG002
        """Focal loss, generalised IoU loss and centreness, each with the number of places on objects as its count."""
        boxes, labels = padded_targets(targets)
        matched = self.match(raw, boxes)  # (B, P)
        image, place = (matched >= 0).nonzero(as_tuple=True)  # (F,) each
        truth = boxes[image, matched[image, place]]  # (F, 4)
        anchors = raw.anchors[place]
        classes = torch.where(matched >= 0, labels.gather(1, matched.clamp(min=0)), BACKGROUND)
        found = self.coder.decode(raw.codes[image, place].float(), anchors)
        assert raw.quality is not None
        quality = raw.quality[image, place].float()
        count = raw.anchors.new_tensor(len(image))
        return {
            "classification": (focal_sum(raw.logits, classes), count),
            "boxes": (generalized_box_iou_loss(found, truth, reduction="sum"), count),
            "centreness": (
                F.binary_cross_entropy_with_logits(quality, self._centreness(anchors, truth), reduction="sum"),
                count,
            ),
        }

    def match(self, raw: Dense, boxes: Tensor) -> Tensor:
        """Gives each place the index of the smallest object that it belongs to, or -1; boxes (B, M, 4) to (B, P)."""
        places = (raw.anchors[:, :2] + raw.anchors[:, 2:])[None, :, None] / 2  # (1, P, 1, 2)
        strides = (raw.anchors[:, 2] - raw.anchors[:, 0])[None, :, None]  # (1, P, 1)
        x1, y1, x2, y2 = boxes[:, None].unbind(dim=-1)  # (B, 1, M)
        left, top = places[..., 0] - x1, places[..., 1] - y1  # (B, P, M)
        right, bottom = x2 - places[..., 0], y2 - places[..., 1]
        nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
        farthest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
        eccentric = torch.maximum((left - right).abs(), (top - bottom).abs()) / 2
        low, high = self._ranges(raw)
        belongs = (nearest > 0) & (eccentric < self.radius * strides) & (farthest > low) & (farthest < high)
        areas = torch.where(belongs, (x2 - x1) * (y2 - y1), inf)  # (B, P, M)
        area, index = areas.min(dim=2)
        return torch.where(area < inf, index, BACKGROUND)

    def _ranges(self, raw: Dense) -> tuple[Tensor, Tensor]:
        """The distances of the farthest sides between which each place learns, (1, P, 1) each."""
        strides = raw.anchors[:, 2] - raw.anchors[:, 0]
        low, high = strides * self.reach / 2, strides * self.reach
        low[: raw.counts[0]] = 0
        high[-raw.counts[-1] :] = inf
        return low[None, :, None], high[None, :, None]

    def _centreness(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        left, top, right, bottom = self.coder.encode(anchors, boxes).unbind(dim=-1)
        across = torch.minimum(left, right) / torch.maximum(left, right)
        along = torch.minimum(top, bottom) / torch.maximum(top, bottom)
        return torch.sqrt(across * along)

    def detections(
        self, raw: Dense, *, score_threshold: float, nms_threshold: float, max_detections: int
    ) -> list[Detection]:
        """The objects of each image, best first; a score is the geometric mean of class probability and centreness."""
        assert raw.quality is not None
        scores = (raw.logits.float().sigmoid() * raw.quality.float().sigmoid()[..., None]).sqrt()  # (B, P, K)
        return dense_detections(
            raw,
            scores,
            self.coder.decode,
            candidates=self.candidates,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )


def _square(side: int) -> Tensor:
    return torch.tensor([[-side / 2, -side / 2, side / 2, side / 2]])
