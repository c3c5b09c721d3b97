"""A generator, the game that it plays, and the one output that makes a backbone its critic."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn

from visiontasks.contracts import Level
from visiontasks.errors import UsageError
from visiontasks.heads.generation.generators import MakeGenerator
from visiontasks.layers.diffaugment import check_policy
from visiontasks.losses.adversarial import OBJECTIVES


class GAN(nn.Module):
    """A generator and a critic that play for an objective, any of losses.adversarial.OBJECTIVES.

    Args:
        generator: makes the generator.
        objective: non_saturating, least_squares, wasserstein or hinge.
        critic_steps: steps of the critic for one of the generator, each on a batch of its own.
        spectral_norm: holds the largest singular value of each of the critic's weights, the backbone's too, at 1.
        gradient_penalty: weight of Gulrajani's penalty between real and generated images; 0 is off.
        r1: Mescheder's gamma, the weight of the gradients at real images; 0 is off.
        diffaugment: what alters the images that the critic sees: colour, translation, cutout.
        batch_norms: whether the critic's batch norms see the batch; else they keep their statistics, those of noise
            where they have no others, and each image is judged by itself.

    Shapes: as a module it is the critic's end, a pyramid whose last map is (B, C, H, W), and classes (B,) of a
    conditional one, to scores (B,). Raises UsageError where an option is not known or two contradict each other.
    """

    serves: ClassVar[str] = "generation"
    conditional: ClassVar[bool] = False

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        image_size: tuple[int, int],
        channels: int = 3,
        generator: MakeGenerator,
        objective: str = "non_saturating",
        critic_steps: int = 1,
        spectral_norm: bool = False,
        gradient_penalty: float = 0.0,
        r1: float = 0.0,
        diffaugment: Sequence[str] = (),
        batch_norms: bool = True,
    ) -> None:
        super().__init__()
        if objective not in OBJECTIVES:
            raise UsageError(f"head.objective={objective} is no objective: give {', '.join(OBJECTIVES)}.")
        if critic_steps < 1:
            raise UsageError(f"head.critic_steps={critic_steps} is no number of steps: give 1 or more.")
        told = num_classes if self.conditional else 0
        self.generator = generator(image_size=image_size, channels=channels, num_classes=told)
        self.critic = Critic(levels[-1].channels, told, summed=spectral_norm)
        self.objective = objective
        self.critic_steps = critic_steps
        self.spectral_norm = spectral_norm
        self.gradient_penalty = gradient_penalty
        self.r1 = r1
        self.diffaugment = check_policy(diffaugment)
        self.batch_norms = batch_norms

    @property
    def penalised(self) -> bool:
        """Whether gradients with regard to images are part of the critic's loss."""
        return self.gradient_penalty > 0 or self.r1 > 0

    @property
    def latent_dim(self) -> int:
        return self.generator.latent_dim

    def forward(self, features: list[Tensor], labels: Tensor | None = None) -> Tensor:
        return self.critic(features, labels)  # type: ignore[no-any-return]


class ConditionalGAN(GAN):
    """A GAN that is told the class: its critic by projection (Miyato and Koyama 2018, arXiv 1802.05637)."""

    conditional: ClassVar[bool] = True


class Critic(nn.Module):
    """One number an image: a linear layer on the coarsest map averaged over its places, and where classes are told the
    product with an embedding of the class.

    summed adds the places up, as Miyato and Koyama 2018 (arXiv 1802.05637) do: under spectral norms no weight could
    make up for what an average takes away, and real and generated images would score alike.
    """

    def __init__(self, channels: int, classes: int, *, summed: bool = False) -> None:
        super().__init__()
        self.summed = summed
        self.linear = nn.Linear(channels, 1)
        self.embedding = nn.Embedding(classes, channels) if classes else None
        if self.embedding is not None:
            nn.init.normal_(self.embedding.weight, std=channels**-0.5)

    def forward(self, features: list[Tensor], labels: Tensor | None = None) -> Tensor:
        coarsest = features[-1]
        pooled = coarsest.sum(dim=(2, 3)) if self.summed else coarsest.mean(dim=(2, 3))  # (B, C)
        scores: Tensor = self.linear(pooled)[:, 0]
        if self.embedding is None or labels is None:
            return scores  # (B,)
        fitting: Tensor = (self.embedding(labels) * pooled).sum(dim=1)
        return scores + fitting


class MakeGAN(Protocol):
    """Makes a GAN for a backbone's levels, the data's classes and the size of its images."""

    def __call__(
        self, *, levels: tuple[Level, ...], num_classes: int, image_size: tuple[int, int], channels: int
    ) -> GAN: ...
