"""The focal loss of dense heads."""

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.heads.detection.geometry import IGNORED


def focal_sum(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Gives the sum of the sigmoid focal loss over all anchors and classes, in float32.

    Lin, Goyal, Girshick, He, Dollar 2017, arXiv 1708.02002. Every entry is taken as background, and the few at objects
    are exchanged, so that no tensor of zeros and ones as large as the logits is made.

    Shapes: logits (..., K) and labels (...), the class, BACKGROUND or IGNORED, to a scalar.
    """
    logits = logits.float()
    background = _as_background(logits, alpha, gamma)  # (..., K)
    total = torch.where(labels == IGNORED, 0.0, background.sum(dim=-1)).sum()
    at = (*(labels >= 0).nonzero(as_tuple=True), labels[labels >= 0])
    objects = alpha * torch.sigmoid(-logits[at]) ** gamma * F.softplus(-logits[at])  # (F,)
    return total + (objects - background[at]).sum()


def _as_background(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    return (1 - alpha) * torch.sigmoid(logits) ** gamma * F.softplus(logits)
