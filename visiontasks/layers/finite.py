"""Whether gradients are numbers, asked once a step."""

from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer


def learnt(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters that an optimiser would change now: those with a gradient."""
    parameters = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    return [parameter for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def gradients_finite(optimizer: Optimizer) -> Tensor:
    """Whether no gradient of an optimiser is NaN or infinite, a boolean () on their device, without waiting for it.

    Asked of one norm over all, so that a norm above 1.8e19, whose square float32 does not hold, is not finite either.
    """
    gradients = [parameter.grad for parameter in learnt(optimizer) if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).isfinite()


def drop_gradients(optimizer: Optimizer) -> None:
    """Leaves an optimiser nothing to do: its next step moves no weight, no moment and no weight decay."""
    for parameter in learnt(optimizer):
        parameter.grad = None


def poisoned(loss: Tensor) -> Tensor:
    """The gradient of a loss with respect to itself: 1, and NaN where the loss is NaN or infinite.

    Passed to `backward`, it lets no process learn from a loss that is not finite though its gradients are, as those of
    a cross-entropy that ignores every pixel are: averaged over processes, NaN stays NaN.
    """
    loss = loss.detach()
    return loss - loss + 1
