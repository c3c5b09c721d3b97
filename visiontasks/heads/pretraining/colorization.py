"""Colourful image colourisation: which colours belong to what is seen in grey?"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.contracts import Level, UsageError
from visiontasks.heads.fpn import FPN
from visiontasks.heads.pretraining.lab import ColourBins, to_lab, to_rgb
from visiontasks.heads.pretraining.method import Pyramid
from visiontasks.heads.pretraining.pretext import Pretext
from visiontasks.layers.blocks import nearest_skip, resized
from visiontasks.layers.distributed import mean_over_processes, sum_over_processes
from visiontasks.losses.pretext import soft_cross_entropy


class Colorization(Pretext):
    """Says from lightness alone in which bin of a and b each pixel's colour is, on maps of about a quarter of the side.

    Zhang, Isola and Efros 2016, arXiv 1603.08511: truths are spread over the five nearest of the bins that sRGB
    reaches, and rare colours count more. How rare a colour is, is counted in the first `prior_images` training images,
    where the paper takes ImageNet, and mixed with the share `mixing` of even rarity. The backbone sees lightness, from
    0 to 255, in each of its channels; an FPN of such a width makes the maps from the pyramid.
    Shapes: a pyramid to (B, bins, h, w). Raises UsageError where mixing is not a share above 0.
    """

    prior: Tensor
    seen: Tensor

    def __init__(
        self, *, levels: tuple[Level, ...], width: int = 128, mixing: float = 0.5, prior_images: int = 10000
    ) -> None:
        super().__init__()
        if not 0 < mixing <= 1:
            raise UsageError(f"mixing={mixing} is no share of even rarity above 0: type head.mixing=0.5.")
        self.bins = ColourBins()
        self.first = nearest_skip(levels, 4)
        number = len(self.bins.centres)
        self.decoder = FPN(levels=levels[self.first :], num_classes=number, pyramid_width=width, width=width)
        self.mixing, self.prior_images = mixing, prior_images
        self.register_buffer("prior", torch.zeros(number))  # pixels in each bin
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))  # images that they are from

    def prepare(self, views: list[Tensor], keys: Tensor) -> tuple[list[Tensor], Any]:  # noqa: ARG002
        lab = to_lab(views[0])  # (B, 3, H, W)
        return [(lab[:, :1] * 2.55).expand_as(lab)], lab[:, 1:]

    def forward(self, features: Pyramid) -> Tensor:
        return self.decoder(features[self.first :])  # type: ignore[no-any-return]

    def loss(self, outputs: list[Tensor], targets: Any) -> Tensor:
        places, shares = self._truth(outputs, targets)
        return mean_over_processes(*soft_cross_entropy(outputs[0], places, shares, self.rarity()[places[:, 0]]))

    def observe(self, outputs: list[Tensor], targets: Any) -> None:
        """Counts colours until so many images are seen."""
        if self.seen >= self.prior_images:
            return
        places, shares = self._truth(outputs, targets)
        counts = torch.zeros_like(self.prior).index_add(0, places.flatten(), shares.flatten().to(self.prior))
        self.prior += sum_over_processes(counts)
        self.seen += sum_over_processes(self.seen.new_tensor(len(targets)))

    def rarity(self) -> Tensor:
        """The weight of each bin's pixels, (bins,), whose mean over the pixels that were counted is 1."""
        even = torch.full_like(self.prior, 1 / len(self.prior))
        shares = torch.where(self.seen > 0, self.prior / self.prior.sum().clamp(min=1), even)
        weights = 1 / ((1 - self.mixing) * shares + self.mixing * even)
        return weights / (weights * shares).sum()

    def picture(self, inputs: list[Tensor], outputs: list[Tensor], targets: Any) -> tuple[list[Tensor], str]:
        """What was seen, and its lightness in the colours that are said of it."""
        ab = resized(self.bins.decode(outputs[0]), targets.shape[-2:])  # (1, 2, H, W)
        said = to_rgb(torch.cat((inputs[0][:, :1] / 2.55, ab), dim=1))
        return [inputs[0][0], said[0]], ""

    def _truth(self, outputs: list[Tensor], ab: Tensor) -> tuple[Tensor, Tensor]:
        """Bins and shares (B, 5, h, w) of the mean colours of what the pixels of the maps stand for."""
        height, width = outputs[0].shape[-2:]
        return self.bins.encode(F.adaptive_avg_pool2d(ab, (height, width)))
