"""The task of generation: each step is the one that a bare loop takes, and samples come from the averaged generator."""

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD

from tests.tasks.generation_parts import CLASSES, GAMES, SIDE, fit, images, made
from visiontasks.contracts import Batch, UsageError
from visiontasks.layers.diffaugment import diffaugment
from visiontasks.tasks import Generation

pytestmark = pytest.mark.usefixtures("one_thread")


def games(name: str) -> Any:
    """The losses of the critic and of the generator, written out."""
    return {
        "non_saturating": (
            lambda r, f: F.binary_cross_entropy_with_logits(r, torch.ones_like(r))
            + F.binary_cross_entropy_with_logits(f, torch.zeros_like(f)),
            lambda f: F.binary_cross_entropy_with_logits(f, torch.ones_like(f)),
        ),
        "least_squares": (
            lambda r, f: 0.5 * F.mse_loss(r, torch.ones_like(r)) + 0.5 * F.mse_loss(f, torch.zeros_like(f)),
            lambda f: 0.5 * F.mse_loss(f, torch.ones_like(f)),
        ),
        "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
        "hinge": (
            lambda r, f: torch.clamp(1 - r, min=0).mean() + torch.clamp(1 + f, min=0).mean(),
            lambda f: -f.mean(),
        ),
    }[name]


def bare(task: Generation, batches: list[Batch]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The backbone, the critic's end and the generator after a plain loop over the same batches and draws."""
    own = copy.deepcopy(task)
    backbone, end, generator, head = own.backbone, own.head.critic, own.head.generator, own.head
    for _, norm, network in own.normalised():
        norm.settle(network)
        for name in norm.names:
            layer = network.get_submodule(name.rpartition(".")[0])
            spectral_norm(layer)
            made_by_torch = layer.parametrizations.weight[0]
            made_by_torch._u.copy_(norm.get_buffer(f"{name.replace('.', '/')}/left"))
            made_by_torch._v.copy_(norm.get_buffer(f"{name.replace('.', '/')}/right"))
    critic_loss, generator_loss = games(head.objective)
    critic_optimizer = SGD([*backbone.parameters(), *end.parameters()], lr=0.05, momentum=0.5)
    generator_optimizer = SGD(generator.parameters(), lr=0.05, momentum=0.5)

    def scores(pictures: Tensor, numbers: Tensor, labels: Tensor | None) -> Tensor:
        seen = diffaugment(pictures, numbers, head.diffaugment)
        normalised = own.images({"image": (seen + 1) * 127.5})  # where a hole's zero lies decides what a ReLU lets through
        return end(backbone(normalised), labels)  # type: ignore[no-any-return]

    for batch in batches:
        drawn = own._draw(batch)
        real = batch["image"].float() / 255 * 2 - 1
        fake = generator(drawn.critic_latents, drawn.labels).detach()
        with parametrize.cached():
            of_real = scores(real, drawn.real_numbers, drawn.labels)
            loss = critic_loss(of_real, scores(fake, drawn.fake_numbers, drawn.labels))
            if head.gradient_penalty:
                between = (drawn.mix[:, None, None, None] * real + (1 - drawn.mix[:, None, None, None]) * fake).requires_grad_()
                total = scores(between, drawn.fake_numbers, drawn.labels).sum()
                (slope,) = torch.autograd.grad(total, between, create_graph=True)
                loss = loss + head.gradient_penalty * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
            if head.r1:
                at = real.clone().requires_grad_()
                (slope,) = torch.autograd.grad(scores(at, drawn.real_numbers, drawn.labels).sum(), at, create_graph=True)
                loss = loss + head.r1 / 2 * slope.flatten(1).square().sum(dim=1).mean()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        with parametrize.cached():
            made_up = generator(drawn.generator_latents, drawn.labels)
            loss = generator_loss(scores(made_up, drawn.generator_numbers, drawn.labels))
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return backbone, end, generator


def distance(found: nn.Module, expected: nn.Module) -> float:
    """The largest difference between two parameters."""
    others = {name.replace("parametrizations.weight.original", "weight"): p for name, p in expected.named_parameters()}
    own = dict(found.named_parameters())
    assert own.keys() == others.keys()
    return max((own[name] - others[name]).abs().max().item() for name in own)


@pytest.mark.parametrize("name", GAMES)
def test_steps_are_those_of_a_bare_loop(name: str) -> None:
    task, batches = made(name), images(16)
    before = copy.deepcopy(task)
    expected = bare(task, batches)
    fit(task, batches)
    own = (task.backbone, task.head.critic, task.head.generator)
    for found, wanted, start in zip(own, expected, (before.backbone, before.head.critic, before.head.generator), strict=True):
        assert distance(found, wanted) < 1e-6
        assert distance(found, start) > 1e-3
