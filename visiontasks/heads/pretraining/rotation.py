"""RotNet: by how much was the image turned?"""

from typing import Any

import torch
from torch import Tensor, nn

from visiontasks.contracts import Level, UsageError
from visiontasks.heads.pretraining.method import Pyramid, pooled
from visiontasks.heads.pretraining.pretext import Recognition
from visiontasks.layers.draws import draws

TURNS = 4


class Rotation(Recognition):
    """A linear layer on the averaged features says by how many right angles an image was turned, counter-clockwise.

    Gidaris, Singh and Komodakis 2018, arXiv 1803.07728: all four turns of each image are in one batch. With every=False
    there is one of them, drawn for each image and epoch, so that a batch takes a quarter of the time and memory.
    Shapes: a pyramid to (N, 4), where N is 4 B or B. Raises UsageError where images are not square.
    """

    def __init__(self, *, levels: tuple[Level, ...], every: bool = True) -> None:
        super().__init__()
        self.classifier = nn.Linear(levels[-1].channels, TURNS)
        self.every = every

    def prepare(self, views: list[Tensor], keys: Tensor) -> tuple[list[Tensor], Any]:
        images = views[0]  # (B, 3, H, W)
        _check_square(images)
        turned = torch.stack([images.rot90(turns, (2, 3)) for turns in range(TURNS)])  # (4, B, 3, H, W)
        if self.every:
            return [turned.flatten(0, 1)], torch.arange(TURNS, device=keys.device).repeat_interleave(len(images))
        turns = (draws(keys, 1)[:, 0] * TURNS).long()  # (B,)
        return [turned[turns, torch.arange(len(images), device=keys.device)]], turns

    def forward(self, features: Pyramid) -> Tensor:
        return self.classifier(pooled(features))  # type: ignore[no-any-return]

    def picture(self, inputs: list[Tensor], outputs: list[Tensor], targets: Any) -> tuple[list[Tensor], str]:  # noqa: ARG002
        """The turned images, and the angles that are said of them."""
        said = (outputs[0].argmax(dim=1) * (360 // TURNS)).tolist()
        return list(inputs[0]), "said " + " ".join(f"{angle}°" for angle in said)


def _check_square(images: Tensor) -> None:
    height, width = images.shape[-2:]
    if height != width:
        raise UsageError(
            f"The images are {height} x {width} pixels, and turned ones must be as high as wide: "
            f"type data.image_size={min(height, width)}."
        )
