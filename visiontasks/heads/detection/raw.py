"""What detection heads hand on between their network, their losses and their decoding."""

from typing import NamedTuple

from torch import Tensor

Target = dict[str, Tensor]  # "boxes" (N, 4) float32 x1, y1, x2, y2 in pixels; "labels" (N,); "masks" (N, H, W) uint8
Detection = dict[str, Tensor]  # "boxes" (N, 4), "scores" (N,) best first, "labels" (N,); "masks" (N, H, W) uint8
Terms = dict[str, tuple[Tensor, Tensor]]  # a loss by name: its sum and its count


class Dense(NamedTuple):
    """Predictions at the P anchors of all levels, fine to coarse, row by row, all anchors of a place together."""

    logits: Tensor  # (B, P, K)
    codes: Tensor  # (B, P, 4) boxes as the head's coder writes them, relative to the anchors
    quality: Tensor | None  # (B, P) logits of FCOS's centreness
    anchors: Tensor  # (P, 4) x1, y1, x2, y2 in pixels
    counts: tuple[int, ...]  # how many of the P lie on each level
    size: tuple[int, int]  # height and width of the padded images in pixels


class Regions(NamedTuple):
    """What a region proposal network says about the P anchors of all levels, with the maps that it looked at."""

    maps: list[Tensor]  # (B, width, h, w) each
    objectness: Tensor  # (B, P) logits
    codes: Tensor  # (B, P, 4)
    anchors: Tensor  # (P, 4)
    counts: tuple[int, ...]
    size: tuple[int, int]


class TwoStage(NamedTuple):
    """Regions with the proposals that were chosen from them."""

    regions: Regions
    proposals: list[Tensor]  # (N, 4) an image, best first
