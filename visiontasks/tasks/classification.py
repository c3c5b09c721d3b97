"""Classification: one class an image, or any number of labels an image."""

from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MultilabelAccuracy,
    MultilabelAveragePrecision,
    MultilabelExactMatch,
    MultilabelF1Score,
)
from torchmetrics.functional.classification import binary_calibration_error
from torchmetrics.utilities.data import dim_zero_cat
from torchvision.transforms import v2

from visiontasks.contracts import Backbone, Batch, Head, UsageError
from visiontasks.heads import Linear
from visiontasks.layers.distributed import mean_over_processes
from visiontasks.losses import binary_cross_entropy, cross_entropy
from visiontasks.tasks.base import Prediction, Task
from visiontasks.tasks.metrics import Figures, Metrics, Sums, stacked

TOP = 5


class Classification(Task):
    """Learns the class of an image, or with multi_label the set of its labels.

    label_smoothing is the share of the target spread over all classes; class_weights has one number a class;
    mixup and cutmix are the alpha of their Beta distributions, 0 switches off
    (Zhang et al. 2017, arXiv 1710.09412; Yun et al. 2019, arXiv 1905.04899).
    Raises UsageError where class_weights does not have one number a class.
    """

    needs = frozenset({"label"})
    metrics: "_LabelMetrics"

    def __init__(
        self,
        *,
        backbone: Backbone,
        classes: tuple[str, ...],
        head: Head = Linear,
        multi_label: bool = False,
        label_smoothing: float = 0.0,
        class_weights: list[float] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        monitor: str = "val/accuracy",
        mode: str = "max",
        **shared: Any,
    ) -> None:
        super().__init__(backbone=backbone, classes=classes, monitor=monitor, mode=mode, **shared)
        if class_weights is not None and len(class_weights) != len(classes):
            found, wanted = len(class_weights), len(classes)
            raise UsageError(f"task.class_weights has {found} numbers and the data {wanted} classes: give {wanted}.")
        self.head = head(levels=backbone.levels, num_classes=len(classes))
        self.multi_label = multi_label
        self.label_smoothing = label_smoothing
        self.mix = _mix(mixup, cutmix, len(classes))
        self.metrics = MultiLabelMetrics(len(classes)) if multi_label else ClassMetrics(len(classes))
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.class_weights: Tensor | None
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.backbone(images))  # (B, K)
        return logits

    def loss(self, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the loss over the batch, and what to divide it by."""
        function = binary_cross_entropy if self.multi_label else cross_entropy
        smoothing = self.label_smoothing if self.training else 0.0
        return function(logits, target, weight=self.class_weights, label_smoothing=smoothing)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        images, target = self.images(batch), batch["label"]
        if self.mix is not None:
            images, target = self.mix(images, target)
        total, count = self.loss(self(images), target)
        self.watch("loss", total, count)
        return mean_over_processes(total, count)

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        logits: Tensor = self(self.images(batch))
        return logits

    def evaluation_step(self, batch: Batch) -> Tensor:
        """The logits of each image, (B, K)."""
        logits: Tensor = self(self.images(batch)).float()
        terms = stacked([self.loss(logits, batch["label"])])
        self.metrics.update(self.probabilities(logits), batch["label"], terms)
        return logits

    def probabilities(self, logits: Tensor) -> Tensor:
        """Logits as probabilities of one class, or of each label."""
        return logits.float().sigmoid() if self.multi_label else logits.float().softmax(dim=1)

    def predictions(self, raw: Tensor) -> list[Prediction]:
        probabilities = self.probabilities(raw)  # (B, K)
        scores, ranked = probabilities.topk(min(TOP, len(self.classes)), dim=1)  # (B, TOP)
        tops = [
            {self.classes[k]: round(score, 6) for k, score in zip(row, values, strict=True)}
            for row, values in zip(ranked.tolist(), scores.tolist(), strict=True)
        ]
        if not self.multi_label:
            return [{"class": next(iter(top)), "score": next(iter(top.values())), "top": top} for top in tops]
        chosen = [self._names(row) for row in (probabilities >= 0.5).tolist()]
        return [{"class": names, "top": top} for names, top in zip(chosen, tops, strict=True)]

    def truths(self, batch: Batch) -> list[Prediction]:
        labels = batch["label"]
        if self.multi_label:
            return [{"class": self._names(row)} for row in labels.tolist()]
        return [{"class": self.classes[label]} for label in labels.tolist()]

    def _names(self, present: list[float]) -> str:
        return ", ".join(name for name, here in zip(self.classes, present, strict=True) if here) or "none"

    def errors(self, raw: Tensor, batch: Batch) -> dict[str, Tensor]:
        """The probability given to what is not true: of the wrong class chosen, or of the most wrong label."""
        probabilities, labels = self.probabilities(raw), batch["label"]  # (B, K), (B,) or (B, K)
        if self.multi_label:
            wrong: Tensor = (probabilities - labels).abs().amax(dim=1)  # (B,)
            return {"mistakes": wrong.where(wrong > 0.5, 0)}
        score, chosen = probabilities.max(dim=1)
        return {"mistakes": score.where(chosen != labels, 0)}  # (B,)

    def draw(self, axes: Axes, image: Tensor, prediction: Prediction, truth: Prediction | None) -> None:
        axes.imshow(image.permute(1, 2, 0).numpy())
        score = f" {prediction['score']:.0%}" if "score" in prediction else ""
        if truth is None or truth["class"] == prediction["class"]:
            axes.set_title(f"{prediction['class']}{score}", color="black")
            return
        axes.set_title(f"{prediction['class']}{score}\nnot {truth['class']}", color="crimson")
        for spine in axes.spines.values():
            spine.set(edgecolor="crimson", linewidth=3, visible=True)


class _LabelMetrics(Metrics):
    def __init__(self, metrics: dict[str, Metric | MetricCollection]) -> None:
        super().__init__()
        self.sums = Sums({"loss": 1.0})
        self.metrics = MetricCollection(metrics, compute_groups=False)

    def update(self, probabilities: Tensor, target: Tensor, terms: Tensor) -> None:
        """Adds a batch: probabilities (B, K), target (B,) or (B, K), the loss's sum and count (1, 2)."""
        self.sums.update(terms)
        self.metrics.update(probabilities, target.long())

    def compute(self) -> tuple[Figures, Figures]:
        """Figures by name, and no tables."""
        return self.sums.compute() | self.metrics.compute(), {}


class CalibrationError(MulticlassCalibrationError):
    """torchmetrics' own, summed in float64: in float32 it depends on the order of the images, by 4e-6 of 22."""

    def compute(self) -> Tensor:
        confidences, right = dim_zero_cat(self.confidences), dim_zero_cat(self.accuracies)
        shares = confidences.cpu().double().clamp(0, 1)
        error = binary_calibration_error(shares, right.cpu().long(), n_bins=self.n_bins, norm=self.norm)
        return error.to(confidences)


class ClassMetrics(_LabelMetrics):
    """Accuracy, top-5, macro F1, mean per-class accuracy and expected calibration error of one class an image."""

    def __init__(self, classes: int) -> None:
        metrics: dict[str, Metric | MetricCollection] = {
            "confusion": MulticlassConfusionMatrix(classes),
            "ece": CalibrationError(classes, n_bins=15),
        }
        if classes > TOP:
            metrics["top5"] = MulticlassAccuracy(classes, top_k=TOP, average="micro")
        super().__init__(metrics)

    def compute(self) -> tuple[Figures, Figures]:
        """Figures by name, and the tables: confusion (K, K), rows are the truth; per_class_accuracy (K,).

        Classes without an image count neither in the mean per-class accuracy nor, unless predicted, in macro F1.
        """
        values, _ = super().compute()
        confusion = values.pop("confusion")
        right, true, chosen = confusion.diag(), confusion.sum(dim=1), confusion.sum(dim=0)
        per_class = right / true  # NaN where a class has no image
        f1 = 2 * right / (true + chosen)  # NaN where it is not predicted either
        values |= {
            "accuracy": right.sum() / confusion.sum(),
            "mean_class_accuracy": per_class.nanmean(),
            "f1": f1.nanmean(),
        }
        return values, {"confusion": confusion, "per_class_accuracy": per_class}


class MultiLabelMetrics(_LabelMetrics):
    """Label-wise accuracy, exact match, macro F1 and mean average precision of any number of labels an image."""

    def __init__(self, classes: int) -> None:
        super().__init__(
            {
                "accuracy": MultilabelAccuracy(classes, average="micro"),
                "exact_match": MultilabelExactMatch(classes),
                "f1": MultilabelF1Score(classes, average="macro"),
                "map": MultilabelAveragePrecision(classes, average="macro"),
            }
        )
        self.classes = classes

    def compute(self) -> tuple[Figures, Figures]:
        """Figures by name, and no tables."""
        ranked: Any = self.metrics["map"]
        if not ranked.preds:  # of a process without an image; torchmetrics would send a vector in place of rows
            rows = torch.zeros(0, self.classes, device=ranked.device)
            ranked.preds, ranked.target = [rows], [rows.long()]
        return super().compute()


def _mix(mixup: float, cutmix: float, classes: int) -> nn.Module | None:
    mixes = [
        make(alpha=alpha, num_classes=classes) for make, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha > 0
    ]
    return v2.RandomChoice(mixes) if mixes else None
