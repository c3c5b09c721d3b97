"""Heads that are densities: probabilities, samples, and what is refused."""

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from visiontasks import heads
from visiontasks.backbones import GatedPixelCNN
from visiontasks.contracts import Level, UsageError
from visiontasks.heads.generation.generators import TransposedGenerator
from visiontasks.heads.generation.pixelcnn import looked_up

LEVELS = (Level(6, 2), Level(8, 4))


def pixelcnn(size: tuple[int, int], *, conditional: bool = False, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    """A tiny backbone and a tiny head on it, in float64."""
    torch.manual_seed(seed)
    backbone = GatedPixelCNN(depth=2, width=6)
    kind = heads.ConditionalPixelCNN if conditional else heads.PixelCNN
    chosen: dict[str, Any] = {"depth": 1, "hidden": 9, "values": 4} | options
    head = kind(levels=backbone.levels, num_classes=3, image_size=size, channels=3, **chosen)
    return backbone.double(), head.double()


def vae(**options: Any) -> Any:
    generator = partial(TransposedGenerator, latent_dim=5, width=4)
    return heads.VAE(levels=LEVELS, num_classes=3, image_size=(16, 16), channels=3, generator=generator, **options)


def normalised(pixels: Tensor) -> Tensor:
    return pixels.double() / 127.5 - 1


def surprise(backbone: Any, head: Any, pixels: Tensor, labels: Tensor | None = None) -> Tensor:
    found: Tensor = head.surprise(backbone(normalised(pixels)), pixels, pixels.new_zeros(len(pixels), 0), labels)
    return found[:, 0]


def test_the_probabilities_of_all_images_sum_to_one() -> None:
    backbone, head = pixelcnn((2, 2), values=2)
    every = torch.tensor(list(product((0.0, 255.0), repeat=12))).view(-1, 3, 2, 2)
    assert torch.exp(-surprise(backbone, head, every)).sum().item() == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("conditional", [False, True])
def test_samples_are_drawn_pixel_after_pixel_from_the_density(conditional: bool) -> None:
    backbone, head = pixelcnn((4, 5), conditional=conditional)
    labels = torch.tensor([0, 2, 1]) if conditional else None
    latents = torch.randn(3, head.latent_dim, dtype=torch.float64)
    shares = torch.special.ndtr(latents).view(3, 3, 4, 5)
    pixels = torch.zeros(3, 3, 4, 5)
    for row, column, colour in product(range(4), range(5), range(3)):
        stacks = backbone(normalised(pixels))[-1].chunk(2, dim=1)
        for layer in head.layers:
            stacks = layer(*stacks, labels)
        values = looked_up(head.logits(stacks[1])[:, colour, :, row, column], shares[:, colour, row, column])
        pixels[:, colour, row, column] = head.shown(values).float()
    found = head.pictures(latents, labels, backbone=backbone, normalised=normalised)
    assert torch.equal(found, pixels)
    assert len(found.unique()) > 2


def test_a_share_is_looked_up_in_the_sums() -> None:
    logits = torch.tensor([[0.1, 0.2, 0.7]]).log().expand(4, 3)
    assert looked_up(logits, torch.tensor([0.0, 0.15, 0.299, 0.9999999])).tolist() == [0, 1, 1, 2]


def test_pixels_are_rounded_to_the_values() -> None:
    _, head = pixelcnn((2, 2), values=4)
    assert head.seen(torch.tensor([0.0, 42.0, 43.0, 127.0, 255.0])).tolist() == [0, 0, 85, 85, 255]
    _, fine = pixelcnn((2, 2), values=256)
    every = torch.arange(256.0)
    assert torch.equal(fine.seen(every), every)


def test_the_surprise_of_a_vae_is_a_bound_in_two_parts() -> None:
    head, pixels = vae(beta=4.0), torch.randint(0, 256, (5, 3, 16, 16)).float()
    features = [torch.randn(5, 6, 8, 8), torch.randn(5, 8, 4, 4)]
    mean, log_variance = head.encode(features)
    noise = torch.randn(5, 5)
    parts = head.surprise(features, pixels, noise, None)
    assert parts.shape == (5, 2)
    assert torch.allclose(parts[:, 1], 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=1), atol=1e-5)
    assert head.weights == (1.0, 4.0)
    decoded = head.decode(mean + torch.exp(log_variance / 2) * noise)
    scale = head.log_scale.exp()[:, None, None]
    shares = torch.sigmoid((pixels + 0.5 - decoded) / scale) - torch.sigmoid((pixels - 0.5 - decoded) / scale)
    inner = (pixels > 0) & (pixels < 255)
    ends = torch.where(pixels == 0, torch.sigmoid((0.5 - decoded) / scale), torch.sigmoid((decoded - 254.5) / scale))
    expected = -torch.where(inner, shares, ends).double().log().flatten(1).sum(dim=1)
    assert torch.allclose(parts[:, 0].double(), expected, rtol=1e-4)
    assert head.reconstructions(features).shape == (5, 3, 16, 16)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (partial(vae, beta=-1.0), r"head\.beta=-1\.0 is no weight of the divergence"),
        (partial(vae, grid=0), r"head\.grid=0 leaves no place"),
        (partial(pixelcnn, (2, 2), values=1), r"head\.values=1 is no number of values of a pixel: give 2 to 256"),
        (partial(pixelcnn, (2, 2), hidden=2), r"a channel or more for each of 3 colours"),
        (partial(pixelcnn, (2, 2), conditional=True, depth=0), r"give 1 layers or more"),
    ],
)
def test_what_does_not_fit_is_refused(make: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        make()
