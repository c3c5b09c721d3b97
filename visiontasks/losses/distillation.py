"""Losses of a student that predicts what a teacher says of another view of the same image.

All compute in float32 or better, whatever autocast says, and return the mean over this process's images; processes
hold equally many, so that the average of their gradients is that of the whole batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.errors import UsageError
from visiontasks.layers.distributed import sum_over_processes, world_size
from visiontasks.layers.embeddings import in_full_precision, sharpen, unit


@in_full_precision
def negative_cosine(predictions: Tensor, targets: Tensor) -> Tensor:
    """Minus the mean cosine between predictions and targets, which get no gradient.

    Chen and He 2020, SimSiam, arXiv 2011.10566. The loss of BYOL, Grill et al. 2020, arXiv 2006.07733, is 2 + 2 times
    this. Shapes: both (B, D).
    """
    return -(unit(predictions) * unit(targets.detach())).sum(dim=-1).mean()


@in_full_precision
def dino(
    student: Tensor,
    teacher: Tensor,
    centre: Tensor,
    *,
    teacher_temperature: float = 0.04,
    student_temperature: float = 0.1,
) -> Tensor:
    """The cross-entropy of the student's crops against the teacher's centred and sharpened view of other crops.

    Caron et al. 2021, DINO, arXiv 2104.14294. Shapes: student (S, B, K) and teacher (T, B, K), logits of all crops and
    of the first T of them, which get no gradient; centre (K,), as `Centre` holds it. Raises UsageError where a
    temperature is not more than 0, and where there is a single crop.
    """
    targets = sharpen((teacher - centre).detach(), teacher_temperature).softmax(dim=-1)  # (T, B, K)
    return other_view_entropy(sharpen(student, student_temperature), targets)


class Centre(nn.Module):
    """The moving average of what the teacher says, over the global batch.

    Caron et al. 2021, DINO, arXiv 2104.14294. The buffer `centre` (K,) is the same on each process.
    """

    centre: Tensor

    def __init__(self, dim: int, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("centre", torch.zeros(dim))

    @torch.no_grad()
    def update(self, teacher: Tensor) -> None:
        """Moves the average towards logits (..., K) by 1 - momentum; to be called after the loss has used it."""
        mean = teacher.to(self.centre.dtype).flatten(0, -2).mean(dim=0)  # (K,)
        self.centre.lerp_(sum_over_processes(mean) / world_size(), 1 - self.momentum)


def other_view_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean cross-entropy over all pairs of a view and the target of another view of the same image.

    Shapes: logits (S, B, K); targets (T, B, K), probabilities, of the first T views. Raises UsageError where there is a
    single view.
    """
    if len(logits) < 2:
        raise UsageError("One view of each image has nothing to predict: choose an augment with two views or more.")
    total = logits.new_zeros(())
    for view, scores in enumerate(logits):
        others = [target for other, target in enumerate(targets) if other != view]
        if others:
            total = total + F.cross_entropy(scores, torch.stack(others).sum(dim=0))
    return total / (len(targets) * (len(logits) - 1))
