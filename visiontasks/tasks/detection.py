"""Detection: the objects in an image, each with a class and a box, and where the head draws them a mask."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor
from torchvision.ops import batched_nms

from visiontasks.contracts import Backbone, Batch, Head, UsageError
from visiontasks.heads import FCOS
from visiontasks.layers.casting import cast_once
from visiontasks.tasks.base import Prediction, Task
from visiontasks.tasks.detection_metrics import DetectionMetrics, Found, Truth, crowds, mistakes, surer
from visiontasks.tasks.inference import padded, window_sides, windows
from visiontasks.tasks.metrics import stacked

_RIGHT, _WRONG, _MISSED = "forestgreen", "crimson", "gold"
STEP = 1_000_003  # a prime larger than most data sets: apart are the draws of an image in two epochs


class Detection(Task):
    """Learns to find objects: their boxes and classes, and their masks with a head that has a branch for them.

    weights multiplies the head's losses by name. Detections below score_threshold are dropped, and those that overlap
    a better one of their class by more than nms_threshold (IoU); at most max_detections remain. Pictures, precision and
    recall, and predictions show those from `shown` on. With `window` (one side, or height and width) images are looked
    at in windows of that size that share `overlap` of their sides.
    Raises UsageError where a weight names no loss of the head, or the settings contradict themselves.
    """

    needs = frozenset({"bboxes", "labels"})
    metrics: DetectionMetrics
    unit: ClassVar[str] = "objects"

    def __init__(
        self,
        *,
        backbone: Backbone,
        classes: tuple[str, ...],
        head: Head = FCOS,
        weights: Mapping[str, float] | None = None,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.6,
        max_detections: int = 100,
        shown: float = 0.5,
        window: int | Sequence[int] | None = None,
        overlap: float = 0.25,
        monitor: str = "val/map",
        mode: str = "max",
        **shared: Any,
    ) -> None:
        super().__init__(backbone=backbone, classes=classes, monitor=monitor, mode=mode, **shared)
        self.head = head(levels=backbone.levels, num_classes=len(classes))
        self.needs = self.required(type(self.head))
        self.masks = "masks" in self.needs
        self.loss_weights = self._weights(weights or {})
        self.score_threshold = score_threshold
        self.nms_threshold = nms_threshold
        self.max_detections = max_detections
        self.shown = shown
        self.window = window_sides(window, overlap)
        self.overlap = overlap
        self.stride = max(level.stride for level in backbone.levels)
        self.metrics = DetectionMetrics(len(classes), losses=self.loss_weights, shown=shown, masks=self.masks)
        self.category_ids: tuple[int, ...] = tuple(range(1, len(classes) + 1))

    @classmethod
    def required(cls, head: type) -> frozenset[str]:
        return cls.needs | ({"masks"} if getattr(head, "predicts_masks", False) else set())

    def _weights(self, given: Mapping[str, float]) -> dict[str, float]:
        """The weight of each of the head's losses, 1 where none is given."""
        losses: tuple[str, ...] = self.head.losses  # type: ignore[assignment]
        unknown = sorted(set(given) - set(losses))
        if unknown:
            raise UsageError(
                f"task.weights names {unknown} and the head's losses are {sorted(losses)}: weigh only these."
            )
        return {name: given.get(name, 1.0) for name in losses}

    def on_fit_start(self) -> None:
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009
        self.category_ids = tuple(getattr(data, "category_ids", self.category_ids))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["category_ids"] = list(self.category_ids)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.category_ids = tuple(checkpoint["category_ids"])

    def forward(self, images: Tensor) -> Any:
        with cast_once(self.device.type):  # of the heads' weights, which every level uses
            return self.head(self.backbone(padded(images, self.stride)))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        terms = self._terms(self(self.images(batch)), batch)
        loss = self.mean_loss(terms)
        self.watch_losses(loss, terms)
        return loss

    def _terms(self, raw: Any, batch: Batch) -> Tensor:
        """Sum and count of each of the head's losses, (L, 2)."""
        keys = batch["index"].cpu() + STEP * (self.current_epoch + 1)
        terms = self.head.loss(raw, self._targets(batch), keys=keys)  # type: ignore[operator]
        return stacked(terms[name] for name in self.loss_weights)

    def _targets(self, batch: Batch) -> list[Truth]:
        """The objects to learn: crowds, which evaluation data have, are left out."""
        names = ("boxes", "labels", "masks") if self.masks else ("boxes", "labels")
        targets = [{name: objects[name] for name in names} for objects in self._truth(batch)]
        if "crowd" not in batch:
            return targets
        return [
            {name: value[crowd == 0] for name, value in target.items()}
            for target, crowd in zip(targets, batch["crowd"], strict=True)
        ]

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Found]:  # noqa: ARG002
        found = self._found(self.images(batch))
        about = [name for name in ("scale", "size") if name in batch]
        return [one | {name: batch[name][index] for name in about} for index, one in enumerate(found)]

    def evaluation_step(self, batch: Batch) -> list[Found]:
        """The objects found in each image, in the pixels of the batch."""
        images = self.images(batch)
        raw = self(images)
        found = self._decoded(raw) if self.window is None else self._found(images)
        scales = batch["scale"].tolist() if "scale" in batch else [1.0] * len(found)
        self.metrics.update(
            found, self._truth(batch), self._terms(raw, batch), scales=scales, indices=batch["index"].tolist()
        )
        return found

    def _truth(self, batch: Batch) -> list[Truth]:
        """The objects of each image, crowds, which evaluation data have, among them, in the pixels of the batch."""
        renamed = {"bboxes": "boxes", "labels": "labels", "crowd": "iscrowd", "area": "area"}
        renamed |= {"masks": "masks"} if self.masks else {}
        present = [key for key in renamed if key in batch]
        return [
            {renamed[key]: value for key, value in zip(present, row, strict=True)}
            for row in zip(*(batch[key] for key in present), strict=True)
        ]

    def _found(self, images: Tensor) -> list[Found]:
        """The objects in normalised images, looked at whole or in windows."""
        if self.window is None:
            return self._decoded(self(images))
        size = images.shape[-2:]
        parts = [
            [_moved(one, columns.start, rows.start, size) for one in self._decoded(self(images[..., rows, columns]))]
            for rows, columns in windows(size, self.window, self.overlap)
        ]
        return [self._joined(list(own)) for own in zip(*parts, strict=True)]

    def _decoded(self, raw: Any) -> list[Found]:
        found: list[Found] = self.head.detections(  # type: ignore[operator]
            raw,
            score_threshold=self.score_threshold,
            nms_threshold=self.nms_threshold,
            max_detections=self.max_detections,
        )
        return found

    def _joined(self, parts: list[Found]) -> Found:
        """The objects of all windows of an image, those that two windows saw once."""
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        kept = batched_nms(whole["boxes"], whole["scores"], whole["labels"], self.nms_threshold)
        return {name: value[kept[: self.max_detections]] for name, value in whole.items()}

    @property
    def confusion_classes(self) -> tuple[str, ...]:
        return (*self.classes, "background")

    def predictions(self, raw: list[Found]) -> list[Prediction]:
        return [self._plain(surer(found, self.shown)) for found in raw]

    def truths(self, batch: Batch) -> list[Prediction]:
        return [self._plain(truth) for truth in self._truth(batch)]

    def _plain(self, objects: Found | Truth) -> Prediction:
        plain: Prediction = {
            "boxes": [[round(side, 2) for side in box] for box in objects["boxes"].tolist()],
            "classes": [self.classes[label] for label in objects["labels"].tolist()],
        }
        if "iscrowd" in objects:
            plain["crowd"] = objects["iscrowd"].tolist()
        if "scores" in objects:
            plain["scores"] = [round(score, 4) for score in objects["scores"].tolist()]
        if "masks" in objects:
            plain["masks"] = objects["masks"].cpu().numpy()  # (N, H, W)
        if "scale" in objects:
            plain |= {"scale": float(objects["scale"]), "size": objects["size"].tolist()}
        return plain

    def errors(self, raw: list[Found], batch: Batch) -> dict[str, Tensor]:
        """Objects of each image that were missed, and detections that are none or of another class."""
        pairs = zip(raw, self._truth(batch), strict=True)
        faults = [mistakes(surer(found, self.shown), truth) for found, truth in pairs]
        counts = torch.tensor([[missed.sum(), wrong.sum()] for missed, wrong in faults]).float()  # (B, 2)
        return {"misses": counts[:, 0], "false_alarms": counts[:, 1]}

    def save(self, prediction: Prediction, folder: Path, stem: str) -> Prediction:
        """Returns the line, boxes in the file's own pixels; masks go to masks/STEM.npz, (N, H, W) as bits."""
        scale, size = prediction.get("scale", 1.0), prediction.get("size")
        limits = [size[1], size[0], size[1], size[0]] if size else [float("inf")] * 4
        line = {name: prediction[name] for name in ("classes", "scores")}
        line["boxes"] = [
            [round(min(side / scale, limit), 2) for side, limit in zip(box, limits, strict=True)]
            for box in prediction["boxes"]
        ]
        if "masks" in prediction:
            path = folder / "masks" / f"{stem}.npz"
            path.parent.mkdir(exist_ok=True)
            np.savez_compressed(path, masks=_at_file_size(prediction["masks"], scale, size))
            line["masks"] = str(path.relative_to(folder))
        return line

    def finish(self, lines: list[Prediction], folder: Path) -> None:
        """Writes coco_results.json: a file's position and stem as its image, our classes by their original ids."""
        ids = dict(zip(self.classes, self.category_ids, strict=True))
        entries = [
            {
                "image_id": Path(line["file"]).stem,
                "category_id": ids[name],
                "bbox": [box[0], box[1], round(box[2] - box[0], 2), round(box[3] - box[1], 2)],
                "score": score,
            }
            for line in lines
            if "boxes" in line
            for box, name, score in zip(line["boxes"], line["classes"], line["scores"], strict=True)
        ]
        (folder / "coco_results.json").write_text(json.dumps(entries))

    def draw(self, axes: Axes, image: Tensor, prediction: Prediction, truth: Prediction | None) -> None:
        axes.imshow(_under_masks(image, prediction))
        wrong = torch.zeros(len(prediction["boxes"]), dtype=torch.bool)
        if truth is not None:
            wrong = _compare(axes, self._tensors(prediction), self._tensors(truth))
        named = zip(prediction["boxes"], prediction["classes"], prediction["scores"], wrong.tolist(), strict=True)
        for box, name, score, fault in named:
            colour = _WRONG if fault else _RIGHT
            axes.add_patch(_frame(box, edgecolor=colour, linewidth=1.2))
            label = {"facecolor": colour, "edgecolor": "none", "pad": 0.6}
            look: dict[str, Any] = {"fontsize": 5, "color": "white", "va": "bottom", "clip_on": True}
            axes.text(box[0], box[1], f"{name} {score:.0%}", bbox=label, **look)

    def _tensors(self, plain: Prediction) -> Found:
        positions = {name: index for index, name in enumerate(self.classes)}
        boxes = torch.tensor(plain["boxes"], dtype=torch.float32).view(-1, 4)
        labels = torch.tensor([positions[name] for name in plain["classes"]], dtype=torch.int64)
        names = {"scores": "scores", "crowd": "iscrowd"}
        others = {names[key]: torch.tensor(plain[key]) for key in names if key in plain}
        return {"boxes": boxes, "labels": labels, **others}


