"""A variational autoencoder: the backbone is its encoder, a generator its decoder."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.contracts import Backbone, Level, UsageError
from visiontasks.heads.generation.density import Density, Normalised
from visiontasks.heads.generation.generators import MakeGenerator
from visiontasks.losses.likelihood import discretised_logistic, gaussian_divergence


class VAE(Density):
    """Encodes an image as a normal distribution of latents, and decodes latents to a distribution of images.

    Kingma and Welling 2013, arXiv 1312.6114. A pixel is distributed as a logistic distribution rounded to whole numbers
    (losses.likelihood.discretised_logistic), whose mean the decoder gives and whose scale is learnt, one a channel
    (Rybkin et al. 2020, arXiv 2006.13202): a proper density, so that bits per dimension compare. Pictures are means.

    Args:
        generator: makes the decoder.
        beta: weight of the divergence in what is learnt (beta-VAE, Higgins et al. 2017); figures weigh it 1.
        grid: places along a side to which the coarsest map is pooled before it is flattened.

    Raises UsageError where beta is negative or the grid has no place.
    """

    word: ClassVar[str] = "elbo"
    parts: ClassVar[tuple[str, ...]] = ("reconstruction", "divergence")

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,  # noqa: ARG002
        image_size: tuple[int, int],
        channels: int,
        generator: MakeGenerator,
        beta: float = 1.0,
        grid: int = 4,
    ) -> None:
        super().__init__()
        if not (beta >= 0 and math.isfinite(beta)):
            raise UsageError(f"head.beta={beta} is no weight of the divergence: give 0 or more, such as 1.")
        if grid < 1:
            raise UsageError(f"head.grid={grid} leaves no place of the coarsest map: give 1 or more.")
        self.generator = generator(image_size=image_size, channels=channels, num_classes=0)
        self.latent_dim = self.drawn = self.generator.latent_dim
        self.weights = (1.0, beta)
        height, width = (min(grid, -(-side // levels[-1].stride)) for side in image_size)
        self.grid = (height, width)
        self.code = nn.Linear(levels[-1].channels * height * width, 2 * self.latent_dim)
        self.log_scale = nn.Parameter(torch.full((channels,), math.log(16.0)))  # in steps of a pixel's value

    def encode(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The latents' mean and log variance, (B, latent_dim) both."""
        flat = F.adaptive_avg_pool2d(features[-1], self.grid).flatten(1)
        mean, log_variance = self.code(flat).chunk(2, dim=1)
        return mean, log_variance

    def decode(self, latents: Tensor) -> Tensor:
        """The means of the pixels' distributions, (B, C, H, W)."""
        made: Tensor = self.generator(latents)
        return (made.to(torch.promote_types(made.dtype, torch.float32)) + 1) * 127.5

    def surprise(self, features: list[Tensor], pixels: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:  # noqa: ARG002
        mean, log_variance = self.encode(features)
        latents = mean + torch.exp(log_variance / 2) * noise.to(mean)
        surprise = discretised_logistic(pixels, self.decode(latents), self.log_scale[:, None, None])  # (B, C, H, W)
        return torch.stack((surprise.flatten(1).sum(dim=1), gaussian_divergence(mean, log_variance)), dim=1)  # (B, 2)

    def pictures(
        self,
        latents: Tensor,
        labels: Tensor | None,  # noqa: ARG002
        *,
        backbone: Backbone,  # noqa: ARG002
        normalised: Normalised,  # noqa: ARG002
    ) -> Tensor:
        return self.decode(latents)

    def reconstructions(self, features: list[Tensor]) -> Tensor:
        return self.decode(self.encode(features)[0])

    def facts(self) -> dict[str, Any]:
        return {"likelihood": "lower bound (ELBO), discretised logistic of learnt scale", "beta": self.weights[1]}
