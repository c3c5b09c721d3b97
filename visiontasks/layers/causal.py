"""Layers that see of an image only what comes before a pixel: rows above, what is left of it, and its earlier colours."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MaskedConv2d(nn.Conv2d):
    """A convolution over a row up to and with the pixel itself, of which channels see only earlier colours.

    Channels belong to the colours in turn, in equal parts; at the pixel itself a channel sees those of colours before
    its own and, unless `strict`, of its own (van den Oord et al. 2016, arXiv 1601.06759, section 3.4).
    parts is how many times over the outputs are shared out among the colours, such as 2 for contents and their gates.
    """

    mask: Tensor

    def __init__(
        self, inner: int, outer: int, taps: int = 1, *, colours: int, strict: bool = False, parts: int = 1
    ) -> None:
        super().__init__(inner, outer, (1, taps))
        sees = colour_of(inner, colours)
        own = colour_of(outer // parts, colours).repeat(parts)[:, None]
        mask = torch.ones_like(self.weight)
        mask[:, :, 0, -1] = (own > sees if strict else own >= sees).to(mask)
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        padded = F.pad(maps, (self.kernel_size[1] - 1, 0))
        return self._conv_forward(padded, self.weight * self.mask, self.bias)


def colour_of(channels: int, colours: int) -> Tensor:
    """The colour that each of some channels belongs to, (channels,)."""
    return torch.arange(channels) * colours // channels


class GatedLayer(nn.Module):
    """A layer of two stacks: a vertical one, which sees the rows above, and a horizontal one, which also sees its row.

    Gated PixelCNN (van den Oord et al. 2016, arXiv 1606.05328, figure 2), where classes are told with equation 4. The
    first layer takes the image and sees nothing of the pixel itself. Kernels are `kernel` x `kernel` before a mask.
    Shapes: maps (B, inner, H, W) to (B, width, H, W) in both stacks; labels (B,).
    """

    def __init__(
        self, inner: int, width: int, *, colours: int, kernel: int = 3, first: bool = False, num_classes: int = 0
    ) -> None:
        super().__init__()
        self.reach = kernel // 2
        self.first = first
        self.down = nn.Conv2d(inner, 2 * width, (self.reach + 1, kernel))
        self.between = nn.Conv2d(2 * width, 2 * width, 1)
        self.along = MaskedConv2d(inner, 2 * width, self.reach + 1, colours=colours, strict=first, parts=2)
        self.out = MaskedConv2d(width, width, colours=colours)
        self.told = nn.Embedding(num_classes, 4 * width) if num_classes else None

    def forward(self, vertical: Tensor, horizontal: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        vertical, above = self.downwards(vertical, labels)
        return vertical, self.rightwards(horizontal, above, labels)

    def downwards(self, maps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vertical stack's maps, and what the horizontal one is told of the rows above, (B, 2 * width, H, W)."""
        lower = int(self.first)  # rows by which the image is moved
        padded = F.pad(maps, (self.reach, self.reach, self.reach + lower, -lower))
        hidden = self.down(padded) + self._of(labels, 0)
        return gated(hidden), self.between(hidden)

    def rightwards(self, maps: Tensor, above: Tensor, labels: Tensor | None) -> Tensor:
        """The horizontal stack's maps, of any number of rows."""
        made: Tensor = self.out(gated(self.along(maps) + above + self._of(labels, 1)))
        return made if self.first else maps + made

    def _of(self, labels: Tensor | None, stack: int) -> Tensor | float:
        """What a stack's gates are told of the class, (B, 2 * width, 1, 1)."""
        if self.told is None:
            return 0.0
        return self.told(labels).chunk(2, dim=1)[stack][:, :, None, None]  # type: ignore[no-any-return]


def gated(maps: Tensor) -> Tensor:
    """tanh of the first half of the channels times sigmoid of the second."""
    content, gate = maps.chunk(2, dim=1)
    return content.tanh() * gate.sigmoid()
