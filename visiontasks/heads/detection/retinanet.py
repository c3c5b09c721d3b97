"""RetinaNet: anchors of several shapes at every place, scored with the focal loss."""

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.retinanet import RetinaNetClassificationHead, RetinaNetRegressionHead

from visiontasks.contracts import Level
from visiontasks.heads.detection.focal import focal_sum
from visiontasks.heads.detection.geometry import Anchors, assigned, cells
from visiontasks.heads.detection.pyramid import STRIDES, Pyramid
from visiontasks.heads.detection.raw import Dense, Detection, Target, Terms
from visiontasks.heads.detection.selecting import dense_detections

_PAPERS_WIDTH = 256
_FIRST_WEIGHTS = 0.01  # their standard deviation in the paper


class RetinaNet(nn.Module):
    """One-stage detection with anchors: class scores and a box for each of nine anchors at each place.

    Lin, Goyal, Girshick, He, Dollar 2017, Focal Loss for Dense Object Detection, arXiv 1708.02002. The branches and
    their names are those of torchvision's RetinaNet. Branches narrower than the paper's start with weights so much
    larger that they carry as much: through four convolutions of 128 channels with the paper's, a quarter would arrive.

    Shapes: a pyramid to Dense.

    Args:
        strides: of the feature pyramid.
        width: channels of the feature pyramid and of the branches; 256 in the paper.
        anchor_scale: side of a level's smallest anchors in strides.
        ratios: heights of the anchors over their widths.
        octaves: sizes of anchors between one level and the next.
        overlap: IoU below which an anchor is background, and from which on it belongs to an object.
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
        width: int = 128,
        anchor_scale: float = 4.0,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        octaves: int = 3,
        overlap: tuple[float, float] = (0.4, 0.5),
        candidates: int = 1000,
    ) -> None:
        super().__init__()
        self.candidates = candidates
        self.pyramid = Pyramid(levels, strides=strides, width=width)
        self.anchors = Anchors(cells(self.pyramid.strides, anchor_scale, ratios, octaves), self.pyramid.strides)
        self.classification_head = RetinaNetClassificationHead(width, octaves * len(ratios), num_classes)
        self.regression_head = RetinaNetRegressionHead(width, octaves * len(ratios))
        for layer in (*self.classification_head.conv.modules(), *self.regression_head.conv.modules()):
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=_FIRST_WEIGHTS * (_PAPERS_WIDTH / width) ** 0.5)
        self.coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.matcher = Matcher(overlap[1], overlap[0], allow_low_quality_matches=True)

    def forward(self, features: list[Tensor]) -> Dense:
        maps = self.pyramid(features)
        return Dense(
            logits=self.classification_head(maps),
            codes=self.regression_head(maps),
            quality=None,
            anchors=self.anchors(maps),
            counts=self.anchors.counts(maps),
            size=self.pyramid.size(features),
        )

    def loss(self, raw: Dense, targets: list[Target], *, keys: Tensor | None = None) -> Terms:  # noqa: ARG002
        """Focal loss and L1 loss of the boxes' codes, each with the number of anchors on objects as its count."""
        labels, image, place, truth = assigned(self.matcher, raw.anchors, targets)
        wanted = self.coder.encode_single(truth, raw.anchors[place])
        count = raw.anchors.new_tensor(len(image))
        return {
            "classification": (focal_sum(raw.logits, labels), count),
            "boxes": (F.l1_loss(raw.codes[image, place].float(), wanted, reduction="sum"), count),
        }

    def detections(
        self, raw: Dense, *, score_threshold: float, nms_threshold: float, max_detections: int
    ) -> list[Detection]:
        """The objects of each image, best first."""
        return dense_detections(
            raw,
            raw.logits.float().sigmoid(),
            self.coder.decode_single,
            candidates=self.candidates,
            score_threshold=score_threshold,
            nms_threshold=nms_threshold,
            max_detections=max_detections,
        )
