"""The losses of pretexts against numpy."""

import numpy as np
import pytest
import torch

from visiontasks.losses.pretext import soft_cross_entropy, weighted_square

TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-12)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_soft_cross_entropy_is_that_of_the_spread_truth(dtype: torch.dtype, tolerance: float) -> None:
    random = np.random.default_rng(0)
    logits, weight = 3 * random.normal(size=(2, 7, 3, 4)), random.uniform(size=(2, 3, 4))
    truth = np.zeros_like(logits)
    places = np.argsort(random.uniform(size=logits.shape), axis=1)[:, :3]
    np.put_along_axis(truth, places, random.dirichlet(np.ones(3), size=(2, 3, 4)).transpose(0, 3, 1, 2), axis=1)
    surprise = np.log(np.exp(logits).sum(axis=1, keepdims=True)) - logits
    expected = ((truth * surprise).sum(axis=1) * weight).sum()
    shares = np.take_along_axis(truth, places, axis=1)
    given = [torch.from_numpy(each).to(dtype) for each in (logits, shares, weight)]
    total, count = soft_cross_entropy(given[0], torch.from_numpy(places), *given[1:])
    assert total.item() == pytest.approx(expected, rel=tolerance)
    assert count == 24


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_squares_are_weighted_and_counted(dtype: torch.dtype, tolerance: float) -> None:
    random = np.random.default_rng(0)
    values, target = random.normal(size=(2, 2, 3, 4, 5))
    weight = random.integers(0, 3, size=(2, 1, 4, 5)).astype(float)
    total, count = weighted_square(*[torch.from_numpy(each).to(dtype) for each in (values, target, weight)])
    assert total.item() == pytest.approx(((values - target) ** 2 * weight).sum(), rel=tolerance)
    assert count == 3 * weight.sum()


def test_half_precision_is_computed_in_full() -> None:
    torch.manual_seed(0)
    rough = torch.randn(2, 3, 4, 4).bfloat16()
    weight, target = torch.rand(2, 1, 4, 4), torch.randn(2, 3, 4, 4)
    places, shares = torch.randint(0, 3, (2, 2, 4, 4)), torch.full((2, 2, 4, 4), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        found = [weighted_square(rough, target, weight)[0], soft_cross_entropy(rough, places, shares, weight[:, 0])[0]]
    fine = rough.float()
    expected = [weighted_square(fine, target, weight)[0], soft_cross_entropy(fine, places, shares, weight[:, 0])[0]]
    assert torch.equal(torch.stack(found), torch.stack(expected))
