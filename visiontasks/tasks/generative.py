"""What makes pictures shares: noise, samples beside real images, classes that can be asked for."""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from visiontasks.contracts import Backbone, Batch, UsageError
from visiontasks.heads.generation.density import MakeDensity
from visiontasks.heads.generation.gan import MakeGAN
from visiontasks.layers.draws import draws, image_keys
from visiontasks.tasks.base import Prediction, Task
from visiontasks.tasks.generation_metrics import SampleQuality

EVALUATION = -1  # the epoch to which the draws of an evaluation belong
FIXED = -2  # and those of `latents`


class Generative(Task):
    """Makes pictures like the data's out of noise, each of a class where its head is told one.

    Its head has `latent_dim` and `conditional`; a subclass has `metrics`, and implements `paint`. What is drawn for an
    image is a function of (seed, epoch, index).
    """

    needs: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset({"label"})
    sees_all: ClassVar[bool] = True
    otherwise: ClassVar[str] = "head=dcgan (which is told no class)"
    shards: ClassVar[bool] = False  # parts of heads are used outside a forward
    metrics: SampleQuality
    left_out: int = 0  # steps that were not finite, of a task that steps itself

    def __init__(
        self,
        *,
        backbone: Backbone,
        classes: tuple[str, ...],
        head: MakeGAN | MakeDensity,
        image_size: int | Iterable[int],
        seed: int,
        **shared: Any,
    ) -> None:
        super().__init__(backbone=backbone, classes=classes, **shared)
        self.image_size = _sides(image_size)
        self.channels = min(backbone.in_channels, 3)
        self.head: Any = head(
            levels=backbone.levels, num_classes=len(classes), image_size=self.image_size, channels=self.channels
        )
        self.seed = seed

    @property
    def conditional(self) -> bool:
        """Whether samples of a class can be asked for."""
        return bool(self.head.conditional)

    @classmethod
    def required(cls, head: type) -> frozenset[str]:
        return frozenset({"label"}) if getattr(head, "conditional", False) else cls.needs

    def latents(self, count: int, *, seed: int = 0) -> Tensor:
        """Noise for so many pictures, a function of the seed alone, (count, latent_dim)."""
        keys = image_keys(torch.arange(count, device=self.device), seed=seed, epoch=FIXED)
        return normal(draws(keys, self.head.latent_dim))

    @torch.no_grad()
    def sample(self, latents: Tensor, labels: Tensor | None = None, *, truncation: float = 1.0) -> Tensor:
        """Pictures of noise, uint8 (B, 3, H, W) RGB.

        truncation below 1 draws the noise closer to its mean: less variety, more typical pictures. Shapes: latents (B,
        latent_dim); labels (B,), needed where the task is conditional. Raises UsageError where they are missing.
        """
        if self.conditional and labels is None:
            raise UsageError("This generator makes pictures of a class: give labels, one a picture.")
        pictures = self.paint(latents * truncation, labels if self.conditional else None)
        return as_bytes(pictures)

    def paint(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """Pictures of noise (B, latent_dim) and classes (B,), (B, C, H, W) from 0 to 255."""
        raise NotImplementedError

    def reconstruct(self, images: Tensor) -> Tensor | None:  # noqa: ARG002
        """What comes back of images' codes, uint8 (B, 3, H, W) both; None where images have no codes."""
        return None

    def compare(self, batch: Batch, labels: Tensor | None) -> None:
        """Shows the metrics those of a batch's images that they want, and as many pictures of the same classes."""
        rows = self.metrics.wanted(batch["index"])
        if len(rows):
            index = batch["index"][rows]
            keys = image_keys(index, seed=self.seed, epoch=EVALUATION)
            fake = self.sample(normal(draws(keys, self.head.latent_dim)), None if labels is None else labels[rows])
            self.metrics.update(batch["image"][rows], fake, index)

    def labels_of(self, batch: Batch) -> Tensor | None:
        """The classes of a batch's images, where the head is told them."""
        if not self.conditional:
            return None
        if "label" not in batch:
            raise UsageError("These images have no class, and this head is told one: give data with labels.")
        labels: Tensor = batch["label"]
        if labels.ndim > 1:
            raise UsageError(
                "A conditional generator takes one class an image and these have several: type head=sngan."
            )
        return labels

    def on_fit_start(self) -> None:
        """Says what differs from what was asked, and how samples are compared."""
        self.metrics.prepare()
        if self.trainer.is_global_zero:
            lines = [*self.notes(), *self.metrics.notes()]
            print("".join(f"{line}\n" for line in lines), end="", flush=True)

    def notes(self) -> list[str]:
        """Lines for the person who starts the run."""
        return []

    def truths(self, batch: Batch) -> list[Prediction]:
        return [{} for _ in batch["index"]]


def normal(numbers: Tensor) -> Tensor:
    """Normal numbers for even ones, whole multiples of 2 ** -24 from 0 to below 1."""
    sides = torch.erfinv(2 * numbers.double() + (2.0**-24 - 1))  # of 0, between -1 and 1
    return sides.mul_(math.sqrt(2)).float()


def rgb(pictures: Tensor) -> Tensor:
    """Pictures (B, C, H, W) with their one grey channel, if they have no more, as three."""
    return pictures.expand(-1, 3, -1, -1)


def as_bytes(pictures: Tensor) -> Tensor:
    """Pictures (B, C, H, W) from 0 to 255 as uint8 (B, 3, H, W)."""
    return rgb(pictures).clamp(0, 255).round().byte()


def _sides(size: int | Iterable[int]) -> tuple[int, int]:
    both = [size, size] if isinstance(size, int) else list(size)
    return both[0], both[1]
