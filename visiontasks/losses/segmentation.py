"""Losses of pixels as (sum, count), each a sum over images, so that it does not matter which process sees which image.

All take logits (B, K, H, W) of any float type, and compute in float32 or better; target (B, H, W), uint8 or int64 class
indices, where 255 is ignored. A batch with every pixel ignored gives a sum and a count of zero, with zero gradient.
"""

import inspect
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.contracts import IGNORE, UsageError

Loss = Callable[..., tuple[Tensor, Tensor]]  # f(logits, target), with weight= where it knows class weights


def pixel_cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy over the pixels.

    Shapes: weight (K,). The count is the sum of the valid pixels' weights, as in PyTorch's mean.
    """
    target = target.long()
    total = _cross_entropy(logits, target, weight=weight, label_smoothing=label_smoothing, reduction="sum")
    return total, _sum(_weight_of(target, weight)).to(total.dtype)


def focal(logits: Tensor, target: Tensor, *, weight: Tensor | None = None, gamma: float = 2.0) -> tuple[Tensor, Tensor]:
    """Cross-entropy times (1 - p) ** gamma, where p is the probability of the true class: easy pixels count less.

    Lin et al. 2017, arXiv 1708.02002, with softmax in place of sigmoids. Shapes: weight (K,). The count is that of
    the cross-entropy, which it is at gamma 0. Raises UsageError where gamma is negative.
    """
    if gamma < 0:
        raise UsageError(f"The focal loss's gamma is {gamma} and must be 0 or more: the paper's choice is 2.")
    target = target.long()
    surprise = _cross_entropy(logits, target, reduction="none")  # (B, H, W) -log p
    doubt = -torch.expm1(-surprise)  # 1 - p
    doubt = doubt.clamp(min=torch.finfo(doubt.dtype).tiny)  # a root has no slope at 0
    weights = _weight_of(target, weight)  # (B, H, W)
    total = (doubt**gamma * surprise * weights).sum()
    return total, _sum(weights).to(total.dtype)


def ohem(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    threshold: float = 0.7,
    min_kept: float = 0.0625,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy over the hard pixels of each image: those whose true class has a probability below threshold.

    Where they are fewer than the share min_kept of the image's valid pixels, the hardest of that share are kept.
    Shrivastava et al. 2016, arXiv 1604.03540, applied to pixels. Shapes: weight (K,), which does not change what is
    kept. The count is the sum of the kept pixels' weights. Raises UsageError where a setting is not within 0..1.
    """
    if not 0 < threshold <= 1:
        raise UsageError(f"OHEM's threshold is {threshold}, no probability: give more than 0 and at most 1, as 0.7.")
    if not 0 <= min_kept <= 1:
        raise UsageError(f"OHEM's min_kept is {min_kept}, no share of the pixels: give 0 to 1, such as 0.0625.")
    target = target.long()
    surprise = _cross_entropy(logits, target, reduction="none")  # (B, H, W) -log p
    weights = _weight_of(target, weight) * _hard(surprise.detach(), target != IGNORE, threshold, min_kept)
    total = (surprise * weights).sum()
    return total, _sum(weights).to(total.dtype)


def _hard(surprise: Tensor, valid: Tensor, threshold: float, min_kept: float) -> Tensor:
    """Which valid pixels OHEM keeps, (B, H, W)."""
    ranked = surprise.where(valid, -1).flatten(1).sort(dim=1, descending=True).values  # (B, H * W)
    kept = (valid.flatten(1).sum(dim=1, keepdim=True) * min_kept).ceil().long()  # (B, 1) at least so many
    last = ranked.gather(1, (kept - 1).clamp(min=0)).where(kept > 0, math.inf)  # (B, 1) the easiest of them
    return valid & ((surprise > -math.log(threshold)) | (surprise >= last[..., None]))


def dice(logits: Tensor, target: Tensor, *, absent: bool = False, smooth: float = 1.0) -> tuple[Tensor, Tensor]:
    """One minus the soft Dice overlap of each image, averaged over the classes that its truth contains.

    The overlap of a class is (2 sum(p g) + smooth) / (sum(p^2) + sum(g^2) + smooth) over the image's valid pixels
    (Milletari et al. 2016, arXiv 1606.04797, where smooth is 0). With absent, all K classes are averaged: a class that
    is not there then costs what the network sees of it. The count is the number of images with a valid pixel.
    Raises UsageError where smooth is negative, or 0 with absent, which gives absent classes no gradient.
    """
    if smooth < 0 or (absent and smooth == 0):
        raise UsageError(f"The Dice loss's smooth is {smooth}: give 0 or more, and more than 0 with absent=true.")
    probabilities = _precise(logits).softmax(dim=1)  # (B, K, H, W)
    here = _one_hot(target, logits.shape[1])  # (B, K, H, W)
    overlap = probabilities.where(here, 0).sum(dim=(2, 3))  # (B, K)
    predicted = (probabilities.square() * (target != IGNORE)[:, None]).sum(dim=(2, 3))  # (B, K)
    true = _pixels(target, logits.shape[1])  # (B, K)
    costs = 1 - (2 * overlap + smooth) / (predicted + true + smooth).clamp(min=torch.finfo(predicted.dtype).tiny)
    counted = (true > 0) | (absent & (true > 0).any(dim=1, keepdim=True))  # (B, K)
    means = (costs * counted).sum(dim=1) / counted.sum(dim=1).clamp(min=1)  # (B,)
    return means.sum(), counted.any(dim=1).sum().to(means.dtype)


