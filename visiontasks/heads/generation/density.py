"""What a head that gives pictures a probability promises the task that trains it."""

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

from torch import Tensor, nn

from visiontasks.contracts import Backbone, Level

Normalised = Callable[[Tensor], Tensor]  # pixels (B, C, H, W) from 0 to 255 as the backbone wants them


class Density(nn.Module):
    """Says how surprising pictures are, in parts that sum to a bound or to the negative log-likelihood, and makes some.

    Pictures are (B, C, H, W) whole numbers from 0 to 255, surprises nats an image.
    """

    serves: ClassVar[str] = "generation"
    conditional: ClassVar[bool] = False
    causal: ClassVar[bool] = False  # it wants a backbone that sees of an image only what comes before a pixel
    word: ClassVar[str]  # for the negative sum of the parts
    parts: ClassVar[tuple[str, ...]]  # what `surprise` gives, by name

    latent_dim: int  # numbers that a picture is made of
    drawn: int  # of them, those that learning draws for an image
    weights: tuple[float, ...]  # of the parts in what is learnt

    def seen(self, pixels: Tensor) -> Tensor:
        """Pictures in the values that the density knows."""
        return pixels

    def surprise(self, features: list[Tensor], pixels: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:
        """The parts of the pictures' surprise, (B, parts), from the backbone's pyramid and normal noise (B, drawn)."""
        raise NotImplementedError

    def pictures(self, latents: Tensor, labels: Tensor | None, *, backbone: Backbone, normalised: Normalised) -> Tensor:
        """What is made of noise (B, latent_dim), (B, C, H, W) from 0 to 255."""
        raise NotImplementedError

    def reconstructions(self, features: list[Tensor]) -> Tensor | None:
        """What pictures become that go in and out, (B, C, H, W) from 0 to 255; None where nothing does."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """What summary.json says of how the likelihood was measured."""
        raise NotImplementedError


class MakeDensity(Protocol):
    """Makes a density for a backbone's levels, the data's classes and the size of its images."""

    def __call__(
        self, *, levels: tuple[Level, ...], num_classes: int, image_size: tuple[int, int], channels: int
    ) -> Density: ...
