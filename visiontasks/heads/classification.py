"""Heads that turn the coarsest level of a pyramid into class scores."""

from typing import ClassVar

from torch import Tensor, nn

from visiontasks.contracts import Level


class Linear(nn.Module):
    """Global average pooling, dropout and one linear layer.

    Shapes: a pyramid whose last map is (B, C, H, W) to logits (B, num_classes).
    """

    serves: ClassVar[str] = "classification"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(levels[-1].channels, num_classes)

    def forward(self, features: list[Tensor]) -> Tensor:
        pooled = features[-1].mean(dim=(2, 3))  # (B, C)
        return self.classifier(self.dropout(pooled))  # type: ignore[no-any-return]  # (B, K)


class MLP(nn.Module):
    """Global average pooling, one hidden layer with ReLU and dropout, and a linear layer.

    Shapes: a pyramid whose last map is (B, C, H, W) to logits (B, num_classes).
    """

    serves: ClassVar[str] = "classification"

    def __init__(self, *, levels: tuple[Level, ...], num_classes: int, hidden: int = 512, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(levels[-1].channels, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        pooled = features[-1].mean(dim=(2, 3))  # (B, C)
        return self.layers(pooled)  # type: ignore[no-any-return]  # (B, K)


class VGG(nn.Module):
    """The two hidden layers of 4096 units over a 7 x 7 grid (Simonyan and Zisserman 2014, arXiv 1409.1556).

    Shapes: a pyramid whose last map is (B, C, H, W) to logits (B, num_classes); other grids are pooled or repeated
    to grid x grid.
    """

    serves: ClassVar[str] = "classification"

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        hidden: int = 4096,
        grid: int = 7,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.layers = nn.Sequential(
            nn.Linear(levels[-1].channels * grid**2, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Linear(hidden, num_classes),
        )

    def forward(self, features: list[Tensor]) -> Tensor:
        cells = self.pool(features[-1]).flatten(1)  # (B, C * grid * grid)
        return self.layers(cells)  # type: ignore[no-any-return]  # (B, K)
