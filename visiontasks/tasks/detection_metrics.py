"""Metrics of detected objects over the whole data set, the same on any number of processes."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.detection import MeanAveragePrecision
from torchvision.ops import box_iou

from visiontasks.layers.distributed import world_size
from visiontasks.tasks.metrics import Figures, Metrics, Sums

Found = dict[str, Tensor]  # "boxes" (N, 4), "scores" (N,), "labels" (N,), maybe "masks" (N, H, W)
Truth = dict[str, Tensor]  # "boxes" (N, 4), "labels" (N,), maybe "masks", "iscrowd" (N,) and "area" (N,)
Kind = Literal["bbox", "segm"]

MATCHED = 0.5  # IoU from which a detection is the object that it lies on
# COCO's own, in double precision: torchmetrics' default are rounded to single, and a recall of exactly 0.1 misses 0.1
IOUS: list[float] = np.linspace(0.5, 0.95, 10).tolist()
RECALLS: list[float] = np.linspace(0, 1, 101).tolist()
_PARTS = ("box", "mask", "labels", "scores", "crowds", "area")  # of torchmetrics' state, after a prefix


def crowds(truth: Truth) -> Tensor:
    """Which objects are crowds, (N,) bool."""
    return truth.get("iscrowd", torch.zeros_like(truth["labels"])).bool()


def surer(found: Found, least: float) -> Found:
    """The detections with at least some score; what is known of the whole image stays."""
    kept = found["scores"] >= least
    return {name: value if name in ("scale", "size") else value[kept] for name, value in found.items()}


class AveragePrecision(nn.Module):
    """COCO's twelve numbers for boxes, and where asked for masks, by faster-coco-eval.

    Each process adds its own images; `compute` brings all together in the order of their indices, so that ties are
    broken as one process would break them.
    """

    def __init__(self, classes: int, *, masks: bool = False) -> None:
        super().__init__()
        self.classes = classes
        self.indices: list[int] = []
        kinds: tuple[Kind, ...] = ("bbox", "segm") if masks else ("bbox",)
        self.metrics: dict[Kind, MeanAveragePrecision] = {kind: _metric(kind) for kind in kinds}

    def update(self, found: list[Found], truth: list[Truth], indices: list[int]) -> None:
        """Adds images, with their positions in the data set."""
        for metric in self.metrics.values():
            metric.update(_on_cpu(found), _on_cpu(truth))
        self.indices += indices

    def compute(self) -> tuple[Figures, Figures]:
        """Figures by name, and the tables per_class_ap (K,), and precision_recall (101, K) at an IoU of 0.5.

        Those of masks bear the prefix mask_. A figure is NaN where there is no object that it could be of; without
        detections it is 0.
        """
        figures: Figures = {}
        tables: Figures = {}
        for kind in self.metrics:
            together = self._together(kind)
            if sum(map(len, together.groundtruth_labels)) == 0:
                figures |= {f"{_PREFIX[kind]}{name}": torch.tensor(math.nan) for name in _NAMES}
            elif sum(map(len, together.detection_labels)) == 0:
                figures |= {f"{_PREFIX[kind]}{name}": torch.tensor(0.0) for name in _NAMES}
            else:
                computed = together.compute()
                figures |= {f"{_PREFIX[kind]}{name}": _or_nan(computed[name]) for name in _NAMES}
                tables |= self._tables(computed, _PREFIX[kind])
        return figures, tables

    def _tables(self, computed: dict[str, Any], prefix: str) -> Figures:
        precision = torch.as_tensor(computed["precision"])[:, :, :, 0, -1].double()  # (T, R, C)
        precision = precision.where(precision >= 0, math.nan)
        curves = torch.full((precision.shape[1], self.classes), math.nan, dtype=torch.float64)
        averages = torch.full((self.classes,), math.nan, dtype=torch.float64)
        seen = computed["classes"].long().reshape(-1)
        curves[:, seen] = precision[0]
        averages[seen] = precision.nanmean(dim=(0, 1))
        return {f"per_class_{prefix}ap": averages, f"{prefix}precision_recall": curves}

    def _together(self, kind: Kind) -> MeanAveragePrecision:
        """A metric with the images of all processes, sorted."""
        metric = self.metrics[kind]
        names = [name for name in vars(metric) if name.startswith(("detection_", "groundtruth_"))]
        names = [name for name in names if name.split("_", 1)[1] in _PARTS]
        own = (self.indices, {name: getattr(metric, name) for name in names})
        parts: list[Any] = [own]
        if world_size() > 1:
            parts = [None] * world_size()
            dist.all_gather_object(parts, own)
        order = sorted((index, rank, place) for rank, part in enumerate(parts) for place, index in enumerate(part[0]))
        together = _metric(kind)
        for name in names:
            entries = [parts[rank][1][name][place] for _, rank, place in order if parts[rank][1][name]]
            setattr(together, name, entries)
        together._update_count = 1
        return together

    def reset(self) -> None:
        """Forgets all images."""
        for metric in self.metrics.values():
            metric.reset()
        self.indices = []


def _metric(kind: Kind) -> MeanAveragePrecision:
    """torchmetrics' metric of one kind, which is brought together over processes by `AveragePrecision`."""
    metric = MeanAveragePrecision(
        iou_type=kind,
        iou_thresholds=IOUS,
        rec_thresholds=RECALLS,
        backend="faster_coco_eval",
        extended_summary=True,
        sync_on_compute=False,
    )
    metric.warn_on_many_detections = False
    return metric