def _moved(found: Found, left: int, top: int, size: Sequence[int]) -> Found:
    """What a window shows, in the pixels of its image."""
    shift = found["boxes"].new_tensor([left, top, left, top])
    moved = found | {"boxes": found["boxes"] + shift}
    if "masks" in found:
        height, width = found["masks"].shape[-2:]
        whole = found["masks"].new_zeros(len(found["masks"]), *size)
        bottom, right = min(top + height, size[0]), min(left + width, size[1])
        whole[:, top:bottom, left:right] = found["masks"][:, : bottom - top, : right - left]
        moved["masks"] = whole
    return moved


def _at_file_size(masks: Any, scale: float, size: Sequence[int] | None) -> Any:
    """Masks (N, h, w) of a resized and padded image in the pixels of its file, (N, H, W) bool."""
    if size is None or not len(masks):
        return masks.astype(bool)
    from torch.nn.functional import interpolate

    height, width = (min(side, max(1, round(full * scale))) for side, full in zip(masks.shape[-2:], size, strict=True))
    inside = torch.from_numpy(masks[:, None, :height, :width]).float()
    return interpolate(inside, size=tuple(size), mode="bilinear")[:, 0].numpy() >= 0.5


def _compare(axes: Axes, found: Found, truth: Truth) -> Tensor:
    """Frames the true objects, crowds in grey and missed ones in yellow, and says how many; which found are wrong."""
    missed, wrong = mistakes(found, truth)
    for box, crowd, miss in zip(truth["boxes"].tolist(), crowds(truth).tolist(), missed.tolist(), strict=True):
        colour = "grey" if crowd else _MISSED if miss else "white"
        axes.add_patch(_frame(box, edgecolor=colour, linewidth=2.5, linestyle="--" if crowd or miss else "-"))
    faulty = bool(missed.any() or wrong.any())
    axes.set_title(f"{missed.sum()} missed, {wrong.sum()} wrong", color=_WRONG if faulty else "black")
    return wrong


def _frame(box: Sequence[float], **look: Any) -> Rectangle:
    return Rectangle((box[0], box[1]), box[2] - box[0], box[3] - box[1], fill=False, **look)


def _under_masks(image: Tensor, prediction: Prediction) -> Any:
    """An image (3, H, W) as an array (H, W, 3), each object tinted where it has a mask."""
    pixels = image.permute(1, 2, 0).numpy().copy()
    for position, mask in enumerate(prediction.get("masks", [])):
        colour = np.array([(position * 67 + 200) % 256, (position * 131 + 60) % 256, (position * 29 + 90) % 256])
        here = mask[: pixels.shape[0], : pixels.shape[1]] > 0
        pixels[here] = (0.5 * pixels[here] + 0.5 * colour).astype(np.uint8)
    return pixels
