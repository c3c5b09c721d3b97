"""What backbones, heads, tasks and data promise each other, on one screen."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from visiontasks.errors import UsageError

__all__ = ["IGNORE", "Backbone", "Batch", "Head", "Level", "Sample", "Transform", "UsageError", "Verdict"]

IGNORE = 255  # what a semantic mask says of a pixel that counts nowhere


class Level(NamedTuple):
    """One level of a feature pyramid."""

    channels: int
    stride: int


class Verdict(NamedTuple):
    """What a check found, in one sentence; a fault makes the result of a training wrong, a warning may."""

    check: str
    status: Literal["ok", "warning", "fault"]
    sentence: str


class Backbone(nn.Module):
    """Images to a feature pyramid.

    Shapes: forward takes normalised float images (B, in_channels, H, W) and returns one map for each level,
    fine to coarse, f[i]: (B, levels[i].channels, H / levels[i].stride, W / levels[i].stride), exactly where H and W
    are multiples of the coarsest stride.
    """

    levels: tuple[Level, ...]
    in_channels: int
    mean: tuple[float, ...]  # of the pixels in 0..1 that the published weights expect, one a channel
    std: tuple[float, ...]

    def forward(self, images: Tensor) -> list[Tensor]:
        raise NotImplementedError


class Head(Protocol):
    """Makes a module from a pyramid's levels; the module turns the pyramid into raw predictions."""

    def __call__(self, *, levels: tuple[Level, ...], num_classes: int) -> nn.Module: ...


class Sample(TypedDict, total=False):
    """One image with its annotations, in the words of albumentations; a data set fills in what it provides."""

    image: NDArray[np.uint8]  # (H, W, 3) RGB
    views: list[NDArray[np.uint8]]  # (h, w, 3) each: the image as learning without labels sees it
    label: int | NDArray[np.float32]  # class index, or (K,) zeros and ones where an image has many labels
    mask: NDArray[np.uint8]  # (H, W) 0 = background or the first class, 255 = ignore
    masks: NDArray[np.uint8]  # (N, H, W) one mask an object
    bboxes: NDArray[np.float32]  # (N, 4) x1, y1, x2, y2 in pixels
    labels: NDArray[np.int64]  # (N,) index into the class names, one an object
    crowd: NDArray[np.uint8]  # (N,) 1: do not learn it, nor count it against a detector; only in val and test
    area: NDArray[np.float64]  # (N,) pixels in the file, as annotated; only in val and test
    scale: np.float32  # boxes / scale are in the file's pixels
    size: NDArray[np.int64]  # (2,) height and width of the file
    others: Sequence["Sample"]  # the samples that a mixing transform may join in
    index: int  # position in the data set


Batch = dict[str, Any]  # "image": uint8 (B, 3, H, W); "index", "label": (B,); "views", per-object entries: lists
Transform = Callable[..., dict[str, object]]  # an albumentations.Compose, called with a sample's entries
