"""PixelCNN: each pixel's distribution given those before it, from left to right and top to bottom."""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visiontasks.contracts import Backbone, Level, UsageError
from visiontasks.heads.generation.density import Density, Normalised
from visiontasks.layers.causal import GatedLayer, MaskedConv2d
from visiontasks.losses.likelihood import categorical

TOP = 255  # of a pixel's values


class PixelCNN(Density):
    """Gated layers on a causal backbone's, and a softmax over a pixel's values, one colour after the other.

    van den Oord et al. 2016, arXiv 1606.05328. Surprises are exact. Latents are normal numbers, one a pixel and colour:
    the share of a normal distribution that lies below one is looked up in the pixel's distribution. Sampling goes
    through the pixels one by one, in float32 whatever autocast says.

    Args:
        depth: gated layers on those of the backbone, of the same width.
        hidden: channels before the softmax.
        values: that a pixel has, 2 to 256; images are rounded to them first, and bits are those of rounded images.

    Raises UsageError where an option is out of its range.
    """

    causal: ClassVar[bool] = True
    word: ClassVar[str] = "log_likelihood"
    parts: ClassVar[tuple[str, ...]] = ("likelihood",)
    drawn = 0
    weights = (1.0,)

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        image_size: tuple[int, int],
        channels: int,
        depth: int = 2,
        hidden: int = 96,
        values: int = 256,
    ) -> None:
        super().__init__()
        if not 2 <= values <= TOP + 1:
            raise UsageError(f"head.values={values} is no number of values of a pixel: give 2 to {TOP + 1}.")
        if depth < int(self.conditional) or hidden < channels:
            raise UsageError(
                f"head.depth={depth} head.hidden={hidden}: give {int(self.conditional)} layers or more, and a channel "
                f"or more for each of {channels} colours."
            )
        width, told = levels[-1].channels // 2, num_classes if self.conditional else 0
        self.image_size, self.channels, self.values = image_size, channels, values
        self.latent_dim = channels * image_size[0] * image_size[1]
        self.layers = nn.ModuleList(GatedLayer(width, width, colours=channels, num_classes=told) for _ in range(depth))
        self.hidden = MaskedConv2d(width, hidden, colours=channels)
        self.last = MaskedConv2d(hidden, channels * values, colours=channels)

    def seen(self, pixels: Tensor) -> Tensor:
        return self.shown(self.values_of(pixels))

    def values_of(self, pixels: Tensor) -> Tensor:
        """Pixels from 0 to 255 as the numbers of their values, int64 from 0 to below `values`."""
        return (pixels * (self.values - 1) / TOP).round().long()

    def shown(self, values: Tensor) -> Tensor:
        """The pixels, whole numbers from 0 to 255, that values stand for."""
        return (values * (TOP / (self.values - 1))).round()

    def surprise(self, features: list[Tensor], pixels: Tensor, noise: Tensor, labels: Tensor | None) -> Tensor:  # noqa: ARG002
        stacks: Sequence[Tensor] = features[-1].chunk(2, dim=1)
        for layer in self.layers:
            stacks = layer(*stacks, labels)
        surprise = categorical(self.logits(stacks[1]), self.values_of(pixels))
        return surprise.flatten(1).sum(dim=1, keepdim=True)  # (B, 1)

    def logits(self, maps: Tensor) -> Tensor:
        """Of each value of each colour, (B, C, values, h, w), from the horizontal stack's maps."""
        made: Tensor = self.last(F.relu(self.hidden(F.relu(maps))))
        return made.view(len(made), self.channels, self.values, *made.shape[2:])

    def pictures(self, latents: Tensor, labels: Tensor | None, *, backbone: Backbone, normalised: Normalised) -> Tensor:
        layers = [*cast(nn.ModuleList, backbone.layers), *self.layers]
        shares = torch.special.ndtr(latents.double()).view(-1, self.channels, *self.image_size)
        pixels = torch.zeros_like(shares, dtype=torch.float32)
        height, width = self.image_size
        with torch.autocast(latents.device.type, enabled=False):
            canvas = _Canvas(layers, pixels, normalised=normalised, labels=labels)
            for row, column, colour in product(range(height), range(width), range(self.channels)):
                hidden = self.hidden.at(F.relu(canvas.maps(row, column))[:, :, None])  # (B, hidden)
                logits = self.last.at(F.relu(hidden)[:, :, None]).view(-1, self.channels, self.values)
                drawn = looked_up(logits[:, colour], shares[:, colour, row, column])
                pixels[:, colour, row, column] = self.shown(drawn).float()
        return pixels

    def reconstructions(self, features: list[Tensor]) -> None:  # noqa: ARG002
        """None: a picture is not made from a code."""
        return

    def facts(self) -> dict[str, Any]:
        return {"likelihood": "exact", "values_of_a_pixel": self.values}


class ConditionalPixelCNN(PixelCNN):
    """A PixelCNN whose own layers are told the class (van den Oord et al. 2016, arXiv 1606.05328, equation 4)."""

    conditional: ClassVar[bool] = True


def looked_up(logits: Tensor, shares: Tensor) -> Tensor:
    """The first value at which a softmax, summed up, exceeds a share. Shapes: (B, L) and (B,); returns (B,) int64."""
    sums = logits.double().softmax(dim=1).cumsum(dim=1)
    return (sums <= shares[:, None]).sum(dim=1).clamp(max=logits.shape[1] - 1)


class _Canvas:
    """What gated layers have computed of pictures (B, C, H, W) that are made pixel after pixel, in their order.

    Of a new row the vertical stacks are computed once, of a pixel the horizontal ones, from what lies within reach.
    """

    def __init__(
        self, layers: list[GatedLayer], pixels: Tensor, *, normalised: Normalised, labels: Tensor | None
    ) -> None:
        self.layers, self.pixels, self.normalised, self.labels = layers, pixels, normalised, labels
        count, colours, height, width = pixels.shape
        empty = partial(layers[0].down.weight.new_zeros, count)
        inner = [colours, *(layer.width for layer in layers[:-1])]
        pairs = list(zip(layers, inner, strict=True))
        self.rows = [empty(channels, layer.reach + height, width) for layer, channels in pairs]  # vertical stacks take
        self.row = [empty(channels, layer.reach + width) for layer, channels in pairs]  # horizontal ones, of this row
        self.above: list[Tensor] = []  # of each layer (B, 2 * width, W)

    def maps(self, row: int, column: int) -> Tensor:
        """The last layer's horizontal maps at a pixel, (B, width)."""
        if column == 0:
            self.above = list(self._downwards(row))
        first = max(0, column - 1)  # its last colour was not there yet, and nothing at the pixel itself sees it
        seen = self.normalised(self.pixels[:, :, row : row + 1, first : column + 1])[:, :, 0]
        reach = self.layers[0].reach
        self.row[0][:, :, reach + first : reach + column + 1] = seen
        maps = seen[:, :, -1]
        for layer, taken, above in zip(self.layers, self.row, self.above, strict=True):
            taken[:, :, layer.reach + column] = maps
            maps = layer.at(taken[:, :, column : column + layer.reach + 1], above[:, :, column])
        return maps

    def _downwards(self, row: int) -> Iterator[Tensor]:
        maps = self.normalised(self.pixels[:, :, max(0, row - 1) : max(1, row)])  # the first layer's rows are one lower
        for layer, rows in zip(self.layers, self.rows, strict=True):
            if row or not layer.first:
                rows[:, :, layer.reach + row] = maps[:, :, 0]
            maps, above = layer.below(rows[:, :, row : row + layer.reach + 1], self.labels)
            yield above[:, :, 0]
