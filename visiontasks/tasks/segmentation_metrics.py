"""Metrics of predicted class maps: counts over the whole data set, so exact on any number of processes."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from visiontasks.contracts import IGNORE, UsageError
from visiontasks.tasks.metrics import Figures, Metrics, Sums

VALUES = 256  # that a pixel of a mask can have


def predicted_classes(logits: Tensor) -> Tensor:
    """The class with the largest logit of each pixel, the first of equals: (B, K, H, W) to uint8 (B, H, W)."""
    return logits.max(dim=1).indices.to(torch.uint8)  # a quarter of argmax's time on a CPU


def pair_counts(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """How often each target value met each predicted class, (256, K) int64, in maps of any one shape.

    Predicted values must be below K, as those of predicted_classes are.
    """
    pairs = (target.int() * classes).add_(predicted).flatten()
    return torch.bincount(pairs, minlength=VALUES * classes).view(VALUES, classes)


def image_iou(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    """The mean IoU of each image over the classes in its truth or prediction, (B,); 1 where all pixels are ignored.

    Shapes: predicted and target (B, H, W), uint8 or int64.
    """
    maps = zip(predicted, target, strict=True)
    counts = torch.stack([pair_counts(guess, truth, classes)[:classes] for guess, truth in maps])  # (B, K, K)
    right = counts.diagonal(dim1=1, dim2=2)  # (B, K)
    union = counts.sum(dim=2) + counts.sum(dim=1) - right  # (B, K)
    return (right / union).nanmean(dim=1).nan_to_num(1.0)


class PixelConfusion(Metric):
    """Counts of pixels by true and by predicted class, over all images of all processes.

    Raises UsageError where there are more than 255 classes, and when computed where a target value is neither a class
    nor 255.
    """

    full_state_update = False
    counts: Tensor  # (256, K) int64, a row for each value of the target

    def __init__(self, classes: int) -> None:
        super().__init__()
        if classes > IGNORE:
            raise UsageError(f"There are {classes} classes and a mask can hold 255: use fewer classes.")
        self.classes = classes
        self.add_state("counts", torch.zeros(VALUES, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Adds maps of classes of any one shape, uint8 or int64; 255 in the target is ignored."""
        self.counts = self.counts + pair_counts(predicted, target, self.classes)

    def compute(self) -> Tensor:
        """The confusion matrix (K, K) int64; rows are the truth."""
        strays = self.counts[self.classes : IGNORE].sum(dim=1).nonzero().flatten() + self.classes
        if len(strays):
            raise UsageError(
                f"The masks hold the value {int(strays[0])} and there are {self.classes} classes: expected 0 to "
                f"{self.classes - 1}, or 255 to ignore a pixel; name every class, or mend the masks."
            )
        return self.counts[: self.classes]


def confusion_figures(confusion: Tensor) -> tuple[Figures, Figures]:
    """Figures by name, and the tables per_class_iou, per_class_dice, per_class_accuracy (K,), of counts (K, K).

    miou and dice are means over the classes that occur in the truth or the prediction, mean_accuracy over those in the
    truth; a class that does not is NaN in the table. frequency_weighted_iou weighs each IoU by the class's share of
    the true pixels. All are NaN where no pixel was counted.
    """
    right, true, chosen = confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)  # (K,) each
    iou = right / (true + chosen - right)
    dice = 2 * right / (true + chosen)
    accuracy = right / true
    figures = {
        "miou": iou.nanmean(),
        "pixel_accuracy": right.sum() / confusion.sum(),
        "mean_accuracy": accuracy.nanmean(),
        "dice": dice.nanmean(),
        "frequency_weighted_iou": (iou.nan_to_num() * true).sum() / true.sum(),
    }
    return figures, {"per_class_iou": iou, "per_class_dice": dice, "per_class_accuracy": accuracy}


