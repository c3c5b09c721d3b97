"""Adversarial objectives as (sum, count): what a critic and a generator learn from scores, and gradient penalties."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Term = tuple[Tensor, Tensor]  # sum and count
Scores = Callable[[Tensor], Tensor]  # images (B, C, H, W) to scores (B,)


class Objective(NamedTuple):
    """One game: the critic's loss of real and generated scores (B,), and the generator's of generated ones."""

    critic: Callable[[Tensor, Tensor], Term]
    generator: Callable[[Tensor], Term]


def non_saturating_critic(real: Tensor, fake: Tensor) -> Term:
    """Cross-entropy of telling real from generated (Goodfellow et al. 2014, arXiv 1406.2661). Shapes: both (B,)."""
    return _summed(F.softplus(-real.float()) + F.softplus(fake.float()))


def non_saturating_generator(fake: Tensor) -> Term:
    """Cross-entropy of being taken for real (Goodfellow et al. 2014, arXiv 1406.2661, section 3). Shapes: (B,)."""
    return _summed(F.softplus(-fake.float()))


def least_squares_critic(real: Tensor, fake: Tensor) -> Term:
    """Half the squared distance from 1 of real and from 0 of generated (Mao et al. 2016, arXiv 1611.04076)."""
    return _summed(((real.float() - 1).square() + fake.float().square()) / 2)


def least_squares_generator(fake: Tensor) -> Term:
    """Half the squared distance of generated from 1 (Mao et al. 2016, arXiv 1611.04076)."""
    return _summed((fake.float() - 1).square() / 2)


def wasserstein_critic(real: Tensor, fake: Tensor) -> Term:
    """How much higher generated ones score than real ones (Arjovsky et al. 2017, arXiv 1701.07875)."""
    return _summed(fake.float() - real.float())


def wasserstein_generator(fake: Tensor) -> Term:
    """How low generated ones score (Arjovsky et al. 2017, arXiv 1701.07875)."""
    return _summed(-fake.float())


def hinge_critic(real: Tensor, fake: Tensor) -> Term:
    """What real lacks to 1 and generated to -1 (Lim and Ye 2017, arXiv 1705.02894; Miyato et al. 2018, 1802.05957)."""
    return _summed(F.relu(1 - real.float()) + F.relu(1 + fake.float()))


OBJECTIVES = {
    "non_saturating": Objective(non_saturating_critic, non_saturating_generator),
    "least_squares": Objective(least_squares_critic, least_squares_generator),
    "wasserstein": Objective(wasserstein_critic, wasserstein_generator),
    "hinge": Objective(hinge_critic, wasserstein_generator),
}


def gradient_penalty(scores: Scores, real: Tensor, fake: Tensor, mix: Tensor) -> Term:
    """How far the gradient's norm is from 1, squared, at points between real and generated images.

    Gulrajani et al. 2017, arXiv 1704.00028, without the weight. The scores of an image must depend on no other image.
    Shapes: real, fake (B, C, H, W); mix (B,) is the share of the real one.
    """
    share = mix.view(-1, 1, 1, 1)
    norms = _image_gradients(scores, fake.detach().lerp(real.detach(), share)).norm(dim=1)
    return _summed((norms - 1).square())


def r1(scores: Scores, real: Tensor) -> Term:
    """Half the squared norm of the gradient at real images (Mescheder et al. 2018, arXiv 1801.04406), without gamma.

    The scores of an image must depend on no other image. Shapes: real (B, C, H, W).
    """
    return _summed(_image_gradients(scores, real.detach()).square().sum(dim=1) / 2)


def _image_gradients(scores: Scores, images: Tensor) -> Tensor:
    """The gradient of each image's score with regard to the image, (B, C * H * W), itself differentiable."""
    images = images.float().requires_grad_()
    with torch.enable_grad():
        (gradients,) = torch.autograd.grad(scores(images).float().sum(), images, create_graph=True)
    return gradients.flatten(1)


def _summed(losses: Tensor) -> Term:
    return losses.sum(), losses.new_full((), len(losses))
