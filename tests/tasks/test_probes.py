import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from visiontasks.contracts import UsageError
from visiontasks.tasks import probes
from visiontasks.tasks.probes import fit_linear, nearest_classes

K = 4


def clusters(rows: int, *, scales: float = 2.0, dim: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features that overlap between classes and differ in scale by powers of ten, and their labels."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(K, dim, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(K, (rows,), generator=generator)
    noise = 2 * torch.randn(rows, dim, generator=generator)
    return (centres[labels] + noise) * torch.logspace(-scales, scales, dim) + scales, labels


def elected(queries: np.ndarray, bank: np.ndarray, labels: np.ndarray, k: int, temperature: float) -> list[int]:
    """The paper's votes, one query at a time."""
    classes = []
    for query in queries:
        similar = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(K)
        for row in np.argsort(-similar)[:k]:
            votes[labels[row]] += np.exp(similar[row] / temperature)
        classes.append(int(votes.argmax()))
    return classes


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("block", [probes.BLOCK, 100])
def test_neighbours_vote_as_in_the_paper(monkeypatch: pytest.MonkeyPatch, temperature: float, block: int) -> None:
    monkeypatch.setattr(probes, "BLOCK", block)
    (queries, _), (bank, labels) = clusters(31, scales=0, seed=1), clusters(40, scales=0)
    found = nearest_classes(queries, bank, labels, classes=K, neighbours=(20, 1, 200), temperature=temperature)
    plain = queries.double().numpy(), bank.double().numpy(), labels.numpy()
    assert found.tolist() == [elected(*plain, k, temperature) for k in (20, 1, 40)]
    assert (found[0] != found[1]).any()
    assert temperature < 1 or (found[0] != found[2]).any()


def test_a_near_neighbour_outvotes_several_far_ones() -> None:
    bank = torch.tensor([[1.0, 0.05], [0.3, 1.0], [0.3, 1.1]])
    found = nearest_classes(torch.tensor([[1.0, 0.0]]), bank, torch.tensor([0, 1, 1]), classes=2, neighbours=[3])
    assert found.tolist() == [[0]]


@pytest.mark.parametrize("wrong", [{"neighbours": (20, 0)}, {"neighbours": (5,), "temperature": 0.0}])
def test_no_neighbours_and_no_temperature_are_refused(wrong: dict[str, object]) -> None:
    features, labels = clusters(8)
    with pytest.raises(UsageError, match="must be above 0: type"):
        nearest_classes(features, features, labels, classes=K, **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("decay", [1e-1, 1e-3])
def test_the_logistic_regression_is_scikit_learns(decay: float) -> None:
    (features, labels), (others, truth) = clusters(300), clusters(400, seed=1)
    mean, std = features.double().numpy().mean(axis=0), features.double().numpy().std(axis=0)
    oracle = LogisticRegression(C=1 / (decay * len(features)), tol=1e-8, max_iter=5000)
    oracle.fit((features.double().numpy() - mean) / std, labels.numpy())
    scaled = (others.double().numpy() - mean) / std
    logits = fit_linear(features, labels, classes=K, decay=decay)(others)
    np.testing.assert_allclose(logits.softmax(dim=1).numpy(), oracle.predict_proba(scaled), atol=2e-3)
    accuracy = (logits.argmax(dim=1) == truth).double().mean().item()
    assert accuracy == pytest.approx(oracle.score(scaled, truth.numpy()), abs=0.005)
    assert accuracy > 1.5 / K


def test_a_class_without_rows_and_a_constant_feature_do_no_harm() -> None:
    features, labels = clusters(60)
    features[:, 3] = 7.0
    logits = fit_linear(features, labels, classes=K + 1)(features)
    assert logits.isfinite().all()
    assert (logits.argmax(dim=1) == labels).double().mean() > 0.6


def test_fitting_in_inference_mode_is_the_same_and_draws_nothing() -> None:
    features, labels = clusters(50)
    expected = fit_linear(features, labels, classes=K)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        found = fit_linear(features + 0, labels + 0, classes=K)
    assert torch.equal(found.weight, expected.weight)
    assert torch.equal(found.bias, expected.bias)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]  # noqa: NPY002