class BoundaryF1(Metric):
    """How well predicted outlines follow the true ones, class by class (Csurka et al. 2013, BMVC).

    A pixel is on the outline of its class where one of its four neighbours has another class; ignored pixels neither
    are nor make outlines, in the truth and in the prediction. It matches where the other map has an outline pixel of
    the same class within `tolerance` of the image's diagonal (Euclidean; never less than one pixel). Precision and
    recall of a class are its matching pixels over its outline pixels, both summed over all images (the paper averages
    over images, which depends on how images are cut), and F1 is their harmonic mean.
    """

    full_state_update = False
    counts: Tensor  # (2, 2, K) int64: of prediction and truth, pixels on outlines, and those that match

    def __init__(self, classes: int, tolerance: float = 0.0075) -> None:
        super().__init__()
        if not 0 < tolerance < 1:
            raise UsageError(f"tolerance={tolerance} is no share of the diagonal: give 0 to 1, such as 0.0075.")
        self.classes = classes
        self.tolerance = tolerance
        self.add_state("counts", torch.zeros(2, 2, classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Adds class maps (B, H, W), uint8 or int64; 255 in the target is ignored."""
        radius = max(1.0, self.tolerance * math.hypot(*target.shape[-2:]))
        guess = predicted.to(torch.uint8).where(target != IGNORE, IGNORE)  # (B, H, W)
        self.counts = self.counts + outline_counts(guess, target.to(torch.uint8), self.classes, radius)

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean over classes that have an outline anywhere, and F1 of each class (K,), NaN where it has none."""
        total, matched = self.counts.unbind(dim=1)  # (2, K) each
        precision, recall = (matched / total.clamp(min=1)).unbind()  # (K,) each
        f1 = (2 * precision * recall / (precision + recall)).nan_to_num()  # no match in either is 0
        per_class = f1.where(total.sum(dim=0) > 0, math.nan)
        return per_class.nanmean(), per_class


def outline_counts(predicted: Tensor, target: Tensor, classes: int, radius: float) -> Tensor:
    """Pixels of each class on outlines, and those of them that match, (2, 2, K) int64, of prediction and truth.

    Shapes: two uint8 maps (B, H, W), both 255 where a pixel is ignored; radius in pixels.
    """
    maps = (predicted, target)
    edges = [_outline(labels) for labels in maps]  # (B, H, W) bool each
    total = _class_counts(maps, edges)  # (2, 256)
    shared = (total > 0).all(dim=0).nonzero().flatten()  # only these classes can match
    matched = [torch.zeros_like(edge) for edge in edges]
    for group in torch.split(shared, 8):  # a class is a bit of a byte
        table = torch.zeros(VALUES, dtype=torch.uint8, device=target.device)
        table[group] = 2 ** torch.arange(len(group), dtype=torch.uint8, device=target.device)
        bits = [_looked_up(table, labels) * edge for labels, edge in zip(maps, edges, strict=True)]
        matched[0] |= (bits[0] & _spread(bits[1], radius)) > 0
        matched[1] |= (bits[1] & _spread(bits[0], radius)) > 0
    return torch.stack((total, _class_counts(maps, matched)), dim=1)[..., :classes]


def _class_counts(maps: tuple[Tensor, Tensor], chosen: list[Tensor]) -> Tensor:
    """How many of the chosen pixels have each value, (2, 256), in two maps."""
    pairs = zip(maps, chosen, strict=True)
    return torch.stack([torch.bincount(labels[where], minlength=VALUES) for labels, where in pairs])


def _looked_up(table: Tensor, labels: Tensor) -> Tensor:
    """table[labels], in a sixth of the time."""
    return table.index_select(0, labels.flatten().int()).view(labels.shape)


def _outline(labels: Tensor) -> Tensor:
    """Whether a pixel has a neighbour above, below, left or right of another class, (B, H, W)."""
    valid = labels != IGNORE
    edge = torch.zeros_like(valid)
    for dim in (1, 2):
        length = labels.shape[dim] - 1
        first, second = (slice_.narrow(dim, 0, length) for slice_ in (labels, valid))
        other, sound = (slice_.narrow(dim, 1, length) for slice_ in (labels, valid))
        differs = (first != other) & second & sound
        edge.narrow(dim, 0, length).logical_or_(differs)
        edge.narrow(dim, 1, length).logical_or_(differs)
    return edge


def _spread(bits: Tensor, radius: float) -> Tensor:
    """Each byte (B, H, W) joined by bitwise or with all within a Euclidean distance in pixels."""
    reach = int(radius)
    wide, half_width = bits.clone(), 0  # bits joined with their row neighbours up to half_width away
    spread = torch.zeros_like(bits)
    for away in range(reach, -1, -1):  # rows: the farther, the fewer columns of the disc they take
        width = int(math.sqrt(radius**2 - away**2))
        for column in range(half_width + 1, width + 1):
            _join(wide, bits, 2, column)
        half_width = width
        _join(spread, wide, 1, away)
    return spread


def _join(into: Tensor, bits: Tensor, dim: int, shift: int) -> None:
    """Joins bits moved by shift in both directions along a dimension into another tensor, in place."""
    length = bits.shape[dim] - shift
    if length <= 0:
        return
    for start, end in ((0, shift), (shift, 0)):
        part = into.narrow(dim, start, length)
        part.bitwise_or_(bits.narrow(dim, end, length))


class SegmentationMetrics(Metrics):
    """The losses, and all figures of one confusion matrix, with boundary F1 where it is wanted.

    losses gives the weight of each loss in the sum that is called loss.
    """

    def __init__(self, classes: int, *, losses: Mapping[str, float], boundary_f1: bool = True) -> None:
        super().__init__()
        self.classes = classes
        self.sums = Sums(losses)
        self.confusion = PixelConfusion(classes)
        self.boundary = BoundaryF1(classes) if boundary_f1 else None

    def update(self, predicted: Tensor, target: Tensor, terms: Tensor) -> None:
        """Adds a batch: class maps (B, H, W), the truth with 255 for ignored, the losses' sums and counts (L, 2)."""
        self.sums.update(terms)
        self.confusion.update(predicted, target)
        if self.boundary is not None:
            self.boundary.update(predicted, target)

    def compute(self) -> tuple[Figures, Figures]:
        """Figures by name, and the tables: confusion (K, K), rows are the truth; per_class_iou and others (K,)."""
        figures, tables = confusion_figures(confusion := self.confusion.compute().view(self.classes, self.classes))
        values = self.sums.compute() | figures
        if self.boundary is not None:
            values["boundary_f1"], per_class = self.boundary.compute()
            tables["per_class_boundary_f1"] = per_class.view(-1)
        return values, {"confusion": confusion, **tables}
