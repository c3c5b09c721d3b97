"""A backbone's features beside its training: seen in evaluation mode, gathered over processes in the images' order."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from visiontasks.contracts import Batch, UsageError
from visiontasks.layers.distributed import in_order
from visiontasks.tasks.inference import padded


@dataclass
class Rows:
    """What is known of images, in their order."""

    features: Tensor  # (N, D)
    labels: Tensor | None  # (N,)
    index: Tensor  # (N,) position in the data


class Features:
    """Sees images with a task's backbone, in the precision of the run."""

    def __init__(self, trainer: Trainer, module: Any) -> None:
        self.precision = trainer.precision_plugin
        self.module = module

    def pyramid(self, batch: Batch, *, multiple: int = 1) -> list[Tensor]:
        """The backbone's levels (B, C, h, w) for images whose edges are repeated up to a multiple of a stride.

        Raises UsageError where the images differ in size.
        """
        if not isinstance(batch["image"], Tensor):
            raise UsageError("Probes want images of one size, and these differ: type watch=none, or another augment=.")
        with self.precision.forward_context():
            levels: list[Tensor] = self.module.backbone(padded(self.module.images(batch), multiple))
        return levels

    def pooled(self, batch: Batch) -> Tensor:
        """The mean of the coarsest level over each image, (B, D) float32."""
        return self.pyramid(batch)[-1].float().mean(dim=(2, 3))

    def batches(self, loader: Iterable[Batch]) -> Iterator[Batch]:
        """The batches of a loader on the task's device."""
        for batch in loader:
            yield {key: moved(value, self.module.device) for key, value in batch.items()}

    def rows(self, loader: Iterable[Batch], *, labelled: bool) -> Rows:
        """The pooled features of all images of all processes' loaders."""
        parts = [
            (self.pooled(batch), batch["index"], *([batch["label"]] if labelled else []))
            for batch in self.batches(loader)
        ]
        features, index, *labels = in_order(parts, self.module.device)
        return Rows(features, labels[0] if labels else None, index)


def moved(value: Any, device: torch.device) -> Any:
    """Tensors, and lists of them, on a device."""
    if isinstance(value, list):
        return [moved(item, device) for item in value]
    return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value


def annotations(loader: Any) -> dict[str, Any]:
    """One sample of a loader's data, whichever can be read first, the same in every process."""
    data = loader.dataset
    samples = (data[position] for position in range(len(data)))
    return next((sample for sample in samples if isinstance(sample, dict)), {})


def say(trainer: Trainer, lines: Iterable[str]) -> None:
    """Prints lines, once for all processes."""
    if trainer.is_global_zero:
        for line in lines:
            print(f"probes     {line}", flush=True)