def lovasz(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The Lovász extension of one minus the Jaccard index of each image, averaged over the classes its truth contains.

    Berman et al. 2018, arXiv 1705.08790: a surrogate of 1 - IoU. The count is the number of images with a valid pixel.
    """
    probabilities = _precise(logits).softmax(dim=1).flatten(2)  # (B, K, P)
    here = _one_hot(target, logits.shape[1]).flatten(2)  # (B, K, P)
    present = _pixels(target, logits.shape[1]) > 0  # (B, K)
    image, _ = present.nonzero(as_tuple=True)  # (N,) the image of each pair of image and class
    true = here[present]  # (N, P)
    errors = (probabilities[present] - true.to(probabilities.dtype)).abs()  # (N, P)
    slopes = _jaccard_slopes(errors.detach(), true, (target != IGNORE).flatten(1)[image])  # (N, P)
    classes = present.sum(dim=1)  # (B,)
    total = ((errors * slopes).sum(dim=1) / classes[image]).sum()
    return total, (classes > 0).sum().to(total.dtype)


@torch.no_grad()
def _jaccard_slopes(errors: Tensor, true: Tensor, valid: Tensor) -> Tensor:
    """What each pixel's error adds to the Jaccard loss when pixels become wrong from the largest error on, (N, P).

    A pixel of the class adds 1 / union, and any other intersection / (union * (union before it)).
    """
    order = errors.where(valid, -1).argsort(dim=1, descending=True, stable=True)  # (N, P) ignored pixels come last
    ranked = true.gather(1, order)  # (N, P)
    size = true.sum(dim=1, keepdim=True, dtype=torch.int32)  # (N, 1)
    union = (size + (~ranked).cumsum(dim=1, dtype=torch.int32)).to(errors.dtype)  # (N, P)
    intersection = (size - ranked.cumsum(dim=1, dtype=torch.int32)).to(errors.dtype)  # (N, P)
    slopes = torch.where(ranked, 1, intersection / (union - 1)) / union  # (N, P)
    return torch.empty_like(errors).scatter_(1, order, slopes).where(valid, 0)


class Term:
    """One loss of a weighted sum, called with logits and target as the loss is, and returning its (sum, count).

    weight multiplies the loss's mean, which the caller takes. class_weights says whether the loss is handed the
    task's class weights. Raises UsageError where weight is negative, and when called with class weights that the loss
    does not know.
    """

    def __init__(self, loss: Loss = pixel_cross_entropy, weight: float = 1.0, class_weights: bool = True) -> None:
        if not (math.isfinite(weight) and weight >= 0):
            raise UsageError(f"A loss has the weight {weight} and needs a number of 0 or more: type weight=1.0.")
        self.loss = loss
        self.weight = weight
        self.class_weights = class_weights
        self._knows_weights = "weight" in inspect.signature(loss).parameters

    def __call__(self, logits: Tensor, target: Tensor, *, class_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if class_weights is None or not self.class_weights:
            return self.loss(logits, target)
        if not self._knows_weights:
            raise UsageError(
                f"The loss {self.name} takes no class weights: type task.class_weights=null, or class_weights=false "
                "under the loss's name to leave them to the other losses."
            )
        return self.loss(logits, target, weight=class_weights)

    @property
    def name(self) -> str:
        """The name of the loss function."""
        return str(getattr(getattr(self.loss, "func", self.loss), "__name__", self.loss))


def _precise(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _cross_entropy(
    logits: Tensor, target: Tensor, *, reduction: str, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """F.cross_entropy of pixels, a scalar or (B, H, W); channels-last logits go as rows, which is 1.7 times as fast."""
    scores, indices = _precise(logits), target
    if logits.stride(1) == 1:
        scores, indices = scores.permute(0, 2, 3, 1).flatten(0, 2), target.flatten()  # (B * H * W, K), (B * H * W,)
    loss = F.cross_entropy(
        scores,
        indices,
        None if weight is None else weight.to(scores.dtype),
        ignore_index=IGNORE,
        reduction=reduction,
        label_smoothing=label_smoothing,
    )
    return loss if reduction == "sum" else loss.view(target.shape)


def _weight_of(target: Tensor, weight: Tensor | None) -> Tensor:
    """The weight of each pixel's class, (B, H, W); 0 where it is ignored."""
    if weight is None:
        return target != IGNORE
    return F.pad(weight, (0, IGNORE + 1 - len(weight)))[target]


def _sum(weights: Tensor) -> Tensor:
    return weights.count_nonzero() if weights.dtype == torch.bool else weights.sum()


def _pixels(target: Tensor, classes: int) -> Tensor:
    """The number of pixels of each class in each image, (B, K) int64."""
    values = target.flatten(1).long()  # (B, P)
    counts = values.new_zeros(len(values), IGNORE + 1)  # (B, 256)
    return counts.scatter_add_(1, values, torch.ones_like(values))[:, :classes]


def _one_hot(target: Tensor, classes: int) -> Tensor:
    """Whether each pixel is of each class, (B, K, H, W); False everywhere where it is ignored."""
    indices = torch.arange(classes, dtype=target.dtype, device=target.device).view(1, -1, 1, 1)
    return target[:, None] == indices
