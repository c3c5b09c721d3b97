import sys
from typing import Any

import pytest
import torch

from tests.callbacks.watched import Two
from visiontasks.contracts import UsageError
from visiontasks.tasks.classification import Classification
from visiontasks.tasks.extractors import Inception, RandomFeatures, TaskFeatures, published_features

DIGEST = "ce5aba9b"  # of the random weights, for ever: another one would make old figures incomparable


def images(size: int = 20) -> torch.Tensor:
    return torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def classifier(**options: Any) -> Classification:
    torch.manual_seed(0)
    return Classification(backbone=Two(), classes=("a", "b", "c"), **options).eval()


def test_random_features_are_the_same_for_ever() -> None:
    state = torch.get_rng_state()
    extractor = RandomFeatures()
    assert extractor.digest() == DIGEST
    assert torch.equal(torch.get_rng_state(), state)
    features, logits = extractor(images())
    assert (features.shape, logits) == ((6, 224), None)
    assert features.std(dim=0).min() > 0


def test_features_do_not_depend_on_the_batch_or_the_precision_of_the_run() -> None:
    for extractor in (RandomFeatures(), TaskFeatures(classifier(), name="two", source="here", size=(20, 20))):
        together, _ = extractor(images())
        apart = torch.cat([extractor(image[None])[0] for image in images()])
        torch.testing.assert_close(apart, together, rtol=1e-6, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(extractor(images())[0], together)
        assert not together.requires_grad


def test_a_classifier_gives_its_own_logits_and_pooled_features() -> None:
    task = classifier()
    extractor = TaskFeatures(task, name="two", source="here", size=(20, 20))
    features, logits = extractor(images())
    with torch.no_grad():
        normalised = task.images({"image": images()})
        torch.testing.assert_close(logits, task(normalised))
        torch.testing.assert_close(features, task.backbone(normalised)[-1].mean(dim=(2, 3)))
    assert extractor.knows_classes


def test_images_come_in_the_size_that_was_learnt() -> None:
    flat = torch.full((2, 3, 10, 10), 90, dtype=torch.uint8)
    extractor = TaskFeatures(classifier(), name="two", source="here", size=(20, 20))
    torch.testing.assert_close(extractor(flat)[0], extractor(torch.full((2, 3, 20, 20), 90, dtype=torch.uint8))[0])


def test_several_labels_and_published_backbones_are_no_classes() -> None:
    several = TaskFeatures(classifier(multi_label=True), name="two", source="here", size=(20, 20))
    published = published_features(Two().eval(), name="two_imagenet", source="torchvision:two")
    for extractor in (several, published):
        assert not extractor.knows_classes
        assert extractor(images())[1] is None
    assert published.size == (224, 224)


def test_weights_have_digests_of_their_own() -> None:
    first, second = classifier(), classifier()
    digests = [TaskFeatures(task, name="two", source="here", size=(20, 20)).digest() for task in (first, second)]
    with torch.no_grad():
        second.head.classifier.bias[0] += 1e-6
    digests.append(TaskFeatures(second, name="two", source="here", size=(20, 20)).digest())
    assert digests[0] == digests[1] != digests[2]


def test_inception_wants_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UsageError, match="pip install torch-fidelity"):
        Inception()
