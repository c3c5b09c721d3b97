"""Anchors, and the boxes that are learnt from them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import box_iou

from visiontasks.heads.detection.raw import Target

BACKGROUND = -1
IGNORED = -2  # between the thresholds of torchvision's Matcher


class Anchors(nn.Module):
    """The same boxes around every place of a level's map.

    Shapes: maps (B, C, h, w) to anchors (P, 4), x1, y1, x2, y2 in pixels, row by row, fine to coarse.

    Args:
        cells: for each level its boxes around the origin (A, 4) in pixels.
        strides: of the levels.
        offset: where the first place lies, in strides: 0 where convolutions of odd size centre it, 0.5 in FCOS.
    """

    def __init__(self, cells: Sequence[Tensor], strides: Sequence[int], *, offset: float = 0.0) -> None:
        super().__init__()
        self.per_place = [len(boxes) for boxes in cells]
        self.strides = tuple(strides)
        self.offset = offset
        self.cells: Tensor
        self.register_buffer("cells", torch.cat(list(cells)).float(), persistent=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        cells = torch.split(self.cells, self.per_place)
        grids = [self._places(level, stride) for level, stride in zip(maps, self.strides, strict=True)]
        return torch.cat([(grid + boxes).flatten(0, 1) for grid, boxes in zip(grids, cells, strict=True)])

    def counts(self, maps: list[Tensor]) -> tuple[int, ...]:
        """How many anchors each level has."""
        sizes = (level.shape[-2] * level.shape[-1] for level in maps)
        return tuple(size * number for size, number in zip(sizes, self.per_place, strict=True))

    def _places(self, level: Tensor, stride: int) -> Tensor:
        """The places of a map in pixels, x and y twice, (h * w, 1, 4)."""
        height, width = level.shape[-2:]
        y = (torch.arange(height, device=self.cells.device) + self.offset) * stride
        x = (torch.arange(width, device=self.cells.device) + self.offset) * stride
        places = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=2)  # (h, w, 2)
        return places.reshape(-1, 1, 2).repeat(1, 1, 2)


def precise(values: Tensor) -> Tensor:
    """At least float32, which autocast may have left."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def by_anchor(maps: list[Tensor], columns: int) -> Tensor:
    """Orders maps (B, A * columns, h, w) by level, place and anchor, (B, P, columns)."""
    return torch.cat([level.permute(0, 2, 3, 1).reshape(len(level), -1, columns) for level in maps], dim=1)


def padded_targets(targets: Sequence[Target]) -> tuple[Tensor, Tensor]:
    """Gives boxes (B, M, 4) and labels (B, M) with M the largest number of objects, at least 1, and zeros behind."""
    boxes = pad_sequence([target["boxes"].float() for target in targets], batch_first=True)
    labels = pad_sequence([target["labels"] for target in targets], batch_first=True)
    if boxes.shape[1] == 0:
        return boxes.new_zeros(len(targets), 1, 4), labels.new_zeros(len(targets), 1)
    return boxes, labels


def cells(strides: Sequence[int], scale: float, ratios: Sequence[float], octaves: int = 1) -> list[Tensor]:
    """Gives for each stride the boxes around the origin, (octaves * ratios, 4), rounded to pixels."""
    sizes = [[stride * scale * 2 ** (step / octaves) for step in range(octaves)] for stride in strides]
    return list(AnchorGenerator(sizes, [list(ratios)] * len(sizes)).cell_anchors)


def matched(matcher: Matcher, anchors: Tensor, boxes: Tensor) -> Tensor:
    """Gives each anchor the index of its object, or BACKGROUND, or IGNORED, (P,)."""
    if len(boxes) == 0:
        return torch.full((len(anchors),), BACKGROUND, device=anchors.device)
    return matcher(box_iou(boxes.float(), anchors))  # type: ignore[no-any-return]


def truth_boxes(targets: Sequence[Target], matches: Sequence[Tensor]) -> Tensor:
    """Gives the boxes of the objects that a match (n,) an image names, (F, 4), leaving out background."""
    return torch.cat([target["boxes"][own[own >= 0]] for target, own in zip(targets, matches, strict=True)]).float()


class Assigned(NamedTuple):
    """What the P anchors of B images learn, and the F of them that belong to objects, image by image."""

    labels: Tensor  # (B, P) class, BACKGROUND or IGNORED
    image: Tensor  # (F,)
    place: Tensor  # (F,) which of the P
    boxes: Tensor  # (F, 4) of their objects


def assigned(matcher: Matcher, anchors: Tensor, targets: Sequence[Target]) -> Assigned:
    """Gives every anchor of every image its object's class and, where it has one, box."""
    matches = [matched(matcher, anchors, target["boxes"]) for target in targets]  # (P,) each
    labels = torch.stack([labelled(match, target["labels"]) for match, target in zip(matches, targets, strict=True)])
    image, place = (labels >= 0).nonzero(as_tuple=True)
    return Assigned(labels, image, place, truth_boxes(targets, matches))


def labelled(match: Tensor, labels: Tensor) -> Tensor:
    """Exchanges the indices of objects for their labels, (P,)."""
    if len(labels) == 0:
        return match
    return torch.where(match >= 0, labels[match.clamp(min=0)], match)
