"""Surprises against numpy, scipy and torch.distributions."""

import math

import numpy as np
import torch
from numpy.testing import assert_allclose
from scipy.special import expit, log_softmax
from torch.distributions import Normal, kl_divergence

from visiontasks.losses.likelihood import bits_per_dim, categorical, discretised_logistic, gaussian_divergence


def test_the_shares_of_all_values_of_a_rounded_logistic_sum_to_one() -> None:
    random = np.random.default_rng(0)
    means, log_scales = random.uniform(-20, 275, (7, 1)), random.uniform(-1, 4, (7, 1))
    values = np.arange(256.0)[None]
    upper = np.where(values == 255, 1.0, expit((values + 0.5 - means) / np.exp(log_scales)))
    lower = np.where(values == 0, 0.0, expit((values - 0.5 - means) / np.exp(log_scales)))
    pixels = torch.from_numpy(values).expand(7, 256)
    surprise = discretised_logistic(pixels, torch.from_numpy(means), torch.from_numpy(log_scales))
    assert_allclose(torch.exp(-surprise).sum(dim=1), np.ones(7), rtol=1e-9)
    likely = (upper - lower) > 1e-9  # where a difference of float64 still says something
    assert_allclose(surprise.numpy()[likely], -np.log((upper - lower)[likely]), rtol=1e-6)


def test_a_rounded_logistic_is_finite_far_from_its_mean_and_learns_there() -> None:
    pixels = torch.tensor([0.0, 255.0, 100.0, 100.0])
    means = torch.tensor([400.0, -300.0, -900.0, 100.0], requires_grad=True)
    log_scales = torch.tensor([-3.0, 0.0, -3.0, -7.0], requires_grad=True)
    discretised_logistic(pixels, means, log_scales).sum().backward()
    assert means.grad is not None
    assert log_scales.grad is not None
    assert means.grad.isfinite().all()
    assert log_scales.grad.isfinite().all()
    assert (means.grad.sign() == torch.tensor([1.0, -1.0, -1.0, 0.0])).all()


def test_the_divergence_is_that_of_torch() -> None:
    mean, log_variance = torch.randn(5, 7), torch.randn(5, 7)
    expected = kl_divergence(Normal(mean, torch.exp(log_variance / 2)), Normal(0.0, 1.0)).sum(dim=1)
    assert_allclose(gaussian_divergence(mean, log_variance), expected, rtol=1e-5)


def test_the_surprise_of_values_is_their_softmaxs() -> None:
    logits, values = torch.randn(2, 3, 11, 4, 5), torch.randint(0, 11, (2, 3, 4, 5))
    expected = -np.take_along_axis(log_softmax(logits.numpy(), axis=2), values.numpy()[:, :, None], axis=2)[:, :, 0]
    assert_allclose(categorical(logits, values), expected, rtol=1e-5)


def test_half_precision_is_left_before_anything_is_computed() -> None:
    logits, values = torch.randn(2, 3, 11, 4, 5).bfloat16(), torch.randint(0, 11, (2, 3, 4, 5))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(categorical(logits, values), categorical(logits.float(), values))
        means = torch.rand(2, 3, 4, 5).bfloat16() * 255
        pixels = torch.randint(0, 256, (2, 3, 4, 5))
        found = discretised_logistic(pixels, means, torch.zeros(3, 1, 1))
        assert torch.equal(found, discretised_logistic(pixels, means.float(), torch.zeros(3, 1, 1)))
        code = torch.randn(2, 6).bfloat16()
        assert torch.equal(gaussian_divergence(code, code), gaussian_divergence(code.float(), code.float()))


def test_uniform_pixels_of_eight_bits_cost_eight_bits_each() -> None:
    assert math.isclose(bits_per_dim(torch.tensor(12 * math.log(256.0)), 12).item(), 8.0, rel_tol=1e-6)
