"""Noise to pictures: transposed convolutions, and residual blocks with upsampling."""

from itertools import pairwise
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.errors import UsageError

SMALLEST = (4, 7)  # least and largest shorter side of the first map
WIDEST = 512  # channels of the first maps at most


class Generator(nn.Module):
    """Latents (B, latent_dim), and classes (B,) where there are any, to pictures (B, channels, H, W) in -1..1."""

    latent_dim: int


class MakeGenerator(Protocol):
    """Makes a generator of pictures of a size; num_classes is 0 where it is not told a class."""

    def __call__(self, *, image_size: tuple[int, int], channels: int, num_classes: int) -> Generator: ...


class TransposedGenerator(Generator):
    """Transposed convolutions of 4x4 with stride 2, batch norm and ReLU (Radford et al. 2015, arXiv 1511.06434).

    width is the number of channels of the last hidden map, doubled towards the first one. Where classes are told, an
    embedding of the class stands beside the latents (Mirza and Osindero 2014, arXiv 1411.1784).
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        channels: int,
        num_classes: int = 0,
        latent_dim: int = 128,
        width: int = 64,
        embedding_dim: int = 64,
    ) -> None:
        super().__init__()
        first, doublings = first_map(image_size)
        self.latent_dim = latent_dim
        self.embedding = nn.Embedding(num_classes, embedding_dim) if num_classes else None
        told = latent_dim + (embedding_dim if num_classes else 0)
        widths = [min(width << power, WIDEST) for power in reversed(range(doublings))]
        layers: list[nn.Module] = [nn.ConvTranspose2d(told, widths[0], first, bias=False), *_normed(widths[0])]
        for inner, outer in pairwise(widths):
            layers += [nn.ConvTranspose2d(inner, outer, 4, 2, 1, bias=False), *_normed(outer)]
        layers += [nn.ConvTranspose2d(widths[-1], channels, 4, 2, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(_small_normal)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        if self.embedding is not None and labels is not None:
            latents = torch.cat((latents, self.embedding(labels)), dim=1)  # (B, latent_dim + embedding_dim)
        return self.layers(latents[:, :, None, None])  # type: ignore[no-any-return]  # (B, channels, H, W)


class ResidualGenerator(Generator):
    """Residual blocks, each of which doubles the side by its nearest pixels (Miyato et al. 2018, arXiv 1802.05957).

    width is the number of channels of the last map, doubled towards the first one. Where classes are told, the batch
    norms' scales and shifts depend on the class (de Vries et al. 2017, arXiv 1707.00683). chunked is BigGAN's way
    (Brock et al. 2018, arXiv 1809.11096): every block's norms see a chunk of the latents of their own beside an
    embedding of the class that all share, and weights start orthogonal.
    """

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        channels: int,
        num_classes: int = 0,
        latent_dim: int = 128,
        width: int = 64,
        embedding_dim: int = 64,
        chunked: bool = False,
    ) -> None:
        super().__init__()
        self.first, doublings = first_map(image_size)
        self.latent_dim = latent_dim
        widths = [min(width << power, WIDEST) for power in reversed(range(doublings))]
        widths = [widths[0], *widths]
        self.chunks = _chunks(latent_dim, doublings + 1) if chunked else [latent_dim]
        self.embedding = nn.Embedding(num_classes, embedding_dim) if num_classes else None
        told = (embedding_dim if num_classes else 0) + (self.chunks[-1] if chunked else 0)
        self.start = nn.Linear(self.chunks[0], widths[0] * self.first[0] * self.first[1])
        self.blocks = nn.ModuleList(_UpBlock(*pair, told) for pair in pairwise(widths))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.last = nn.Conv2d(widths[-1], channels, 3, padding=1)
        self.apply(_orthogonal if chunked else _xavier)

    def forward(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        parts = torch.split(latents, self.chunks, dim=1)
        maps = self.start(parts[0]).unflatten(1, (-1, *self.first))  # (B, C, h, w)
        known = [] if self.embedding is None or labels is None else [self.embedding(labels)]
        for at, block in enumerate(self.blocks, start=1):
            told = [*known, *parts[at : at + 1]]
            maps = block(maps, torch.cat(told, dim=1) if told else None)
        return torch.tanh(self.last(F.relu(self.norm(maps))))  # (B, channels, H, W)


class _UpBlock(nn.Module):
    """Two normed 3x3 convolutions at twice the side, and a 1x1 convolution around them."""

    def __init__(self, inner: int, outer: int, told: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(inner, told), _Norm(outer, told)
        self.conv1, self.conv2 = (nn.Conv2d(count, outer, 3, padding=1) for count in (inner, outer))
        self.shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, maps: Tensor, told: Tensor | None) -> Tensor:
        hidden = self.conv1(_doubled(F.relu(self.norm1(maps, told))))  # (B, outer, 2h, 2w)
        hidden = self.conv2(F.relu(self.norm2(hidden, told)))
        doubled: Tensor = hidden + _doubled(self.shortcut(maps))
        return doubled


class _Norm(nn.Module):
    """A batch norm whose scale and shift may follow from what is told (B, told)."""

    def __init__(self, channels: int, told: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=not told)
        self.affine = nn.Linear(told, 2 * channels, bias=False) if told else None

    def forward(self, maps: Tensor, told: Tensor | None) -> Tensor:
        normed: Tensor = self.norm(maps)
        if self.affine is None:
            return normed
        scale, shift = torch.chunk(self.affine(told)[:, :, None, None], 2, dim=1)  # (B, C, 1, 1)
        return torch.addcmul(shift, normed, 1 + scale)


def first_map(image_size: tuple[int, int]) -> tuple[tuple[int, int], int]:
    """Height and width of the map that the latents become, and how often it is doubled.

    Raises UsageError where doubling leads to no such size.
    """
    low, high = SMALLEST
    doublings = max(0, (min(image_size) // low).bit_length() - 1)
    height, width = (side >> doublings for side in image_size)
    if doublings < 2 or (height << doublings, width << doublings) != tuple(image_size) or min(height, width) > high:
        shown = image_size[0] if image_size[0] == image_size[1] else list(image_size)
        raise UsageError(
            f"data.image_size={shown} is not {low} to {high} pixels doubled twice or more: "
            "type data.image_size=32, 64 or 128."
        )
    return (height, width), doublings


def _chunks(latent_dim: int, count: int) -> list[int]:
    """The first chunk takes what cannot be shared out evenly."""
    each = latent_dim // count
    return [latent_dim - each * (count - 1), *[each] * (count - 1)]


def _doubled(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2.0, mode="nearest")


def _normed(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU(inplace=True)


def _small_normal(layer: nn.Module) -> None:
    """Radford et al. 2015, section 3."""
    if isinstance(layer, nn.ConvTranspose2d):
        nn.init.normal_(layer.weight, std=0.02)
    elif isinstance(layer, nn.BatchNorm2d):
        nn.init.normal_(layer.weight, 1.0, 0.02)


def _xavier(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
    _silent(layer)


def _orthogonal(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear | nn.Embedding):
        nn.init.orthogonal_(layer.weight)
    _silent(layer)


def _silent(layer: nn.Module) -> None:
    """What is told changes nothing at the start but a little."""
    if isinstance(layer, _Norm) and layer.affine is not None:
        nn.init.normal_(layer.affine.weight, std=0.02)
