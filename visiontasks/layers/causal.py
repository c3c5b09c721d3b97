"""Layers that see of an image only what comes before a pixel: rows above, what is left of it, and earlier colours."""

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
        made: Tensor = self._conv_forward(padded, self.weight * self.mask, self.bias)
        return made

    def at(self, window: Tensor) -> Tensor:
        """What it says at the last pixel of windows (B, inner, taps), (B, outer)."""
        return F.linear(window.flatten(1), (self.weight * self.mask).flatten(1), self.bias)


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
        self.reach, self.width = kernel // 2, width
        self.first = first
        self.down = nn.Conv2d(inner, 2 * width, (self.reach + 1, kernel))
        self.between = nn.Conv2d(2 * width, 2 * width, 1)
        self.along = MaskedConv2d(inner, 2 * width, self.reach + 1, colours=colours, strict=first, parts=2)
        self.out = MaskedConv2d(width, width, colours=colours)
        self.told = nn.Embedding(num_classes, 4 * width) if num_classes else None

    def forward(self, vertical: Tensor, horizontal: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        lower = int(self.first)  # rows by which the image is moved
        vertical, above = self.below(F.pad(vertical, (0, 0, self.reach + lower, -lower)), labels)
        made = self.out(gated(self.along(horizontal) + above))
        return vertical, made if self.first else horizontal + made

    def below(self, maps: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The vertical stack's maps, and what the horizontal one is told of the rows above and the class.

        Shapes: maps (B, inner, reach + h, W), where each row sees those before it; returns (B, width, h, W) and
        (B, 2 * width, h, W).
        """
        hidden = self.down(F.pad(maps, (self.reach, self.reach)))
        above: Tensor = self.between(hidden)
        if self.told is None:
            return gated(hidden), above
        vertical, horizontal = self.told(labels)[:, :, None, None].chunk(2, dim=1)  # (B, 2 * width, 1, 1) each
        return gated(hidden + vertical), above + horizontal

    def at(self, window: Tensor, above: Tensor) -> Tensor:
        """The horizontal stack's maps at the last pixel of windows (B, inner, reach + 1), (B, width).

        Shapes: above, what `below` says at that pixel, (B, 2 * width).
        """
        made = self.out.at(gated(self.along.at(window) + above)[:, :, None])
        return made if self.first else window[:, :, -1] + made


def gated(maps: Tensor) -> Tensor:
    """tanh of the first half of the channels times sigmoid of the second."""
    content, gate = maps.chunk(2, dim=1)
    return content.tanh() * gate.sigmoid()
