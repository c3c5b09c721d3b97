import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from visiontasks.layers.batch_norm import in_parts, values_normed

NORMS = {
    "plain": nn.BatchNorm2d(3),
    "without memory": nn.BatchNorm2d(3, track_running_stats=False),
    "with an average of all": nn.BatchNorm2d(3, momentum=None),
    "with an activation": BatchNormAct2d(3, act_layer=nn.ReLU, inplace=True),
}


def learnt(network: nn.Module, outputs: Tensor) -> list[Tensor]:
    """The outputs, gradients and statistics of a network."""
    (outputs * torch.linspace(-1, 2, outputs.numel()).view_as(outputs)).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    return [outputs.detach(), *gradients, *network.buffers()]


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_parts_are_seen_as_batches_of_their_own(name: str, layout: torch.memory_format) -> None:
    alone = nn.Sequential(nn.Conv2d(2, 3, 3), copy.deepcopy(NORMS[name]), nn.Conv2d(3, 2, 1))
    together = copy.deepcopy(alone)
    images = torch.randn(6, 2, 5, 5).contiguous(memory_format=layout)
    images[3:] *= 5
    expected = learnt(alone, torch.cat([alone(part) for part in images.chunk(2)]))
    with in_parts([together[1]], 2):
        outputs = together(images)
    for found, wanted in zip(learnt(together, outputs), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_afterwards_and_after_an_error_a_batch_is_a_batch() -> None:
    norm, images = nn.BatchNorm2d(3), torch.randn(4, 3, 2, 2)
    images[2:] += 5
    expected = copy.deepcopy(norm)(images)
    with pytest.raises(InterruptedError), in_parts([norm], 2):
        raise InterruptedError
    torch.testing.assert_close(norm(images), expected)


def test_the_values_that_norms_are_given_are_counted() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))
    image = torch.zeros(1, 3, 6, 6)
    assert values_normed([network[0], network[2]], lambda: network(image)) == 3 * 36 + 4 * 16
    assert not any(layer._forward_pre_hooks for layer in network)