_NAMES = (
    *("map", "map_50", "map_75", "map_small", "map_medium", "map_large"),
    *("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large"),
)
_PREFIX = {"bbox": "", "segm": "mask_"}


class Match(NamedTuple):
    """What became of the detections and the objects of one image."""

    object_of: Tensor  # (N,) the object that a detection is, -1 for none, -2 where it lies on a crowd
    true: Tensor  # (N,) the class of that object, -1 without one
    found: Tensor  # (M,) whether an object, crowds left out, was detected


def matched(found: Found, truth: Truth) -> Match:
    """Gives each detection, best first, the object that it overlaps most with an IoU of at least 0.5 and that is free.

    Classes do not matter here. A detection of which at least half lies on a crowd is no false alarm.
    """
    crowd = crowds(truth)
    objects, boxes = truth["boxes"][~crowd], found["boxes"]
    overlaps = box_iou(boxes, objects)  # (N, M)
    object_of = torch.full((len(boxes),), -1)
    free = torch.ones(len(objects), dtype=torch.bool)
    for row in found["scores"].argsort(descending=True).tolist():
        allowed = overlaps[row].cpu().where(free, -1.0)
        if len(allowed) and allowed.max() >= MATCHED:
            object_of[row] = allowed.argmax()
            free[object_of[row]] = False
    on_crowd = _share_inside(boxes, truth["boxes"][crowd]).cpu() >= MATCHED
    classes = torch.cat([truth["labels"][~crowd].cpu(), torch.tensor([-1])])
    return Match(object_of.where((object_of >= 0) | ~on_crowd, -2), classes[object_of], ~free)


def mistakes(found: Found, truth: Truth) -> tuple[Tensor, Tensor]:
    """Which objects were missed, crowds never, and which detections lie on no object or name another class.

    Shapes: (M,) and (N,), bool, on the CPU.
    """
    match = matched(found, truth)
    missed = ~crowds(truth).cpu()
    missed[missed.clone()] = ~match.found
    return missed, (match.true != found["labels"].cpu()) & (match.object_of > -2)


def _share_inside(boxes: Tensor, others: Tensor) -> Tensor:
    """The largest share of each box that lies in one of the others, (N,)."""
    low, high = torch.maximum(boxes[:, None, :2], others[:, :2]), torch.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=2)  # (N, M)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).clamp(min=1e-9)
    return (shared / areas[:, None]).max(dim=1).values if len(others) else boxes.new_zeros(len(boxes))


class ObjectConfusion(Metric):
    """Counts of objects by true and by detected class, over all images of all processes.

    The last row is background: detections that lie on no object; the last column objects that were not detected.
    """

    full_state_update = False
    counts: Tensor  # (K + 1, K + 1) int64

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.classes = classes
        self.add_state("counts", torch.zeros(classes + 1, classes + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, found: list[Found], truth: list[Truth]) -> None:
        """Adds images; detections that are too unsure have been left out."""
        for detections, objects in zip(_on_cpu(found), _on_cpu(truth), strict=True):
            match = matched(detections, objects)
            counted = match.object_of > -2
            missed = objects["labels"][~crowds(objects)][~match.found]
            rows = torch.cat([match.true.where(match.true >= 0, self.classes)[counted], missed])
            columns = torch.cat([detections["labels"][counted], torch.full_like(missed, self.classes)])
            pairs = torch.bincount(rows * (self.classes + 1) + columns, minlength=(self.classes + 1) ** 2)
            self.counts = self.counts + pairs.view(self.classes + 1, -1).to(self.counts.device)

    def compute(self) -> tuple[Figures, Tensor]:
        """Precision, recall and F1 of all objects together, and the counts."""
        right = self.counts.diagonal()[:-1].sum()
        precision = right / self.counts[:, :-1].sum().clamp(min=1)
        recall = right / self.counts[:-1].sum().clamp(min=1)
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        return {"precision": precision, "recall": recall, "f1": f1}, self.counts


class DetectionMetrics(Metrics):
    """The losses, COCO's numbers, and how the detections with a score of at least `shown` lie on the objects.

    losses gives the weight of each loss in the sum that is called loss.
    """

    def __init__(self, classes: int, *, losses: Mapping[str, float], shown: float, masks: bool = False) -> None:
        super().__init__()
        self.shown = shown
        self.sums = Sums(losses)
        self.precision = AveragePrecision(classes, masks=masks)
        self.confusion = ObjectConfusion(classes)

    def update(
        self, found: list[Found], truth: list[Truth], terms: Tensor, *, scales: list[float], indices: list[int]
    ) -> None:
        """Adds images: boxes / scale are in the file's pixels; the losses' sums and counts (L, 2)."""
        self.sums.update(terms)
        self.confusion.update([surer(one, self.shown) for one in found], truth)
        self.precision.update(_unscaled(found, scales), _unscaled(truth, scales), indices)

    def compute(self) -> tuple[Figures, Figures]:
        """Figures by name, and the tables: those of `AveragePrecision`, and confusion (K + 1, K + 1)."""
        figures, tables = self.precision.compute()
        counted, confusion = self.confusion.compute()
        return figures | counted | self.sums.compute(), tables | {"confusion": confusion}


def _unscaled(images: list[Found], scales: list[float]) -> list[Found]:
    return [one | {"boxes": one["boxes"] / scale} for one, scale in zip(images, scales, strict=True)]


def _or_nan(value: Tensor) -> Tensor:
    return value.float().where(value >= 0, math.nan)


def _on_cpu(images: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    return [{name: value.detach().cpu() for name, value in image.items()} for image in images]
