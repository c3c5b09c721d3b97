"""Classification losses as (sum, count), so that one place can divide by the count over all processes."""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Softmax cross-entropy in float32.

    Shapes: logits (B, K); target (B,) class indices, or (B, K) class probabilities as MixUp makes them; weight (K,).
    The count is the sum of the targets' weights for class indices, and B for probabilities, as in PyTorch's mean.
    """
    total = F.cross_entropy(logits.float(), target, weight, reduction="sum", label_smoothing=label_smoothing)
    if weight is None or target.is_floating_point():
        return total, total.new_tensor(len(logits))
    return total, weight[target].sum()


def binary_cross_entropy(
    logits: Tensor, target: Tensor, *, weight: Tensor | None = None, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sigmoid cross-entropy in float32 of images that carry any number of labels.

    Shapes: logits (B, K); target (B, K) in 0..1; weight (K,) multiplies the loss of each class. The count is B x K.
    """
    smooth = target.float() * (1 - label_smoothing) + 0.5 * label_smoothing
    total = F.binary_cross_entropy_with_logits(logits.float(), smooth, weight, reduction="sum")
    return total, torch.tensor(float(logits.numel()), device=logits.device)
