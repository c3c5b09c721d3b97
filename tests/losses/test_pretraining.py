"""The losses of embeddings against numpy written from the papers, and against lightly where it has them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from lightly.loss import BarlowTwinsLoss, DINOLoss, NTXentLoss, SwaVLoss, VICRegLoss
from numpy.typing import NDArray
from torch import Tensor

from visiontasks.errors import UsageError
from visiontasks.layers.queue import Queue
from visiontasks.losses import contrastive
from visiontasks.losses.clustering import Prototypes, sinkhorn, swav
from visiontasks.losses.contrastive import info_nce, nt_xent, symmetric_info_nce
from visiontasks.losses.distillation import Centre, dino, negative_cosine
from visiontasks.losses.redundancy import barlow_twins, vicreg

Rows = NDArray[np.float64]
B, D = 6, 4
DTYPES = [(torch.float32, 1e-6), (torch.float64, 1e-10)]
NEGATIVES = Queue(D, 9)()
LOSSES: dict[str, Callable[[Tensor], Tensor]] = {  # of views (4, B, D)
    "nt_xent": lambda v: nt_xent(v[0], v[1]),
    "info_nce": lambda v: info_nce(v[0], v[1], NEGATIVES.to(torch.promote_types(v.dtype, torch.float32))),
    "symmetric_info_nce": lambda v: symmetric_info_nce(*v),
    "negative_cosine": lambda v: negative_cosine(v[0], v[1]),
    "barlow_twins": lambda v: barlow_twins(v[0], v[1]),
    "vicreg": lambda v: vicreg(v[0], v[1]),
    "swav": swav,
    "dino": lambda v: dino(v, v[:2].flip(0), v.new_ones(D)),
}
NEED_TWO = {"barlow_twins", "vicreg"}


def views(count: int = 4, rows: int = B, dim: int = D, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, rows, dim, generator=random, dtype=torch.float64) + 0.5


def unit(rows: Rows) -> Rows:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def log_softmax(logits: Rows) -> Rows:
    return np.log(np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True))


def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(loss(x), x)
    return found


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_follows_the_paper(dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    first, second = views(2)
    rows = unit(np.concatenate((first.numpy(), second.numpy())))
    costs = []
    for i in range(2 * B):
        similar = np.exp(rows @ rows[i] / temperature)
        costs.append(-np.log(similar[(i + B) % (2 * B)] / (similar.sum() - similar[i])))
    found = nt_xent(first.to(dtype), second.to(dtype), temperature=temperature)
    assert found.item() == pytest.approx(np.mean(costs), rel=tolerance)


@pytest.mark.parametrize("chunk", [1, 30, 2**20])
@pytest.mark.parametrize("temperature", [0.005, 0.1, 1.0])
def test_nt_xent_has_the_gradient_of_the_plain_form(
    chunk: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "CHUNK", chunk)
    pair = views(2).requires_grad_()
    (3 * nt_xent(*pair, temperature=temperature)).backward()
    other = pair.detach().clone().requires_grad_()
    expected = NTXentLoss(temperature)(*other)
    (3 * expected).backward()
    assert pair.grad is not None
    assert other.grad is not None
    assert nt_xent(*pair, temperature=temperature).item() == pytest.approx(expected.item(), rel=1e-10)
    assert (pair.grad - other.grad).abs().max() < 1e-10 * other.grad.abs().max()


def test_nt_xent_in_float32_has_the_gradient_of_float64() -> None:
    pair = views(2, rows=300, dim=32)
    double, single = (gradient(lambda v: nt_xent(v[0], v[1]), pair.to(dtype)) for dtype in (pair.dtype, torch.float32))
    assert (double - single).abs().max() < 1e-6 * double.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_info_nce_follows_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    queries, keys = views(2)
    q, k = unit(queries.numpy()), unit(keys.numpy())
    logits = np.concatenate(((q * k).sum(axis=1, keepdims=True), q @ NEGATIVES.double().numpy().T), axis=1) / 0.2
    found = info_nce(queries.to(dtype), keys.to(dtype), NEGATIVES.to(dtype))
    assert found.item() == pytest.approx(-log_softmax(logits)[:, 0].mean(), rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_symmetric_info_nce_follows_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    q1, q2, k1, k2 = (unit(rows) for rows in views().numpy())
    ways = [-np.diag(log_softmax(q @ k.T / 0.3)).mean() for q, k in ((q1, k2), (q2, k1))]
    found = symmetric_info_nce(*views().to(dtype), temperature=0.3)
    assert found.item() == pytest.approx(2 * 0.3 * sum(ways), rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_negative_cosine_follows_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    first, second = views(2).numpy()
    expected = -np.mean([p @ z / np.linalg.norm(p) / np.linalg.norm(z) for p, z in zip(first, second, strict=True)])
    assert negative_cosine(*views(2).to(dtype)).item() == pytest.approx(expected, rel=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("dim", [3, 20])
def test_barlow_twins_follows_the_paper(dtype: torch.dtype, tolerance: float, dim: int) -> None:
    pair = views(2, rows=8, dim=dim)
    first, second = ((rows - rows.mean(axis=0)) / np.sqrt(rows.var(axis=0) + 1e-5) for rows in pair.numpy())
    correlation = first.T @ second / 8
    on = ((1 - np.diag(correlation)) ** 2).sum()
    expected = on + 0.02 * (correlation**2).sum() - 0.02 * (np.diag(correlation) ** 2).sum()
    assert barlow_twins(*pair.to(dtype), redundancy=0.02).item() == pytest.approx(expected, rel=tolerance)
    assert BarlowTwinsLoss(0.02)(*pair).item() == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("dim", [3, 20])
def test_vicreg_follows_the_paper(dtype: torch.dtype, tolerance: float, dim: int) -> None:
    pair = 0.3 * views(2, rows=8, dim=dim)
    first, second = pair.numpy()
    expected = 7 * ((first - second) ** 2).mean()
    for rows in (first, second):
        expected += 5 / 2 * np.maximum(0, 1 - np.sqrt(rows.var(axis=0, ddof=1) + 1e-4)).mean()
        covariance = np.atleast_2d(np.cov(rows.T))
        expected += 3 * (covariance**2 - np.diag(np.diag(covariance) ** 2)).sum() / dim
    found = vicreg(*pair.to(dtype), invariance=7, variance=5, covariance=3)
    assert found.item() == pytest.approx(expected, rel=tolerance)
    assert VICRegLoss(7, 5, 3)(*pair).item() == pytest.approx(expected, rel=1e-10)


def handed_out(scores: Rows, epsilon: float, iterations: int) -> Rows:
    """SwAV's Sinkhorn, as in the paper's listing."""
    shares = np.exp(scores / epsilon).T  # (K, B)
    shares /= shares.sum()
    for _ in range(iterations):
        shares /= shares.sum(axis=1, keepdims=True) * shares.shape[0]
        shares /= shares.sum(axis=0, keepdims=True) * shares.shape[1]
    return (shares * shares.shape[1]).T


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("queue", [0, 7])
def test_swav_follows_the_paper(dtype: torch.dtype, tolerance: float, queue: int) -> None:
    scores, past = 0.1 * views(4), 0.1 * views(2, rows=max(queue, 1), seed=1)[:, :queue]
    codes = [handed_out(np.concatenate((scores[v], past[v])), 0.05, 3)[:B] for v in (0, 1)]
    guesses = log_softmax(scores.numpy() / 0.1)
    pairs = [-(codes[t] * guesses[s]).sum(axis=1).mean() for t in (0, 1) for s in range(4) if s != t]
    found = swav(scores.to(dtype), past=past.to(dtype) if queue else None)
    assert found.item() == pytest.approx(np.mean(pairs), rel=tolerance)
    peer = SwaVLoss()(list(scores[:2]), list(scores[2:]), list(past) if queue else None)
    assert peer.item() == pytest.approx(np.mean(pairs), rel=1e-10)


def test_sinkhorn_takes_every_prototype_equally_often() -> None:
    codes = sinkhorn(0.1 * views(1, rows=40)[0], iterations=100)
    assert codes.sum(dim=1).numpy() == pytest.approx(np.ones(40))
    assert codes.sum(dim=0).numpy() == pytest.approx(np.full(D, 40 / D))


def test_sinkhorn_stands_scores_whose_exponential_is_no_float() -> None:
    codes = sinkhorn(views(1)[0].float(), epsilon=1e-4)
    assert codes.sum(dim=1).numpy() == pytest.approx(np.ones(B), rel=1e-5)


def test_prototypes_are_compared_by_direction() -> None:
    prototypes = Prototypes(D, 5)
    with torch.no_grad():
        prototypes.weight *= 7
    prototypes.normalise()
    rows = views(1)[0].float()
    expected = unit(rows.numpy()) @ unit(prototypes.weight.detach().numpy()).T
    assert prototypes(rows).detach().numpy() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_dino_follows_the_paper(dtype: torch.dtype, tolerance: float) -> None:
    student, teacher, centre = 0.1 * views(5), 0.1 * views(2, seed=1), 0.1 * views(1, rows=1, seed=2)[0, 0]
    targets = np.exp(log_softmax((teacher - centre).numpy() / 0.07))
    guesses = log_softmax(student.numpy() / 0.1)
    pairs = [-(targets[t] * guesses[s]).sum(axis=1).mean() for t in (0, 1) for s in range(5) if s != t]
    found = dino(student.to(dtype), teacher.to(dtype), centre.to(dtype), teacher_temperature=0.07)
    assert found.item() == pytest.approx(np.mean(pairs), rel=tolerance)
    peer = DINOLoss(D, teacher_temp=0.07).double()
    peer.center.copy_(centre)
    assert peer(list(teacher), list(student)).item() == pytest.approx(np.mean(pairs), rel=1e-7)  # its 0.07 is a float32


def test_the_centre_is_a_moving_average() -> None:
    centre, teacher = Centre(D, momentum=0.75), views(2)
    centre.update(teacher)
    centre.update(2 * teacher)
    mean = teacher.numpy().reshape(-1, D).mean(axis=0)
    assert centre.centre.numpy() == pytest.approx(0.75 * 0.25 * mean + 0.25 * 2 * mean, rel=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_and_half_precision_change_nothing(name: str) -> None:
    half = views().bfloat16()
    expected = LOSSES[name](half.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert LOSSES[name](half) == expected
        assert LOSSES[name](half.float()) == expected


@pytest.mark.parametrize(
    ("name", "rows"), [(name, rows) for name in LOSSES for rows in (1, 2, 6) if rows > 1 or name not in NEED_TWO]
)
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_collapsed_embeddings_have_finite_gradients(name: str, rows: int, value: float) -> None:
    x = torch.full((4, rows, D), value, requires_grad=True)
    LOSSES[name](x).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 1e3


@pytest.mark.parametrize("name", LOSSES)
def test_one_row_of_zeros_gets_a_finite_gradient(name: str) -> None:
    x = views().float()
    x[:, 0] = 0
    LOSSES[name](x.requires_grad_()).backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() < 1e3


@pytest.mark.parametrize("loss", [barlow_twins, vicreg])
def test_one_image_is_an_error(loss: Callable[..., Tensor]) -> None:
    with pytest.raises(UsageError, match=r"data\.batch_size=2"):
        loss(*views(2, rows=1))


def test_one_view_is_an_error() -> None:
    with pytest.raises(UsageError, match="augment"):
        swav(views(1), assigned=1)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_none_is_an_error(temperature: float) -> None:
    with pytest.raises(UsageError, match="more than 0"):
        nt_xent(*views(2), temperature=temperature)


@pytest.mark.parametrize("name", ["info_nce", "symmetric_info_nce", "negative_cosine", "dino"])
def test_what_is_to_be_predicted_gets_no_gradient(name: str) -> None:
    losses: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "info_nce": lambda v, fixed: info_nce(v[0], fixed[0], fixed[1]),
        "symmetric_info_nce": lambda v, fixed: symmetric_info_nce(v[0], v[1], fixed[0], fixed[1]),
        "negative_cosine": lambda v, fixed: negative_cosine(v[0], fixed[0]),
        "dino": lambda v, fixed: dino(v, fixed[:2], fixed[0, 0]),
    }
    learns, fixed = views().requires_grad_(), views(seed=1).requires_grad_()
    losses[name](learns, fixed).backward()
    assert learns.grad is not None
    assert learns.grad.abs().max() > 0
    assert fixed.grad is None


@pytest.mark.parametrize("count", [2, 4, 11])
def test_a_queue_keeps_the_last_rows(count: int) -> None:
    queue, pushed = Queue(D, 5), []
    for step in range(4):
        rows = views(1, rows=count, seed=step)[0]
        queue.push(rows)
        pushed += list(unit(rows.numpy()))
    assert sorted(map(tuple, queue().numpy())) == pytest.approx(np.array(sorted(map(tuple, pushed[-5:]))), rel=1e-6)


def test_a_queue_may_move_on_before_the_backward_pass() -> None:
    queue, (queries, keys) = Queue(D, 5), views(2).float()
    loss = info_nce(queries.requires_grad_(), keys, queue())
    queue.push(keys)
    loss.backward()
    assert queries.grad is not None
