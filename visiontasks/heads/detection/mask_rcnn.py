"""Mask R-CNN: Faster R-CNN that also draws each object."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from visiontasks.contracts import Level
from visiontasks.heads.detection.faster_rcnn import Drawn, FasterRCNN
from visiontasks.heads.detection.geometry import precise
from visiontasks.heads.detection.raw import Detection, Regions, Target, Terms, TwoStage

_POOLED = 14


class MaskRCNN(FasterRCNN):
    """Faster R-CNN with a third branch, which says for each class what pixels of a region belong to the object.

    He, Gkioxari, Dollar, Girshick 2017, Mask R-CNN, arXiv 1703.06870. The layers and their names within `mask_head` and
    `mask_predictor` are torchvision's. Detections have "masks" (N, H, W), 1 in the object and 0 elsewhere; targets need
    them.

    Args:
        mask_width: channels of the third branch; 256 in the paper.
        mask_convs: its 3x3 convolutions.
        options: those of FasterRCNN.

    Raises:
        UsageError: if the strides do not double, or the backbone has none of them.
    """

    predicts_masks: ClassVar[bool] = True
    losses: ClassVar[tuple[str, ...]] = (*FasterRCNN.losses, "masks")

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        width: int = 128,
        mask_width: int = 128,
        mask_convs: int = 4,
        **options: Any,
    ) -> None:
        super().__init__(levels=levels, num_classes=num_classes, width=width, **options)
        self.mask_head = MaskRCNNHeads(width, [mask_width] * mask_convs, 1)
        self.mask_predictor = MaskRCNNPredictor(mask_width, mask_width, num_classes + 1)

    def loss(self, raw: TwoStage, targets: list[Target], *, keys: Tensor | None = None) -> Terms:
        """Faster R-CNN's losses, and the mean cross-entropy of each mask with the number of masks as its count."""
        terms, drawn = self._learn(raw, targets, keys)
        return terms | {"masks": self._mask_term(raw.regions, drawn, targets)}

    def _mask_term(self, regions: Regions, drawn: Drawn, targets: list[Target]) -> tuple[Tensor, Tensor]:
        found = [own >= 0 for own in drawn.objects]
        boxes = [own[keep] for own, keep in zip(drawn.boxes, found, strict=True)]
        objects = [own[keep] for own, keep in zip(drawn.objects, found, strict=True)]
        logits = self._masks(regions, boxes, drawn.labels[drawn.labels >= 0])  # (F, M, M)
        parts = zip(targets, boxes, objects, strict=True)
        wanted = torch.cat([_seen(target["masks"], box, own, logits.shape[-1]) for target, box, own in parts])
        errors = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=(1, 2))
        return errors.sum(), logits.new_tensor(len(logits))

    def _masks(self, regions: Regions, boxes: list[Tensor], labels: Tensor) -> Tensor:
        """Logits of the masks of the labels' classes in boxes, (N, M, M), in float32."""
        maps = self.mask_predictor(self.mask_head(self._pooled(regions, boxes, _POOLED)))
        return precise(maps[torch.arange(len(labels), device=labels.device), labels + 1])

    def detections(
        self, raw: TwoStage, *, score_threshold: float, nms_threshold: float, max_detections: int
    ) -> list[Detection]:
        """The objects of each image with their masks, best first."""
        found = super().detections(
            raw, score_threshold=score_threshold, nms_threshold=nms_threshold, max_detections=max_detections
        )
        boxes = [detection["boxes"] for detection in found]
        labels = torch.cat([detection["labels"] for detection in found])
        logits = self._masks(raw.regions, boxes, labels)
        masks = torch.split(logits.sigmoid(), [len(own) for own in boxes])
        return [
            detection | {"masks": _pasted(own, detection["boxes"], raw.regions.size)}
            for detection, own in zip(found, masks, strict=True)
        ]


def _seen(masks: Tensor, boxes: Tensor, objects: Tensor, size: int) -> Tensor:
    """The part of each box's own mask that lies in the box, (n, size, size), between 0 and 1."""
    regions = torch.cat([objects[:, None].to(boxes.dtype), boxes], dim=1)  # (n, 5)
    seen: Tensor = roi_align(masks[:, None].to(boxes.dtype), regions, size)  # (n, 1, size, size)
    return seen[:, 0]


def _pasted(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes (n, M, M) as masks of the image (n, H, W), uint8, one after the other to save memory."""
    pasted = masks.new_zeros((len(masks), *size), dtype=torch.uint8)
    for index in range(len(masks)):
        one = slice(index, index + 1)
        pasted[one] = paste_masks_in_image(masks[one, None], boxes[one], size)[:, 0] >= 0.5
    return pasted
