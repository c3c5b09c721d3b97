"""Generators and critics: sizes, classes, and what is refused."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from visiontasks import heads
from visiontasks.contracts import Level, UsageError
from visiontasks.heads.generation.generators import ResidualGenerator, TransposedGenerator, first_map

LEVELS = (Level(6, 2), Level(8, 4))
SMALL = {"latent_dim": 9, "width": 4}


def made(conditional: bool = False, generator: Any = None, **options: Any) -> Any:
    kind = heads.ConditionalGAN if conditional else heads.GAN
    generator = generator or partial(ResidualGenerator, **SMALL)
    return kind(levels=LEVELS, num_classes=3, image_size=(16, 16), generator=generator, **options)


@pytest.mark.parametrize("size", [(16, 16), (28, 28), (32, 32), (32, 48), (64, 64), (96, 96), (128, 128)])
@pytest.mark.parametrize("make", [TransposedGenerator, ResidualGenerator])
def test_generators_make_pictures_of_the_size(size: tuple[int, int], make: Any) -> None:
    generator = make(image_size=size, channels=3, **SMALL)
    pictures = generator(torch.randn(2, 9))
    assert pictures.shape == (2, 3, *size)
    assert pictures.abs().max() <= 1
    assert not torch.equal(pictures[0], pictures[1])


def test_the_first_map_is_small_and_doubled() -> None:
    assert first_map((32, 32)) == ((4, 4), 3)
    assert first_map((28, 28)) == ((7, 7), 2)
    assert first_map((128, 128)) == ((4, 4), 5)


@pytest.mark.parametrize("size", [(30, 30), (8, 8), (32, 33), (40, 36)])
def test_a_size_that_cannot_be_doubled_to_is_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"type data\.image_size=32, 64 or 128"):
        first_map(size)


@pytest.mark.parametrize(
    "make", [TransposedGenerator, ResidualGenerator, partial(ResidualGenerator, chunked=True)], ids=["", "", "chunked"]
)
def test_what_is_told_changes_the_picture(make: Any) -> None:
    generator = make(**SMALL, embedding_dim=5, image_size=(16, 16), channels=3, num_classes=3)
    latents = torch.randn(1, 9).expand(2, -1)
    first, second = generator.eval()(latents, torch.tensor([0, 2]))
    assert not torch.equal(first, second)
    same, again = generator(latents, torch.tensor([1, 1]))
    assert torch.allclose(same, again, atol=1e-6)


def test_chunks_are_the_latents_of_each_block() -> None:
    generator = ResidualGenerator(image_size=(32, 32), channels=3, latent_dim=10, width=4, chunked=True)
    assert generator.chunks == [4, 2, 2, 2]
    latents = torch.randn(1, 10).repeat(2, 1)
    latents[1, 8:] += 1  # the last block's
    first, second = generator.eval()(latents)
    assert not torch.equal(first, second)


def test_a_projection_critic_is_a_linear_layer_with_the_classs_own_weights() -> None:
    head = made(conditional=True)
    features = [torch.randn(5, 6, 4, 4), torch.randn(5, 8, 2, 2)]
    labels = torch.tensor([0, 1, 2, 1, 0])
    pooled = features[-1].mean(dim=(2, 3))
    weights = head.critic.linear.weight + head.critic.embedding.weight[labels]  # (B, C)
    assert torch.allclose(head(features, labels), (pooled * weights).sum(dim=1) + head.critic.linear.bias, atol=1e-6)
    assert made()(features).shape == (5,)
    assert not any(isinstance(layer, nn.Embedding) for layer in made().modules())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"objective": "minimax"}, "head.objective=minimax is no objective: give non_saturating"),
        ({"critic_steps": 0}, "head.critic_steps=0 is no number of steps"),
        ({"diffaugment": ["blur"]}, "has no blur"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        made(**options)
