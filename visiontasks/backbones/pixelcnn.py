"""The gated layers of a PixelCNN, which see of an image only what comes before a pixel."""

import torch
from torch import Tensor, nn

from visiontasks.contracts import Level, UsageError
from visiontasks.layers.causal import GatedLayer
from visiontasks.layers.freezing import FreezableBackbone, freeze_stages
from visiontasks.weights import load_backbone


class GatedPixelCNN(FreezableBackbone):
    """Gated masked convolutions at full size, without blind spot.

    van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, arXiv 1606.05328.

    Args:
        depth: how many layers, the first with kernels of 7 x 7, the others of 3 x 3.
        width: channels of each stack.
        weights: None for a random start, or a file or run folder.
        in_channels: channels of the images, which are seen one after the other.
        frozen_stages: 0, or 1 for layers that never change.

    Shapes: the one level holds the vertical stack's channels, then the horizontal one's. Raises UsageError where depth
    or width are too small, or the weights do not fit.
    """

    causal = True
    probe_side = 8

    def __init__(
        self,
        *,
        depth: int = 6,
        width: int = 48,
        weights: str | None = None,
        in_channels: int = 3,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        if depth < 1 or width < in_channels:
            raise UsageError(
                f"backbone.depth={depth} backbone.width={width} sees no pixel: give 1 layer or more, and a channel or "
                f"more for each of {in_channels} colours."
            )
        self.name = "pixelcnn"
        self.in_channels = in_channels
        self.mean = self.std = (0.5,) * in_channels
        self.levels = (Level(2 * width, 1),)
        first = GatedLayer(in_channels, width, colours=in_channels, kernel=7, first=True)
        others = (GatedLayer(width, width, colours=in_channels) for _ in range(depth - 1))
        self.layers = nn.ModuleList([first, *others])
        self.receipt = load_backbone(self, weights) if weights is not None else None
        freeze_stages(self, frozen_stages)

    def forward(self, images: Tensor) -> list[Tensor]:
        stacks = (images, images)
        for layer in self.layers:
            stacks = layer(*stacks)
        return [torch.cat(stacks, dim=1)]  # (B, 2 * width, H, W)
