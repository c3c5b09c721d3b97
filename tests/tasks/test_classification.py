import numpy as np
import pytest
import torch
from sklearn import metrics as oracle
from torch import Tensor

from visiontasks.backbones import CifarResNet
from visiontasks.contracts import UsageError
from visiontasks.tasks import Classification
from visiontasks.tasks.classification import ClassMetrics, MultiLabelMetrics

CLASSES = tuple("abcdefg")


def answers(images: int = 101) -> tuple[Tensor, Tensor]:
    """Probabilities that are right more often than not, and the truth; class g never occurs and is never predicted."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 6, (images,), generator=generator)
    logits = torch.randn(images, 7, generator=generator) + 1.5 * torch.nn.functional.one_hot(target, 7)
    logits[:, 6] = -20
    return logits.softmax(dim=1), target


def test_figures_of_one_class_an_image_are_scikit_learns() -> None:
    probabilities, target = answers()
    metrics = ClassMetrics(len(CLASSES))
    for part in torch.arange(101).split(7):  # the last batch has 3 images
        metrics.update(probabilities[part], target[part], torch.tensor([[2.0, 1.0]]))
    values, tables = metrics.compute()
    predicted = probabilities.argmax(dim=1)
    assert values["accuracy"] == pytest.approx(oracle.accuracy_score(target, predicted))
    assert values["f1"] == pytest.approx(oracle.f1_score(target, predicted, average="macro"))
    assert values["mean_class_accuracy"] == pytest.approx(oracle.balanced_accuracy_score(target, predicted))
    five = oracle.top_k_accuracy_score(target, probabilities, k=5, labels=range(7))
    assert values["top5"] == pytest.approx(five)
    assert values["loss"] == pytest.approx(2.0)
    assert np.array_equal(tables["confusion"], oracle.confusion_matrix(target, predicted, labels=range(7)))
    assert tables["per_class_accuracy"][6].isnan()


def test_calibration_error_is_that_of_guo_et_al() -> None:
    probabilities, target = answers()
    metrics = ClassMetrics(len(CLASSES))
    metrics.update(probabilities, target, torch.tensor([[0.0, 1.0]]))
    confidence, chosen = probabilities.max(dim=1)
    right, bins = (chosen == target).double().numpy(), np.ceil(confidence.numpy() * 15)
    inside = [bins == number for number in range(1, 16)]
    gaps = [
        abs(right[where].mean() - confidence.numpy()[where].mean()) * where.mean() for where in inside if where.any()
    ]
    assert metrics.compute()[0]["ece"] == pytest.approx(sum(gaps), abs=1e-5)


def test_figures_of_many_labels_are_scikit_learns() -> None:
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(50, 4, generator=generator) > 0.6).float()
    probabilities = (0.6 * target + 0.5 * torch.rand(50, 4, generator=generator)).clamp(0, 1)
    metrics = MultiLabelMetrics(4)
    for part in torch.arange(50).split(8):
        metrics.update(probabilities[part], target[part], torch.tensor([[1.0, 1.0]]))
    values, _ = metrics.compute()
    predicted = probabilities >= 0.5
    assert values["exact_match"] == pytest.approx(oracle.accuracy_score(target, predicted))
    assert values["f1"] == pytest.approx(oracle.f1_score(target, predicted, average="macro"))
    assert values["map"] == pytest.approx(oracle.average_precision_score(target, probabilities, average="macro"))
    assert values["accuracy"] == pytest.approx((predicted == target.bool()).float().mean().item())


def test_predictions_name_the_five_likeliest_and_errors_weigh_the_wrong() -> None:
    task = Classification(backbone=CifarResNet(depth=20), classes=CLASSES)
    logits = torch.tensor([[0.0, 3, 1, 0, 0, 0, 0], [2.0, 0, 0, 0, 0, 0, 0]])
    first, second = task.predictions(logits)
    assert (first["class"], second["class"]) == ("b", "a")
    assert list(first["top"])[:2] == ["b", "c"]
    assert len(first["top"]) == 5
    wrong = task.errors(logits, {"label": torch.tensor([1, 3])})["mistakes"]
    assert wrong[0] == 0
    assert wrong[1] == pytest.approx(logits[1].softmax(dim=0)[0].item())


def test_grey_networks_see_the_luminance() -> None:
    task = Classification(backbone=CifarResNet(depth=20, in_channels=1), classes=CLASSES)
    task.backbone.mean = (0.0,)
    pixels = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    grey = (task.images({"image": pixels}) - task.pixel_shift) / task.pixel_scale
    assert torch.allclose(grey, torch.full((1, 1, 8, 8), 0.299 * 255), atol=1e-3)


def test_class_weights_of_another_number_are_refused() -> None:
    with pytest.raises(UsageError, match="2 numbers and the data 7 classes"):
        Classification(backbone=CifarResNet(depth=20), classes=CLASSES, class_weights=[1.0, 2.0])
