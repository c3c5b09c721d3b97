import math
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
import yaml
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor

from visiontasks.errors import UsageError
from visiontasks.layers.distributed import mean_over_processes
from visiontasks.losses import Term, dice, focal, lovasz, ohem, pixel_cross_entropy

CONF = Path(__file__).parents[2] / "conf"
CHOICES = sorted(file.stem for file in (CONF / "loss").glob("*.yaml"))
K = 5
WEIGHT = torch.tensor([0.5, 2.0, 1.0, 3.0, 0.25])
Loss = Callable[..., tuple[Tensor, Tensor]]
LOSSES: dict[str, Loss] = {
    "cross_entropy": pixel_cross_entropy,
    "smoothed": partial(pixel_cross_entropy, weight=WEIGHT, label_smoothing=0.1),
    "focal": partial(focal, weight=WEIGHT),
    "focal_root": partial(focal, gamma=0.5),
    "ohem": partial(ohem, threshold=0.3, min_kept=0.2),
    "dice": dice,
    "dice_absent": partial(dice, absent=True),
    "lovasz": lovasz,
}


def batch(seed: int = 0, images: int = 4) -> tuple[Tensor, Tensor]:
    """Logits and a target whose images differ in how much of them is ignored; the last one wholly."""
    random = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, K, 6, 7, generator=random, dtype=torch.float64)
    target = torch.randint(0, K - 1, (images, 6, 7), generator=random, dtype=torch.uint8)
    for index in range(images):
        target[index, : 6 * index // (images - 1)] = 255
    return logits, target


def run(loss: Loss, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    total, count = loss(logits, target)
    total.backward()
    assert logits.grad is not None
    return total.detach(), count, logits.grad


def softmax(logits: Tensor) -> np.ndarray:
    exponentials = np.exp(logits.numpy() - logits.numpy().max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def pixels(logits: Tensor, target: Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each image, the probabilities (P, K) and classes (P,) of its valid pixels."""
    images = zip(softmax(logits).transpose(0, 2, 3, 1), target.numpy(), strict=True)
    return [(p[mask != 255], mask[mask != 255].astype(int)) for p, mask in images]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_that_of_the_valid_pixels(
    layout: torch.memory_format, weight: Tensor | None, smoothing: float
) -> None:
    logits, target = batch()
    rows, truth = logits.permute(0, 2, 3, 1)[target != 255], target[target != 255].long()
    expected = F.cross_entropy(rows, truth, None if weight is None else weight.double(), label_smoothing=smoothing)
    logits = logits.contiguous(memory_format=layout)
    total, count = pixel_cross_entropy(logits, target, weight=weight, label_smoothing=smoothing)
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-7)
    assert count.item() == pytest.approx(len(truth) if weight is None else WEIGHT[truth].sum().item())


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_follows_its_formula(gamma: float) -> None:
    logits, target = batch()
    p, k = (np.concatenate(parts) for parts in zip(*pixels(logits, target), strict=True))
    true, weights = p[np.arange(len(k)), k], WEIGHT.numpy()[k]
    total, count = focal(logits, target, weight=WEIGHT, gamma=gamma)
    assert total.item() == pytest.approx((-weights * (1 - true) ** gamma * np.log(true)).sum(), rel=1e-9)
    assert count.item() == pytest.approx(weights.sum())


@pytest.mark.parametrize(("threshold", "share"), [(0.3, 0.0), (0.01, 0.4), (0.3, 0.9), (1.0, 0.0), (0.0001, 1.0)])
def test_ohem_keeps_the_hard_pixels_of_each_image(threshold: float, share: float) -> None:
    logits, target = batch()
    losses = [-np.log(p[np.arange(len(k)), k]) for p, k in pixels(logits, target)]
    kept = [
        np.sort(image)[::-1][: max(math.ceil(share * len(image) - 1e-6), int((image > -np.log(threshold)).sum()))]
        for image in losses
    ]
    total, count = ohem(logits, target, threshold=threshold, min_kept=share)
    assert count.item() == sum(map(len, kept)) > 0
    assert total.item() == pytest.approx(np.concatenate(kept).sum(), rel=1e-9)


def test_ohem_weighs_what_it_keeps() -> None:
    logits, target = batch()
    everything = partial(ohem, threshold=1.0, min_kept=1.0)
    total, count = everything(logits, target, weight=WEIGHT)
    expected, weights = pixel_cross_entropy(logits, target, weight=WEIGHT)
    assert total.item() == pytest.approx(expected.item())
    assert count.item() == pytest.approx(weights.item())


@pytest.mark.parametrize(("absent", "smooth"), [(False, 0.0), (False, 1.0), (True, 1.0)])
def test_dice_averages_over_the_classes_of_each_image(absent: bool, smooth: float) -> None:
    logits, target = batch()
    costs = []
    for p, k in pixels(logits, target):
        g = np.eye(K)[k]
        classes = range(K) if absent and len(k) else np.unique(k)
        overlaps = [
            (2 * (p[:, c] * g[:, c]).sum() + smooth) / ((p[:, c] ** 2).sum() + (g[:, c] ** 2).sum() + smooth)
            for c in classes
        ]
        costs += [1 - np.mean(overlaps)] if len(overlaps) else []
    total, count = dice(logits, target, absent=absent, smooth=smooth)
    assert count.item() == len(costs) == 3
    assert total.item() == pytest.approx(sum(costs), rel=1e-9)


def jaccard_loss(wrong: np.ndarray, true: np.ndarray) -> float:
    """One minus intersection over union when the pixels `wrong` are the misclassified ones, from the paper's (6)."""
    return float(wrong.sum() / (true | wrong).sum())


def test_lovasz_is_the_extension_of_the_jaccard_loss() -> None:
    logits, target = batch()
    costs = []
    for p, k in pixels(logits, target):
        classes = []
        for c in np.unique(k):
            true = k == c
            errors = np.abs(true - p[:, c])
            levels = np.sort(np.append(errors, 0.0))  # the extension is the integral of the set function over levels
            heights = [jaccard_loss(errors >= high, true) for high in levels[1:]]
            classes.append(np.dot(np.diff(levels), heights))
        costs += [np.mean(classes)] if classes else []
    total, count = lovasz(logits, target)
    assert count.item() == len(costs) == 3
    assert total.item() == pytest.approx(sum(costs), rel=1e-9)


def test_lovasz_of_a_certain_prediction_is_one_minus_iou() -> None:
    target = torch.tensor([[[0, 0, 1, 1, 1, 255]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1, 1, 0, 0]]])
    total, count = lovasz(1000.0 * F.one_hot(predicted, 2).permute(0, 3, 1, 2), target)
    assert (total / count).item() == pytest.approx(1 - (1 / 3 + 2 / 4) / 2)


@pytest.mark.parametrize("name", LOSSES)
def test_parts_of_a_batch_sum_to_the_whole(name: str) -> None:
    logits, target = batch(images=6)
    whole = run(LOSSES[name], logits, target)
    for cuts in ([1, 5], [3, 3], [2, 1, 3]):
        parts = [run(LOSSES[name], *pair) for pair in zip(logits.split(cuts), target.split(cuts), strict=True)]
        totals, counts, gradients = zip(*parts, strict=True)
        assert abs(sum(totals) - whole[0]) < 1e-12 * len(logits) * 42
        assert sum(counts) == pytest.approx(whole[1].item(), rel=1e-6)
        assert (torch.cat(gradients) - whole[2]).abs().max() < 1e-12


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    logits, target = batch(images=3)
    logits, target = logits[:2, :, :3, :3].clone().requires_grad_(), target[:2, :3, :3].clone()
    target[1, 1] = 2
    assert torch.autograd.gradcheck(lambda values: LOSSES[name](values, target)[0], logits)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", LOSSES)
def test_everything_ignored_is_a_zero_with_zero_gradient(name: str, layout: torch.memory_format) -> None:
    logits, target = batch()
    total, count, gradient = run(LOSSES[name], logits.contiguous(memory_format=layout), torch.full_like(target, 255))
    assert (total.item(), count.item()) == (0, 0)
    assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("name", LOSSES)
def test_certain_pixels_give_finite_gradients(name: str) -> None:
    _, target = batch()
    for sign in (1, -1):
        certain = 1e4 * sign * F.one_hot(target.long() % K, K).permute(0, 3, 1, 2).float()
        total, _, gradient = run(LOSSES[name], certain, target)
        assert total.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_computed_in_float32_and_the_layout_and_index_type_change_nothing(name: str) -> None:
    logits, target = batch()
    half = logits.bfloat16()
    total, count, gradient = run(LOSSES[name], half.float(), target.long())
    other = run(LOSSES[name], half.contiguous(memory_format=torch.channels_last), target)
    assert total.dtype == count.dtype == other[0].dtype == other[1].dtype == torch.float32
    assert other[0].item() == pytest.approx(total.item(), rel=1e-5)
    assert other[1].item() == pytest.approx(count.item(), rel=1e-6)
    assert torch.allclose(other[2].float(), gradient, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize(
    ("loss", "word"),
    [
        (partial(focal, gamma=-1.0), "gamma"),
        (partial(ohem, threshold=0.0), "threshold"),
        (partial(ohem, min_kept=1.5), "min_kept"),
        (partial(dice, smooth=-1.0), "smooth"),
        (partial(dice, smooth=0.0, absent=True), "absent"),
    ],
)
def test_settings_out_of_range_are_named(loss: Loss, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        loss(*batch())


@pytest.mark.parametrize("loss", [dice, lovasz])
def test_class_weights_are_refused_by_losses_that_know_none(loss: Loss) -> None:
    logits, target = batch()
    with pytest.raises(UsageError, match=f"{loss.__name__} takes no class weights"):  # type: ignore[attr-defined]
        Term(partial(loss))(logits, target, class_weights=WEIGHT)
    without = Term(loss, class_weights=False)(logits, target, class_weights=WEIGHT)
    assert torch.equal(without[0], loss(logits, target)[0])


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_a_term_needs_a_weight(weight: float) -> None:
    with pytest.raises(UsageError, match="weight"):
        Term(dice, weight)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_makes_terms(choice: str) -> None:
    logits, target = batch()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        terms = instantiate(compose(f"loss/{choice}").loss, _convert_="all")
    assert terms
    for name, term in terms.items():
        assert isinstance(term, Term)
        assert term.weight == 1
        assert term.name.endswith(name)
        total, count = term(logits, target)
        assert 0 < (total / count).item() < 10


@pytest.mark.parametrize("choice", ["cross_entropy", "focal", "ohem", "cross_entropy_dice", "cross_entropy_lovasz"])
def test_choices_that_take_class_weights_use_them(choice: str) -> None:
    logits, target = batch()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        terms = instantiate(compose(f"loss/{choice}").loss, _convert_="all")
    means = [
        [t / n for t, n in (term(logits, target, class_weights=w) for term in terms.values())] for w in (None, WEIGHT)
    ]
    assert means[0] != means[1]


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_says_when_to_use_it(choice: str) -> None:
    text = (CONF / "loss" / f"{choice}.yaml").read_text()
    assert text.startswith("# ")
    assert yaml.safe_load(text)


def one_of_two(rank: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    logits, target = (part[2 * rank : 2 * rank + 2].clone() for part in batch())
    gradients = {}
    for name, loss in LOSSES.items():
        logits.grad = None
        mean_over_processes(*loss(logits.requires_grad_(), target)).backward()
        gradients[name] = logits.grad
    torch.save(gradients, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_with_uneven_ignored_pixels_have_the_gradient_of_one(tmp_path: Path) -> None:
    mp.spawn(one_of_two, args=(str(tmp_path),), nprocs=2)
    logits, target = batch()
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for name, loss in LOSSES.items():
        logits.grad = None
        mean_over_processes(*loss(logits.requires_grad_(), target)).backward()
        together = torch.cat([gradients[name] for gradients in ranks]) / 2  # as DDP averages
        assert logits.grad is not None
        assert (together - logits.grad).abs().max() < 1e-7 * logits.grad.abs().max(), name
