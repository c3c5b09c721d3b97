"""Semantic segmentation: the class of every pixel."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from visiontasks.contracts import IGNORE, Backbone, Batch, Head, UsageError
from visiontasks.heads import FCN, UNet
from visiontasks.layers.blocks import resized
from visiontasks.losses import Term
from visiontasks.tasks.base import Prediction, Task
from visiontasks.tasks.inference import augmented, padded, window_sides, windowed
from visiontasks.tasks.metrics import stacked
from visiontasks.tasks.segmentation_metrics import SegmentationMetrics, image_iou, predicted_classes

Scored = tuple[Tensor, Tensor | None]  # logits of the head and of the auxiliary head


class Segmentation(Task):
    """Learns the class of every pixel; pixels of 255 in the truth count nowhere.

    losses are weighted terms by name; class_weights has one number a class. auxiliary is the weight of a second,
    fully convolutional head on the second coarsest level, which helps training only (Zhao et al. 2016,
    arXiv 1612.01105, section 3.3). Evaluation and prediction take images whole, or where `window` is set in windows of
    that size (one side, or height and width) that share `overlap` of their sides, and average over `scales` and, with
    flips, mirror images.
    Raises UsageError where class_weights does not have one number a class, or the settings contradict themselves.
    """

    needs = frozenset({"mask"})
    metrics: SegmentationMetrics
    panels: ClassVar[int] = 4  # image, truth, prediction, errors
    unit: ClassVar[str] = "pixels"

    def __init__(
        self,
        *,
        backbone: Backbone,
        classes: tuple[str, ...],
        head: Head = UNet,
        losses: Mapping[str, Term] | None = None,
        class_weights: list[float] | None = None,
        auxiliary: float = 0.0,
        window: int | Sequence[int] | None = None,
        overlap: float = 0.5,
        scales: Sequence[float] = (1.0,),
        flips: bool = False,
        boundary_f1: bool = True,
        monitor: str = "val/miou",
        mode: str = "max",
        **shared: Any,
    ) -> None:
        super().__init__(backbone=backbone, classes=classes, monitor=monitor, mode=mode, **shared)
        self.head = head(levels=backbone.levels, num_classes=len(classes))
        self.auxiliary_weight = auxiliary
        self.auxiliary = self._auxiliary(backbone, auxiliary)
        self.losses = dict(losses or {"cross_entropy": Term()})
        self.stride = max(level.stride for level in backbone.levels)
        self.window = window_sides(window, overlap)
        self.overlap = overlap
        self.scales = _scales(scales)
        self.flips = flips
        self.loss_weights = {name: term.weight for name, term in self.losses.items()}
        self.metrics = SegmentationMetrics(len(classes), losses=self.loss_weights, boundary_f1=boundary_f1)
        weights = self._weights(class_weights)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def _auxiliary(self, backbone: Backbone, weight: float) -> FCN | None:
        if weight < 0 or (weight > 0 and len(backbone.levels) < 2):
            levels = len(backbone.levels)
            raise UsageError(
                f"task.auxiliary={weight} needs a weight of 0 or more and a backbone of two levels or more, and this "
                f"one has {levels}: type task.auxiliary=0."
            )
        return FCN(levels=backbone.levels[:-1], num_classes=len(self.classes)) if weight else None

    def _weights(self, given: list[float] | None) -> Tensor | None:
        if given is not None and len(given) != len(self.classes):
            found, wanted = len(given), len(self.classes)
            raise UsageError(f"task.class_weights has {found} numbers and the masks {wanted} classes: give {wanted}.")
        return None if given is None else torch.tensor(given, dtype=torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        return self._scored(images, auxiliary=False)[0]

    def _scored(self, images: Tensor, *, auxiliary: bool) -> Scored:
        """Logits (B, K, H, W) of the heads for normalised images of any size (B, C, H, W)."""
        whole = padded(images, self.stride)
        features = self.backbone(whole)
        heads = [self.head, self.auxiliary if auxiliary else None]
        height, width = images.shape[-2:]
        main, second = (
            None if head is None else resized(head(inputs), whole.shape[-2:])[..., :height, :width]
            for head, inputs in zip(heads, (features, features[:-1]), strict=True)
        )
        return main, second  # type: ignore[return-value]  # the first is never None

    def _terms(self, logits: Tensor, target: Tensor) -> Tensor:
        """Sum and count of every loss, (L, 2)."""
        return stacked(term(logits, target, class_weights=self.class_weights) for term in self.losses.values())

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        logits, auxiliary = self._scored(self.images(batch), auxiliary=True)
        terms = self._terms(logits, batch["mask"])
        loss = self.mean_loss(terms)
        if auxiliary is not None:
            loss = loss + self.auxiliary_weight * self.mean_loss(self._terms(auxiliary, batch["mask"]))
        self.watch_losses(loss, terms)
        return loss

    def infer(self, images: Tensor) -> Tensor:
        """Class scores (B, K, H, W) of normalised images, whose softmax is the probability of each class."""
        if self.window is None and self.scales == (1.0,) and not self.flips:
            return self(images)  # type: ignore[no-any-return]
        return _log(augmented(self._windowed, images, scales=self.scales, flips=self.flips))

    def _windowed(self, images: Tensor) -> Tensor:
        if self.window is None:
            return self(images)  # type: ignore[no-any-return]
        return _log(windowed(self, images, window=self.window, overlap=self.overlap))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[Tensor]:  # noqa: ARG002
        return [mask for images, _ in _stacks(batch) for mask in predicted_classes(self._answer(images))]

    def evaluation_step(self, batch: Batch) -> list[Tensor]:
        """The predicted classes of each image, uint8 (H, W)."""
        predicted: list[Tensor] = []
        for images, target in _stacks(batch):
            scores = self._answer(images)  # (B, K, H, W)
            classes = predicted_classes(scores)  # (B, H, W)
            self.metrics.update(classes, target, self._terms(scores, target))
            predicted += classes
        return predicted

    def _answer(self, images: Tensor) -> Tensor:
        return self.infer(self.images({"image": images}))

    def predictions(self, raw: list[Tensor]) -> list[Prediction]:
        masks = [mask.cpu().numpy() for mask in raw]
        return [{"classes": self._shares(mask), "mask": mask} for mask in masks]

    def _shares(self, mask: NDArray[np.uint8]) -> dict[str, float]:
        """The share of the pixels that each class has, the largest first, those without a pixel left out."""
        counts = np.bincount(mask.ravel(), minlength=len(self.classes))
        return {self.classes[k]: round(float(counts[k] / mask.size), 6) for k in np.argsort(-counts) if counts[k]}

    def truths(self, batch: Batch) -> list[Prediction]:
        return [{"mask": mask.cpu().numpy()} for mask in batch["mask"]]

    def errors(self, raw: list[Tensor], batch: Batch) -> dict[str, Tensor]:
        """One minus each image's mean IoU over the classes that occur in it."""
        pairs = zip(raw, batch["mask"], strict=True)
        iou = torch.cat([image_iou(mask[None], truth[None], len(self.classes)) for mask, truth in pairs])  # (B,)
        return {"mistakes": 1 - iou}

    def save(self, prediction: Prediction, folder: Path, stem: str) -> Prediction:
        """Writes the mask as a PNG of class indices with a palette, masks/STEM.png, and names it in the line."""
        path = folder / "masks" / f"{stem}.png"
        path.parent.mkdir(exist_ok=True)
        picture = Image.fromarray(prediction["mask"], mode="L")
        picture.putpalette(self.colours().tobytes())
        picture.save(path)
        return {"mask": str(path.relative_to(folder)), "classes": prediction["classes"]}

    def colours(self) -> NDArray[np.uint8]:
        """The colour of each index, (256, 3); a background is black, 255 (ignored) is light grey."""
        first = 0 if self.classes[0] == "background" else 1
        return np.stack([_colour(first + index) for index in range(IGNORE)] + [_GREY])

    def legend(self) -> dict[str, tuple[float, ...]]:
        """The colour of each class, in 0..1."""
        return {name: tuple(colour / 255) for name, colour in zip(self.classes, self.colours(), strict=False)}

    def draw(self, axes: Axes, image: Tensor, prediction: Prediction, truth: Prediction | None) -> None:
        pixels, mask = image.permute(1, 2, 0).numpy(), prediction["mask"]
        if truth is None:
            axes.imshow(_row([pixels, self._overlaid(pixels, mask)]))
            axes.set_title(", ".join(list(prediction["classes"])[:5]))
            return
        valid = truth["mask"] != IGNORE
        errors = _tinted(pixels, valid & (mask != truth["mask"]), np.array([230, 20, 60], np.uint8))
        axes.imshow(_row([pixels, self._overlaid(pixels, truth["mask"]), self._overlaid(pixels, mask), errors]))
        axes.set_title(f"{(mask == truth['mask'])[valid].mean() if valid.any() else 1:.0%} of pixels right")

    def _overlaid(self, pixels: NDArray[np.uint8], mask: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An image under its mask's colours; the background stays as it is."""
        coloured = (0.35 * pixels + 0.65 * self.colours()[mask]).astype(np.uint8)
        return np.where(self._foreground(mask)[..., None], coloured, pixels)

    def _foreground(self, mask: NDArray[np.uint8]) -> NDArray[np.bool_]:
        return mask > 0 if self.classes[0] == "background" else np.ones_like(mask, bool)


_GREY = np.array([224, 224, 224], np.uint8)


def _stacks(batch: Batch) -> Iterable[tuple[Tensor, Tensor]]:
    """Images (B, 3, H, W) with their masks (B, H, W), empty where there are none: all at once, or each by itself."""
    images = batch["image"]
    masks = batch.get("mask", [images[0].new_empty(0)] * len(images))
    if isinstance(images, Tensor):
        return [(images, masks)]
    return [(image[None], mask[None]) for image, mask in zip(images, masks, strict=True)]


def _log(probabilities: Tensor) -> Tensor:
    return probabilities.clamp_min(1e-12).log()


def _scales(scales: Sequence[float]) -> tuple[float, ...]:
    if not scales or min(scales) <= 0:
        raise UsageError(f"task.scales={list(scales)} must be numbers above 0: type task.scales=[1.0]")
    return tuple(map(float, scales))


def _colour(index: int) -> NDArray[np.uint8]:
    """The colour of an index in the palette of PASCAL VOC: its bits, dealt to red, green and blue, high bits first."""
    bits = [(index >> bit) & 1 for bit in range(8)]
    return np.array(
        [sum(bits[3 * k + channel] << (7 - k) for k in range(3) if 3 * k + channel < 8) for channel in range(3)],
        np.uint8,
    )


def _tinted(pixels: NDArray[np.uint8], where: NDArray[np.bool_], colour: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A darkened grey image with some pixels in one colour."""
    grey = np.repeat((0.4 * pixels.mean(axis=2, keepdims=True)).astype(np.uint8), 3, axis=2)
    return np.where(where[..., None], colour, grey)


def _row(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Pictures (H, W, 3) side by side, a little apart."""
    height, width = pictures[0].shape[:2]
    gap = np.full((height, max(1, width // 32), 3), 255, np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)
