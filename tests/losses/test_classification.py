import numpy as np
import pytest
import torch

from visiontasks.losses import binary_cross_entropy, cross_entropy


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_agrees_with_numpy(smoothing: float, weighted: bool) -> None:
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(7, 4)) * 3, rng.integers(0, 4, 7)
    weight = rng.uniform(0.5, 2, 4) if weighted else np.ones(4)
    scores = -log_softmax(logits) * weight
    smooth = smoothing * scores.mean(axis=1)
    expected = ((1 - smoothing) * scores[np.arange(7), target] + smooth).sum() / weight[target].sum()
    total, count = cross_entropy(
        torch.tensor(logits),
        torch.tensor(target),
        weight=torch.tensor(weight, dtype=torch.float32) if weighted else None,
        label_smoothing=smoothing,
    )
    assert (total / count).item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_of_mixed_targets_counts_images() -> None:
    logits, target = torch.randn(5, 3), torch.rand(5, 3).softmax(dim=1)
    total, count = cross_entropy(logits, target)
    assert count.item() == 5
    assert total.item() == pytest.approx(-(target * logits.log_softmax(dim=1)).sum().item(), rel=1e-5)


def test_cross_entropy_is_computed_in_float32() -> None:
    logits = torch.randn(4, 3).bfloat16()
    total, _ = cross_entropy(logits, torch.tensor([0, 1, 2, 0]))
    assert total.dtype == torch.float32


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_binary_cross_entropy_agrees_with_numpy(smoothing: float) -> None:
    rng = np.random.default_rng(1)
    logits, target, weight = rng.normal(size=(6, 3)), rng.integers(0, 2, (6, 3)), rng.uniform(0.5, 2, 3)
    soft = target * (1 - smoothing) + 0.5 * smoothing
    p = 1 / (1 + np.exp(-logits))
    expected = -(weight * (soft * np.log(p) + (1 - soft) * np.log(1 - p))).mean()
    total, count = binary_cross_entropy(
        torch.tensor(logits),
        torch.tensor(target),
        weight=torch.tensor(weight, dtype=torch.float32),
        label_smoothing=smoothing,
    )
    assert (total / count).item() == pytest.approx(expected, rel=1e-5)
