"""Losses as sums and counts, and what every task's metrics share."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

Figures = dict[str, Tensor]


def stacked(terms: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Sums and counts of losses as one tensor, (L, 2)."""
    return torch.stack([torch.stack((total, count.to(total.dtype))) for total, count in terms])


def weighted_sum(means: Tensor, weights: Mapping[str, float]) -> Tensor:
    """The sum of losses (L,), each times its weight."""
    return (means * means.new_tensor(list(weights.values()))).sum()


class Sums(Metric):
    """Sum and count of each of several losses, over all processes; weights are those of the losses, by name."""

    full_state_update = False
    sums: Tensor  # (L, 2)

    def __init__(self, weights: Mapping[str, float]) -> None:
        super().__init__()
        self.weights = dict(weights)
        self.add_state("sums", torch.zeros(len(weights), 2), dist_reduce_fx="sum")

    def update(self, terms: Tensor) -> None:
        """Adds a batch's sums and counts (L, 2)."""
        self.sums = self.sums + terms.detach()

    def compute(self) -> Figures:
        """The weighted sum of the losses' means as loss and, of several, each as NAME_loss; 0 without a count."""
        means = self.sums[:, 0] / self.sums[:, 1].where(self.sums[:, 1] > 0, 1)  # (L,)
        parts = {f"{name}_loss": mean for name, mean in zip(self.weights, means, strict=True)}
        return {"loss": weighted_sum(means, self.weights)} | (parts if len(parts) > 1 else {})


class Metrics(nn.Module):
    """Metric objects that see each image once and are summed over processes when computed."""

    def compute(self) -> tuple[Figures, Figures]:
        """Figures by name, and tables such as the confusion matrix, over all images of all processes."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What summary.json says of how the figures were measured."""
        return {}

    def reset(self) -> None:
        """Forgets all images."""
        for metric in self.children():
            metric.reset()  # type: ignore[operator]
