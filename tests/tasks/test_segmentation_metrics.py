import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from scipy.ndimage import distance_transform_edt
from sklearn.metrics import confusion_matrix, f1_score, jaccard_score
from torch import Tensor

from visiontasks.contracts import UsageError
from visiontasks.tasks.segmentation_metrics import (
    BoundaryF1,
    PixelConfusion,
    SegmentationMetrics,
    confusion_figures,
    image_iou,
    predicted_classes,
)

K = 6  # of which the last is neither true nor predicted, and class 4 only predicted


def maps(seed: int = 0, images: int = 5, size: tuple[int, int] = (20, 30)) -> tuple[Tensor, Tensor]:
    """Smooth-edged random maps (B, H, W): predictions of 0..4 and truths of 0..3 with 0 to 100 % ignored."""
    random = torch.Generator().manual_seed(seed)
    blocks = torch.randint(0, 4, (images, size[0] // 5, size[1] // 5), generator=random, dtype=torch.uint8)
    target = blocks.repeat_interleave(5, 1).repeat_interleave(5, 2)
    predicted = target.roll(1, 2)
    noise = torch.rand(target.shape, generator=random) < 0.1
    predicted = predicted.where(~noise, torch.randint(0, 5, target.shape, generator=random, dtype=torch.uint8))
    for index in range(images):
        target[index, : size[0] * index // (images - 1)] = 255
    return predicted, target


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_predicted_classes_are_the_first_of_the_largest(layout: torch.memory_format, kind: torch.dtype) -> None:
    logits = torch.randn(2, 21, 9, 11).to(kind)
    logits[0, :, 0] = 0  # all equal
    logits[1, 5:, 1] = 7  # many equal
    classes = predicted_classes(logits.contiguous(memory_format=layout))
    assert classes.dtype == torch.uint8
    assert np.array_equal(classes.numpy(), logits.float().numpy().argmax(axis=1))


@pytest.mark.parametrize("kind", [torch.uint8, torch.int64])
def test_confusion_and_its_figures_agree_with_scikit_learn(kind: torch.dtype) -> None:
    predicted, target = maps()
    metric = PixelConfusion(K)
    for guess, truth in zip(predicted.split(2), target.split(2), strict=True):
        metric.update(guess.to(kind), truth.to(kind))
    true, chosen = target[target != 255].numpy(), predicted[target != 255].numpy()
    confusion = metric.compute()
    assert np.array_equal(confusion.numpy(), confusion_matrix(true, chosen, labels=range(K)))
    figures, tables = confusion_figures(confusion)
    ious = jaccard_score(true, chosen, average=None, labels=range(5))
    assert figures["miou"].item() == pytest.approx(ious.mean(), rel=1e-6)
    assert tables["per_class_iou"][:5].tolist() == pytest.approx(ious.tolist(), rel=1e-6)
    assert tables["per_class_iou"][5].isnan()
    assert figures["dice"].item() == pytest.approx(f1_score(true, chosen, average="macro"), rel=1e-6)
    assert figures["pixel_accuracy"].item() == pytest.approx((true == chosen).mean(), rel=1e-6)
    recalls = [(chosen[true == k] == k).mean() for k in range(4)]
    assert figures["mean_accuracy"].item() == pytest.approx(np.mean(recalls), rel=1e-6)
    assert tables["per_class_accuracy"][4:].isnan().all()
    weighted = jaccard_score(true, chosen, average="weighted")
    assert figures["frequency_weighted_iou"].item() == pytest.approx(weighted, rel=1e-6)


def test_a_value_that_is_no_class_is_named() -> None:
    metric = PixelConfusion(3)
    metric.update(torch.zeros(1, 2, 2, dtype=torch.uint8), torch.tensor([[[0, 255], [17, 2]]], dtype=torch.uint8))
    with pytest.raises(UsageError, match="value 17 and there are 3 classes"):
        metric.compute()


def test_more_classes_than_a_mask_can_hold_are_refused() -> None:
    PixelConfusion(255)
    with pytest.raises(UsageError, match="256 classes"):
        PixelConfusion(256)


def test_what_was_computed_does_not_change_with_later_batches() -> None:
    predicted, target = maps()
    metric = PixelConfusion(K)
    metric.update(predicted, target)
    first = metric.compute()
    kept = first.clone()
    metric.update(predicted, target)
    assert torch.equal(first, kept)


def test_image_iou_is_that_of_each_image_by_itself() -> None:
    predicted, target = maps()
    expected = []
    for guess, truth in zip(predicted.numpy(), target.numpy(), strict=True):
        true, chosen = truth[truth != 255], guess[truth != 255]
        present = np.union1d(true, chosen)
        ious = [((true == k) & (chosen == k)).sum() / ((true == k) | (chosen == k)).sum() for k in present]
        expected.append(np.mean(ious) if ious else 1.0)
    assert image_iou(predicted, target, K).tolist() == pytest.approx(expected, rel=1e-6)
    assert expected[-1] == 1 > max(expected[:-1])  # the last is wholly ignored


def outlines(labels: np.ndarray) -> np.ndarray:
    """Pixels with a valid 4-neighbour of another class, in plain loops."""
    height, width = labels.shape
    found = np.zeros(labels.shape, bool)
    for y, x in np.argwhere(labels != 255):
        around = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
        inside = [labels[v, u] for v, u in around if 0 <= v < height and 0 <= u < width]
        found[y, x] = any(other not in (labels[y, x], 255) for other in inside)
    return found


def boundary_f1(predicted: np.ndarray, target: np.ndarray, classes: int, radius: float) -> list[float]:
    """F1 of each class from exact distances, with the sums over all images."""
    sums = np.zeros((classes, 4))  # matched and all of the prediction, matched and all of the truth
    for guess, truth in zip(predicted, target, strict=True):
        guess = np.where(truth == 255, 255, guess)
        for k in range(classes):
            pair = [outlines(labels) & (labels == k) for labels in (guess, truth)]
            for side, (own, other) in enumerate((pair, pair[::-1])):
                near = distance_transform_edt(~other) <= radius if other.any() else np.zeros(own.shape, bool)
                sums[k, 2 * side : 2 * side + 2] += (own & near).sum(), own.sum()
    with np.errstate(invalid="ignore"):
        precision, recall = sums[:, 0] / np.maximum(sums[:, 1], 1), sums[:, 2] / np.maximum(sums[:, 3], 1)
        f1 = np.nan_to_num(2 * precision * recall / (precision + recall))
    return np.where(sums[:, 1] + sums[:, 3] > 0, f1, np.nan).tolist()


@pytest.mark.parametrize("radius", [1.0, 1.5, 2.0, 2.9, 5.0, 25.0])
def test_boundary_f1_agrees_with_exact_distances(radius: float) -> None:
    predicted, target = maps()
    metric = BoundaryF1(K, tolerance=min(radius / math.hypot(20, 30) * (1 + 1e-9), 0.99))
    metric.update(predicted[:2], target[:2])
    metric.update(predicted[2:].long(), target[2:].long())
    mean, per_class = metric.compute()
    expected = boundary_f1(predicted.numpy(), target.numpy(), K, radius)
    assert per_class.tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert math.isnan(expected[5])
    assert mean.item() == pytest.approx(np.nanmean(expected), rel=1e-6)


def test_boundary_f1_of_more_classes_than_bits_in_a_byte() -> None:
    random = torch.Generator().manual_seed(1)
    target = torch.randint(0, 20, (2, 4, 5), generator=random, dtype=torch.uint8)
    target = target.repeat_interleave(4, 1).repeat_interleave(4, 2)
    predicted = target.roll((1, 1), (1, 2))
    metric = BoundaryF1(20, tolerance=0.05)
    metric.update(predicted, target)
    expected = boundary_f1(predicted.numpy(), target.numpy(), 20, 0.05 * math.hypot(16, 20))
    assert metric.compute()[1].tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)


def test_boundary_f1_allows_one_pixel_on_the_smallest_images() -> None:
    target = torch.zeros(1, 8, 8, dtype=torch.uint8)
    target[:, :, 4:] = 1
    one, two = BoundaryF1(2), BoundaryF1(2)
    one.update(target.roll(1, 2).where(torch.arange(8) > 0, 0), target)
    two.update(target.roll(3, 2).where(torch.arange(8) > 2, 0), target)
    assert one.compute()[0] == 1
    assert two.compute()[0] == 0


def test_boundary_f1_refuses_a_tolerance_in_pixels() -> None:
    with pytest.raises(UsageError, match="tolerance=3"):
        BoundaryF1(2, tolerance=3)


def test_losses_are_weighted_means_over_all_batches() -> None:
    predicted, target = maps()
    metrics = SegmentationMetrics(K, losses={"cross_entropy": 1.0, "dice": 0.5})
    metrics.update(predicted[:3], target[:3], torch.tensor([[6.0, 3.0], [2.0, 2.0]], requires_grad=True))
    metrics.update(predicted[3:], target[3:], torch.tensor([[0.0, 0.0], [1.0, 2.0]]))
    values, tables = metrics.compute()
    assert values["cross_entropy_loss"].item() == 2
    assert values["dice_loss"].item() == 0.75
    assert values["loss"].item() == pytest.approx(2.375)
    assert set(values) >= {"miou", "pixel_accuracy", "mean_accuracy", "dice", "frequency_weighted_iou", "boundary_f1"}
    assert tables["confusion"].shape == (K, K)
    assert all(table.shape == (K,) for name, table in tables.items() if name.startswith("per_class"))
    metrics.reset()
    metrics.update(predicted[:1], target[:1], torch.tensor([[1.0, 1.0], [1.0, 1.0]]))
    again, _ = metrics.compute()
    assert again["loss"].item() == 1.5


def test_a_single_class_keeps_its_shapes_and_boundaries_can_be_left_out() -> None:
    metrics = SegmentationMetrics(1, losses={"dice": 1.0}, boundary_f1=False)
    ones = torch.zeros(1, 3, 3, dtype=torch.uint8)
    metrics.update(ones, ones, torch.tensor([[0.5, 1.0]]))
    values, tables = metrics.compute()
    assert tables["confusion"].tolist() == [[9]]
    assert values["miou"] == 1
    assert "boundary_f1" not in values
    assert "dice_loss" not in values


def one_of_three(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=3)
    predicted, target = maps()
    metrics = SegmentationMetrics(K, losses={"cross_entropy": 1.0})
    for index in ([0, 1, 2, 4], [3], [])[rank]:  # the last process has no image
        metrics.update(predicted[[index]], target[[index]], torch.tensor([[index, 1.0 + index]]))
    torch.save(metrics.compute(), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.exhaustive
def test_three_processes_with_uneven_parts_compute_as_one(tmp_path: Path) -> None:
    mp.spawn(one_of_three, args=(str(tmp_path),), nprocs=3)
    predicted, target = maps()
    metrics = SegmentationMetrics(K, losses={"cross_entropy": 1.0})
    metrics.update(predicted, target, torch.tensor([[10.0, 15.0]]))
    values, tables = metrics.compute()
    for rank in range(3):
        found, filled = torch.load(tmp_path / f"{rank}.pt")
        assert torch.equal(filled["confusion"], tables["confusion"])
        for name, value in values.items():
            assert found[name].item() == pytest.approx(value.item(), rel=1e-6), name
