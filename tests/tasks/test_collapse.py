import numpy as np
import pytest
import torch
from torch import Tensor

from visiontasks.tasks.collapse import alignment, collapse_gauges, effective_rank, feature_std, uniformity


def embeddings(rows: int = 9, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) + 0.5


def directions(rows: Tensor) -> np.ndarray:
    return (rows / rows.norm(dim=1, keepdim=True)).double().numpy()


def test_feature_std_follows_the_paper() -> None:
    expected = np.sqrt(5) * directions(embeddings()).std(axis=0).mean()
    assert feature_std(embeddings()).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("rows", "dim"), [(9, 5), (5, 9)])
def test_effective_rank_follows_the_paper(rows: int, dim: int) -> None:
    values = np.linalg.svd(embeddings(rows, dim).double().numpy(), compute_uv=False)
    shares = values / values.sum() + 1e-7
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(embeddings(rows, dim)).item() == pytest.approx(expected, rel=1e-6)


def test_alignment_and_uniformity_follow_the_paper() -> None:
    first, second = directions(embeddings()), directions(embeddings(seed=1))
    assert alignment(embeddings(), embeddings(seed=1)).item() == pytest.approx(
        ((first - second) ** 2).sum(axis=1).mean(), rel=1e-6
    )
    pairs = [np.exp(-2 * ((first[i] - first[j]) ** 2).sum()) for i in range(9) for j in range(i)]
    assert uniformity(embeddings()).item() == pytest.approx(np.log(np.mean(pairs)), rel=1e-6)


def test_an_even_spread_is_called_one() -> None:
    spread = torch.randn(4000, 64, generator=torch.Generator().manual_seed(0))
    gauges = collapse_gauges(spread, 3 * spread)
    assert gauges["feature_std"].item() == pytest.approx(1, abs=0.01)
    assert 60 < gauges["effective_rank"] <= 64.001
    assert gauges["alignment"].item() == pytest.approx(0, abs=1e-6)
    assert gauges["uniformity"].item() == pytest.approx(-4, abs=0.2)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_a_point_is_called_a_collapse(value: float) -> None:
    point = torch.full((6, 4), value)
    gauges = {name: gauge.item() for name, gauge in collapse_gauges(point, point).items()}
    assert gauges == pytest.approx({"feature_std": 0, "effective_rank": 1, "alignment": 0, "uniformity": 0}, abs=1e-4)
