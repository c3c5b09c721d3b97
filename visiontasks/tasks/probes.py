"""What features know of labels, read from outside: weighted nearest neighbours and a linear classifier."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.errors import UsageError
from visiontasks.layers.embeddings import in_full_precision, unit

BLOCK = 2**24  # similarities that are held at once


@in_full_precision
def nearest_classes(
    queries: Tensor, bank: Tensor, labels: Tensor, *, classes: int, neighbours: Sequence[int], temperature: float = 0.07
) -> Tensor:
    """The classes that the nearest rows of a bank elect, each row with exp(cosine / temperature) votes.

    Wu et al. 2018, arXiv 1805.01978, section 3.4. All rows vote where `neighbours` are more than the bank has.
    Shapes: queries (N, D), bank (M, D), labels (M,) below `classes`; returns (len(neighbours), N), for each number of
    neighbours. Memory does not grow with N x M.
    Raises UsageError where a number of neighbours or the temperature is not above 0.
    """
    if min(neighbours) < 1 or not temperature > 0:
        raise UsageError(
            f"neighbours={list(neighbours)} and temperature={temperature} must be above 0: type [20,200] and 0.07."
        )
    rows, most = unit(bank), min(max(neighbours), len(bank))
    blocks = torch.split(unit(queries), max(1, BLOCK // len(bank)))
    found = [(block @ rows.T).topk(most, dim=1) for block in blocks]  # (n, most) each
    votes = torch.cat([similar for similar, _ in found]).div(temperature).exp()  # (N, most)
    voters = labels[torch.cat([where for _, where in found])]  # (N, most)
    return torch.stack(
        [
            votes.new_zeros(len(votes), classes).scatter_add_(1, voters[:, :k], votes[:, :k]).argmax(1)
            for k in neighbours
        ]
    )


class Linear(NamedTuple):
    """A linear classifier of features."""

    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)

    def __call__(self, features: Tensor) -> Tensor:
        """Logits (N, K) of features (N, D)."""
        return F.linear(features, self.weight, self.bias)


def fit_linear(features: Tensor, labels: Tensor, *, classes: int, decay: float = 1e-3, steps: int = 200) -> Linear:
    """The multinomial logistic regression with the least mean cross-entropy plus decay / 2 times the squared weights.

    It is fitted on features scaled to mean 0 and deviation 1, where the decay acts, and given for features as they are.
    L-BFGS from zero, so nothing is drawn at random; it also works in inference mode.
    Shapes: features (N, D), labels (N,) below `classes`.
    """
    with torch.inference_mode(mode=False), torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        rows = features.float() + 0.0  # a tensor that autograd may keep, also where features came in inference mode
        std, mean = torch.std_mean(rows, dim=0, correction=0)  # (D,) each
        scale = 1 / std.where(std > 0, 1)
        fitted = _minimised((rows - mean) * scale, labels.clone(), classes, decay, steps)
        weight = fitted.weight.detach() * scale
        return Linear(weight, fitted.bias.detach() - weight @ mean)


def _minimised(rows: Tensor, labels: Tensor, classes: int, decay: float, steps: int) -> Linear:
    fitted = Linear(rows.new_zeros(classes, rows.shape[1]).requires_grad_(), rows.new_zeros(classes).requires_grad_())
    solver = torch.optim.LBFGS(
        fitted, max_iter=steps, tolerance_grad=1e-5, tolerance_change=1e-7, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(fitted(rows), labels) + decay / 2 * fitted.weight.square().sum()
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return fitted
