"""From scored boxes to detections."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from visiontasks.heads.detection.raw import Dense, Detection

_LEAST_SIDE = 1e-2  # pixels
Decode = Callable[[Tensor, Tensor], Tensor]  # codes (N, 4) and anchors (N, 4) to boxes (N, 4)


def dense_detections(
    raw: Dense,
    scores: Tensor,
    decode: Decode,
    *,
    candidates: int,
    score_threshold: float,
    nms_threshold: float,
    max_detections: int,
) -> list[Detection]:
    """Gives the objects of each image from the scores (B, P, K) of its anchors, with boxes inside the image."""
    found = []
    for image, codes in zip(scores, raw.codes, strict=True):
        score, place, label = best_entries(image, raw.counts, threshold=score_threshold, limit=candidates)
        boxes = clip_boxes_to_image(decode(codes[place].float(), raw.anchors[place]), raw.size)
        found.append(without_overlaps(boxes, score, label, nms_threshold=nms_threshold, max_detections=max_detections))
    return found


def best_entries(
    scores: Tensor, counts: Sequence[int], *, threshold: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gives the entries above a threshold, at most `limit` a level, best first within it.

    Shapes: scores (P, K) to the chosen scores, anchors and labels, (N,) each.
    """
    chosen: list[Tensor] = []
    entries: list[Tensor] = []
    start = 0
    for level in torch.split(scores, list(counts)):
        flat = level.flatten()  # (P of the level * K,)
        above = (flat > threshold).nonzero()[:, 0]
        best = flat[above].topk(min(limit, len(above)))
        chosen.append(best.values)
        entries.append(above[best.indices] + start)
        start += flat.numel()
    entry, classes = torch.cat(entries), scores.shape[1]
    return torch.cat(chosen), entry // classes, entry % classes


def without_overlaps(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_threshold: float, max_detections: int
) -> Detection:
    """Drops what has no area, and every box that overlaps a better one of its class by more than a threshold of IoU.

    Shapes: boxes (N, 4), scores and labels (N,) to those that are left, best first.
    """
    large = remove_small_boxes(boxes, _LEAST_SIDE)
    boxes, scores, labels = boxes[large], scores[large], labels[large]
    kept = batched_nms(boxes, scores, labels, nms_threshold)[:max_detections]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
