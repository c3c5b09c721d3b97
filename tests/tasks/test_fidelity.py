import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from visiontasks.contracts import UsageError
from visiontasks.tasks import fidelity
from visiontasks.tasks.fidelity import (
    effective_number,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest,
    neighbourhoods,
    radii,
)


def rows(count: int, dims: int, *, seed: int, constant: int = 0, shift: float = 0.0) -> Tensor:
    """Features that depend on each other and are never negative, as those behind a ReLU; some always 0."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dims, dims, generator=torch.Generator().manual_seed(99))
    values = (torch.randn(count, dims, generator=generator) @ mixing + shift).relu()
    values[:, :constant] = 0
    return values


def moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return features.double().numpy().mean(axis=0), np.cov(features.double().numpy(), rowvar=False)


def test_frechet_distance_is_that_of_the_matrix_root_of_scipy() -> None:
    real, generated = rows(300, 24, seed=0), rows(200, 24, seed=1, shift=0.5)
    (mean, covariance), (other_mean, other) = moments(real), moments(generated)
    root = np.real(scipy.linalg.sqrtm(covariance @ other))
    expected = ((mean - other_mean) ** 2).sum() + np.trace(covariance + other - 2 * root)
    assert frechet_distance(real, generated).item() == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(generated, real).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("real", "generated", "constant"), [(20, 90, 0), (90, 20, 0), (20, 30, 0), (90, 80, 5)])
def test_frechet_distance_of_singular_covariances_is_that_of_singular_values(
    real: int, generated: int, constant: int
) -> None:
    first, second = rows(real, 40, seed=0, constant=constant), rows(generated, 40, seed=1, constant=constant, shift=1)
    centred = [(part - part.mean(dim=0)).double().numpy() / (len(part) - 1) ** 0.5 for part in (first, second)]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    means = ((moments(first)[0] - moments(second)[0]) ** 2).sum()
    expected = means + sum((part**2).sum() for part in centred) - 2 * shared
    assert frechet_distance(first, second).item() == pytest.approx(expected, rel=1e-6)


def test_a_set_is_at_no_distance_from_itself() -> None:
    for features in (rows(50, 8, seed=0), rows(6, 8, seed=0), torch.zeros(5, 3)):
        assert abs(frechet_distance(features, features).item()) < 1e-6


def cubic(first: np.ndarray, second: np.ndarray) -> float:
    return float((first @ second / len(first) + 1) ** 3)


def test_kernel_distance_is_that_of_pairs_one_by_one() -> None:
    real, generated = rows(12, 5, seed=0), rows(12, 5, seed=1, shift=0.5)
    first, second = real.double().numpy(), generated.double().numpy()
    pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
    expected = np.mean([cubic(first[i], first[j]) + cubic(second[i], second[j]) for i, j in pairs])
    expected -= 2 * np.mean([cubic(one, other) for one in first for other in second])
    mean, deviation = kernel_distance(real, generated)
    assert (mean.item(), deviation.item()) == (pytest.approx(expected, rel=1e-9), 0)


def test_kernel_distance_of_subsets_is_drawn_by_the_seed_around_that_of_all() -> None:
    real, generated = rows(60, 5, seed=0), rows(70, 5, seed=1, shift=0.5)
    mean, deviation = kernel_distance(real, generated, subsets=300, subset_size=30)
    assert torch.equal(kernel_distance(real, generated, subsets=300, subset_size=30)[0], mean)
    assert deviation > 0
    whole = kernel_distance(real, generated[:60], subset_size=60)[0]
    assert abs(mean - whole) < deviation


def test_inception_score_is_the_divergence_by_splits() -> None:
    logits = 3 * rows(40, 6, seed=0)
    probabilities = np.exp(logits.double().numpy())
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    scores = []
    for first in range(4):
        part = probabilities[first::4]
        scores.append(np.exp((part * np.log(part / part.mean(axis=0))).sum(axis=1).mean()))
    assert inception_score(logits, splits=4).item() == pytest.approx(np.mean(scores), rel=1e-9)


def test_inception_score_goes_from_1_to_the_classes_also_where_they_come_in_order() -> None:
    sure = torch.eye(5).repeat_interleave(20, dim=0) * 1000
    assert inception_score(sure).item() == pytest.approx(5)
    assert inception_score(torch.zeros(30, 5)).item() == pytest.approx(1)
    assert inception_score(sure[:20]).item() == pytest.approx(1)


def by_hand(real: np.ndarray, generated: np.ndarray, k: int) -> dict[str, float]:
    """Precision, recall, density and coverage, image by image."""
    far = [[np.sort([np.linalg.norm(one - other) for other in part])[k] for one in part] for part in (real, generated)]
    inside = np.array([[np.linalg.norm(r - g) <= far[0][i] for g in generated] for i, r in enumerate(real)])
    back = np.array([[np.linalg.norm(r - g) <= far[1][j] for j, g in enumerate(generated)] for r in real])
    return {
        "precision": inside.any(axis=0).mean(),
        "recall": back.any(axis=1).mean(),
        "density": inside.sum() / (k * len(generated)),
        "coverage": inside.any(axis=1).mean(),
    }


@pytest.mark.parametrize("block", [1, 64, 2**24])
def test_neighbourhoods_are_those_worked_out_image_by_image(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    real, generated = (torch.randn(count, 3, generator=generator) for count in (31, 23))
    generated = generated / 2 + 0.7
    expected = by_hand(real.double().numpy(), generated.double().numpy(), 4)
    found = {name: value.item() for name, value in neighbourhoods(real, generated, neighbours=4).items()}
    assert found == pytest.approx(expected)
    assert 0 < found["recall"] < 1
    assert 0 < found["coverage"] < 1


def test_few_images_have_their_farthest_neighbour_as_the_last() -> None:
    points = torch.tensor([[0.0], [1.0], [3.0]])
    assert radii(points, neighbours=9).tolist() == pytest.approx([3, 2, 3])
    assert {name: value.item() for name, value in neighbourhoods(points, points).items()} == {
        "precision": 1,
        "recall": 1,
        "density": 1.5,
        "coverage": 1,
    }


def test_one_picture_again_and_again_is_precise_and_recalls_nothing() -> None:
    real = rows(50, 4, seed=0)
    found = neighbourhoods(real, real[:1].expand(50, -1))
    assert (found["precision"], found["recall"]) == (1, 1 / 50)
    assert found["coverage"] < 0.3


def test_nearest_rows_come_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fidelity, "BLOCK", 40)
    queries, bank = rows(9, 4, seed=0).numpy(), rows(20, 4, seed=1).numpy()
    away = np.linalg.norm(queries[:, None] - bank[None], axis=2)
    distances, found = nearest(torch.from_numpy(queries), torch.from_numpy(bank), count=3)
    assert found.tolist() == np.argsort(away, axis=1)[:, :3].tolist()
    np.testing.assert_allclose(distances.numpy(), np.sort(away, axis=1)[:, :3], atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 6), (6, 40)])
def test_effective_number_is_the_entropy_of_the_similarities(shape: tuple[int, int]) -> None:
    features = rows(*shape, seed=0)
    directions = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    shares = np.linalg.eigvalsh(directions @ directions.T / len(directions))
    shares = shares[shares > 1e-12]
    assert effective_number(features).item() == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-6)


def test_effective_number_counts_directions() -> None:
    assert effective_number(torch.eye(4).repeat(5, 1)).item() == pytest.approx(4)
    assert effective_number(torch.ones(9, 4)).item() == pytest.approx(1)


def test_one_image_is_refused() -> None:
    for measure in (frechet_distance, kernel_distance, neighbourhoods):
        with pytest.raises(UsageError, match="1 image has no distribution"):
            measure(torch.zeros(1, 3), torch.zeros(1, 3))
