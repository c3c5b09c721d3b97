"""Adversarial objectives against their formulas, and gradient penalties against critics whose gradients are known."""

import math

import pytest
import torch
from torch import Tensor

from visiontasks.losses.adversarial import OBJECTIVES, gradient_penalty, r1

REAL, FAKE = [2.0, -0.5, 0.3], [-1.5, 0.25, 3.0]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


CRITIC = {
    "non_saturating": lambda r, f: softplus(-r) + softplus(f),
    "least_squares": lambda r, f: ((r - 1) ** 2 + f**2) / 2,
    "wasserstein": lambda r, f: f - r,
    "hinge": lambda r, f: max(0, 1 - r) + max(0, 1 + f),
}
GENERATOR = {
    "non_saturating": lambda f: softplus(-f),
    "least_squares": lambda f: (f - 1) ** 2 / 2,
    "wasserstein": lambda f: -f,
    "hinge": lambda f: -f,
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_are_their_formulas(name: str) -> None:
    objective = OBJECTIVES[name]
    total, count = objective.critic(torch.tensor(REAL), torch.tensor(FAKE))
    assert total.item() == pytest.approx(sum(map(CRITIC[name], REAL, FAKE)), rel=1e-6)
    assert count.item() == 3
    total, count = objective.generator(torch.tensor(FAKE))
    assert total.item() == pytest.approx(sum(map(GENERATOR[name], FAKE)), rel=1e-6)
    assert count.item() == 3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_large_scores_stay_finite_in_half_precision(name: str) -> None:
    scores = torch.tensor([3e4, -3e4], dtype=torch.float16)
    total, _ = OBJECTIVES[name].critic(-scores, scores)
    assert total.isfinite()
    assert total.dtype == torch.float32


def weighted(weight: Tensor) -> object:
    """A critic whose gradient is the same everywhere."""
    return lambda images: (images * weight).flatten(1).sum(dim=1)


def test_the_penalty_of_a_linear_critic_is_known_with_its_gradient() -> None:
    weight = torch.randn(3, 4, 4).requires_grad_()
    real, fake = torch.randn(2, 5, 3, 4, 4).unbind(0)
    total, count = gradient_penalty(weighted(weight), real, fake, torch.rand(5))  # type: ignore[arg-type]
    norm = weight.detach().norm()
    assert torch.allclose(total / count, (norm - 1).square())
    (total / count).backward()
    assert torch.allclose(weight.grad, 2 * (norm - 1) * weight.detach() / norm, atol=1e-5)  # type: ignore[arg-type]


def test_the_penalty_is_taken_between_real_and_generated() -> None:
    real, fake = torch.randn(2, 5, 1, 2, 2).unbind(0)
    mix = torch.tensor([0.0, 1.0, 0.5, 0.25, 0.9])
    total, _ = gradient_penalty(lambda images: images.square().flatten(1).sum(dim=1) / 2, real, fake, mix)
    share = mix.view(-1, 1, 1, 1)
    norms = (share * real + (1 - share) * fake).flatten(1).norm(dim=1)  # the gradient of half the square is the point
    assert torch.allclose(total, (norms - 1).square().sum())


def test_r1_is_half_the_squared_gradient_at_real_images() -> None:
    weight = torch.randn(3, 4, 4).requires_grad_()
    total, count = r1(weighted(weight), torch.randn(5, 3, 4, 4))  # type: ignore[arg-type]
    assert torch.allclose(total / count, weight.square().sum() / 2)
    (total / count).backward()
    assert torch.allclose(weight.grad, weight)  # type: ignore[arg-type]
