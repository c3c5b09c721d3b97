"""Spectral norms against the singular values that torch finds, and against torch's own layer."""

import copy

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from visiontasks.layers.spectral import SpectralNorm


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 4, 5), nn.Linear(5, 1))


def test_the_largest_singular_value_becomes_one() -> None:
    net = network()
    norm = SpectralNorm(net)
    for _ in range(2000):  # the slower, the nearer the second largest is
        norm.iterate(net)
    weights = norm(net)
    assert sorted(weights) == ["0.weight", "3.weight", "4.weight"]
    for name, weight in weights.items():
        own = net.get_parameter(name).double()
        largest = torch.linalg.svdvals(own.flatten(1))[0]
        assert torch.allclose(weight.double(), own / largest, atol=1e-4), name


def test_it_steps_as_torchs_layer_does_and_has_its_gradients() -> None:
    net = network()
    norm, own = SpectralNorm(net), copy.deepcopy(net[3])
    spectral_norm(own)
    own.parametrizations.weight[0]._u.copy_(norm.get_buffer("3/weight/left"))  # type: ignore[index, operator, union-attr]
    own.parametrizations.weight[0]._v.copy_(norm.get_buffer("3/weight/right"))  # type: ignore[index, operator, union-attr]
    for _ in range(3):
        x = torch.randn(2, 32)
        found, expected = norm(net)["3.weight"], own.weight
        assert torch.allclose(found, expected, atol=1e-6)
        net.zero_grad()
        own.zero_grad()
        (x @ found.T).square().sum().backward()
        (x @ expected.T).square().sum().backward()
        wanted = own.parametrizations.weight.original.grad  # type: ignore[union-attr]
        assert torch.allclose(net[3].weight.grad, wanted, atol=1e-5)  # type: ignore[arg-type]


def test_evaluation_changes_nothing_and_names_stay() -> None:
    net = network()
    names = list(net.state_dict())
    norm = SpectralNorm(net).eval()
    before = copy.deepcopy(norm.state_dict())
    first, second = norm(net), norm(net)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in norm.state_dict().items())
    functional_call(net, first, (torch.randn(2, 3, 4, 4),))
    assert list(net.state_dict()) == names
