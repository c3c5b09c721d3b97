import pytest
import torch

from visiontasks.contracts import Level
from visiontasks.heads import MLP, VGG, Linear

LEVELS = (Level(4, 8), Level(6, 16))


@pytest.mark.parametrize("head", [Linear, MLP, VGG])
def test_heads_score_the_coarsest_level_with_gradients(head: type) -> None:
    module = head(levels=LEVELS, num_classes=5)
    features = [torch.randn(2, 4, 8, 8), torch.randn(2, 6, 4, 4)]
    logits = module(features)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_linear_is_pooling_and_a_matrix() -> None:
    module, map_ = Linear(levels=LEVELS, num_classes=3), torch.randn(2, 6, 4, 4)
    expected = map_.flatten(2).mean(2) @ module.classifier.weight.T + module.classifier.bias
    torch.testing.assert_close(module([map_]), expected)
