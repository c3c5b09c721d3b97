"""The decoder of SegFormer."""

from typing import ClassVar

from torch import Tensor, nn

from visiontasks.contracts import Level
from visiontasks.layers.blocks import initialise_for_relu, resized


class SegFormerMLP(nn.Module):
    """Every level through a linear layer, enlarged to the finest, fused by one more, batch norm and ReLU, and scored.

    Xie et al. 2021, SegFormer, arXiv 2105.15203, section 3.2. The layer fusing all levels side by side is kept as one
    matrix a level: applied before the enlargement and added, they give the same sums from smaller maps.

    Shapes: a pyramid to logits (B, num_classes, h, w) at the finest level's stride.

    Args:
        width: channels of the decoder: 256 in SegFormer-B0 and B1, 768 in the larger ones.
        dropout: share of channels that training leaves out before the scores.
    """

    serves: ClassVar[str] = "segmentation"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(level.channels, width, 1) for level in levels)
        self.fusions = nn.ModuleList(nn.Conv2d(width, width, 1, bias=False) for _ in levels)
        initialise_for_relu(self.fusions)
        self.finish = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), nn.Dropout2d(dropout))
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, features: list[Tensor]) -> Tensor:
        fused = self._fused(features, 0)  # (B, width, h, w)
        for index in range(1, len(features)):
            fused = fused + resized(self._fused(features, index), features[0].shape[-2:])
        return self.classifier(self.finish(fused))  # type: ignore[no-any-return]  # (B, K, h, w)

    def _fused(self, features: list[Tensor], index: int) -> Tensor:
        return self.fusions[index](self.linears[index](features[index]))  # type: ignore[no-any-return]
