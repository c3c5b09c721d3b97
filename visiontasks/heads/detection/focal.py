"""The focal loss of dense heads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from visiontasks.heads.detection.geometry import IGNORED


def focal_sum(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Gives the sum of the sigmoid focal loss over all anchors and classes, in float32.

    Lin, Goyal, Girshick, He, Dollar 2017, arXiv 1708.02002. Every entry is taken as background, and the few at objects
    are exchanged, so that no tensor of zeros and ones as large as the logits is made.

    Shapes: logits (..., K) and labels (...), the class, BACKGROUND or IGNORED, to a scalar.
    """
    background = _Focal.apply(logits, gamma).sum(dim=-1)
    total = (1 - alpha) * torch.where(labels == IGNORED, 0.0, background).sum()
    own = logits[(*(labels >= 0).nonzero(as_tuple=True), labels[labels >= 0])]  # (F,)
    as_objects, as_background = (_Focal.apply(one, gamma).sum() for one in (-own, own))
    return total + alpha * as_objects - (1 - alpha) * as_background  # type: ignore[no-any-return]


class _Focal(torch.autograd.Function):
    """sigmoid(x) ** gamma * softplus(x) in float32, which keeps nothing but x for its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gamma = gamma
        x = x.float()
        return torch.sigmoid(x).pow_(gamma).mul_(F.softplus(x))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        x = kept.float()
        chance = torch.sigmoid(x)
        slope = (1 - chance).mul_(F.softplus(x)).mul_(ctx.gamma).add_(chance)
        return slope.mul_(chance.pow_(ctx.gamma)).mul_(gradient).to(kept.dtype), None
