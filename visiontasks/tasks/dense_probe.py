"""What a pyramid's levels know of each pixel, read by a linear classifier of all levels at the pixel."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.contracts import IGNORE
from visiontasks.layers.blocks import resized
from visiontasks.tasks.probes import Linear


def draw_pixels(mask: Tensor, count: int, *, seed: int, index: int) -> Tensor:
    """Rows and columns (count, 2) of pixels of an image that are not ignored, a function of (seed, index).

    A pixel may come twice; where all are ignored, any pixels come. Shapes: mask (H, W) uint8.
    """
    counted = (mask != IGNORE).flatten().nonzero().flatten().cpu().numpy()
    drawn = np.random.default_rng([seed, index]).integers(len(counted) or mask.numel(), size=count)
    chosen = torch.from_numpy(counted[drawn] if len(counted) else drawn).to(mask.device)
    return torch.stack((chosen // mask.shape[1], chosen % mask.shape[1]), dim=1)


def pixel_features(levels: list[Tensor], pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The features of all levels at pixels of the images, each level resized to the images as `resized` does.

    Shapes: levels (B, C, h, w), pixels (B, P, 2) rows and columns, size of the images; returns (B, P, C + C + ...).
    """
    sides = pixels.new_tensor(size)
    grid = ((2 * pixels + 1) / sides - 1).flip(-1)[:, None]  # (B, 1, P, 2) x, y in -1..1
    maps = (level.float() for level in levels)
    seen = [F.grid_sample(level, grid, padding_mode="border", align_corners=False) for level in maps]
    return torch.cat(seen, dim=1)[:, :, 0].transpose(1, 2)


def pixel_logits(levels: list[Tensor], linear: Linear, size: tuple[int, int]) -> Tensor:
    """The logits (B, K, H, W) of a classifier of `pixel_features`, at every pixel.

    Logits are resized in the place of features, which gives the same and costs less.
    """
    parts = torch.split(linear.weight, [level.shape[1] for level in levels], dim=1)  # (K, C) each
    maps = (F.conv2d(level.float(), part[..., None, None]) for level, part in zip(levels, parts, strict=True))
    logits: Tensor = sum((resized(logits, size) for logits in maps), linear.bias[:, None, None])
    return logits
