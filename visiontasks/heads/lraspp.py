"""The light head of MobileNetV3."""

from typing import ClassVar

from torch import Tensor, nn
from torchvision.models.segmentation.lraspp import LRASPPHead

from visiontasks.contracts import Level
from visiontasks.layers.blocks import initialise_for_relu, nearest_skip


class LRASPP(nn.Module):
    """A 1x1 convolution of the coarsest level, gated by its average, scored and added to the scores of a finer level.

    Howard et al. 2019, Searching for MobileNetV3, arXiv 1905.02244, section 6.4. Meant for output_stride=16; the finer
    level is the one nearest stride 8. The layers and their names are those of torchvision's LRASPPHead.

    Shapes: a pyramid to logits (B, num_classes, h, w) at the finer level's stride.

    Args:
        width: channels of the coarsest level's convolution.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int, width: int = 128) -> None:
        super().__init__()
        self.skip = nearest_skip(levels, 8)
        self.layers = LRASPPHead(levels[self.skip].channels, levels[-1].channels, num_classes, width)
        initialise_for_relu(self.layers.cbr)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.layers({"low": features[self.skip], "high": features[-1]})  # type: ignore[no-any-return]  # (B, K, h, w)
