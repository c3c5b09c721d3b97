"""CIE Lab for batches on any device, and the colours of the sRGB gamut on a grid of a and b."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

_TO_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)  # D65, so that grey has neither a nor b
_KNEE = 6 / 29
REACH = 110  # of a and b from grey, beyond all of sRGB


def to_lab(images: Tensor) -> Tensor:
    """Lightness 0..100, a and b of sRGB images.

    IEC 61966-2-1 and CIE 15, white D65. Shapes: (..., 3, H, W) of values from 0 to 255; returns the same, float32.
    """
    shares = images.float() / 255
    linear = torch.where(shares > 0.04045, ((shares + 0.055) / 1.055) ** 2.4, shares / 12.92)
    x, y, z = (
        torch.where(part > _KNEE**3, part.clamp(min=_KNEE**3) ** (1 / 3), part / (3 * _KNEE**2) + 4 / 29)
        for part in (_mixed(linear, _TO_XYZ) / _column(_WHITE, linear)).unbind(-3)
    )  # (..., H, W)
    return torch.stack((116 * y - 16, 500 * (x - y), 200 * (y - z)), dim=-3)


def to_rgb(lab: Tensor) -> Tensor:
    """The inverse of `to_lab`, values from 0 to 255; colours outside sRGB are cut off."""
    lightness, a, b = lab.unbind(-3)
    y = (lightness + 16) / 116
    roots = torch.stack((y + a / 500, y, y - b / 200), dim=-3)
    parts = torch.where(roots > _KNEE, roots**3, 3 * _KNEE**2 * (roots - 4 / 29)) * _column(_WHITE, lab)
    back = torch.linalg.inv(torch.tensor(_TO_XYZ, dtype=torch.float64)).tolist()
    linear = _mixed(parts, back).clamp(0, 1)
    shares = torch.where(linear > 0.0031308, 1.055 * linear.clamp(min=0.0031308) ** (1 / 2.4) - 0.055, 12.92 * linear)
    return 255 * shares


def _mixed(images: Tensor, matrix: Sequence[Sequence[float]]) -> Tensor:
    """Each channel a sum of the others; not as a product of matrices, which autocast would round."""
    return torch.stack([(images * _column(row, images)).sum(dim=-3) for row in matrix], dim=-3)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return like.new_tensor(values).view(-1, 1, 1)


class ColourBins(nn.Module):
    """The points of a grid of a and b that lie nearest to some colour of sRGB, and shares of colours in them.

    Zhang, Isola and Efros 2016, arXiv 1603.08511, section 2.1.
    """

    centres: Tensor
    table: Tensor

    def __init__(self, *, grid: int = 10, neighbours: int = 5, sigma: float = 5.0) -> None:
        super().__init__()
        self.sigma = sigma
        centres, table = _bins(grid, neighbours)
        self.register_buffer("centres", centres, persistent=False)
        self.register_buffer("table", table, persistent=False)

    def encode(self, ab: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest bins of each colour, the nearest first, and its shares in them, by a Gaussian of the distance.

        Which are nearest is told after rounding to whole units. Shapes: (B, 2, h, w); returns (B, N, h, w) twice.
        """
        rounded = ab.round().long().clamp(-REACH, REACH) + REACH  # (B, 2, h, w)
        places = self.table[rounded[:, 0] * (2 * REACH + 1) + rounded[:, 1]]  # (B, h, w, N)
        far = (ab.permute(0, 2, 3, 1)[..., None, :] - self.centres[places]).square().sum(dim=-1)  # (B, h, w, N)
        shares = (-far / (2 * self.sigma**2)).softmax(dim=-1)
        return places.permute(0, 3, 1, 2), shares.permute(0, 3, 1, 2)

    def decode(self, logits: Tensor, *, temperature: float = 0.38) -> Tensor:
        """The annealed mean of what is said of each pixel, section 2.3. Shapes: (B, K, h, w) to (B, 2, h, w)."""
        shares = (logits.float() / temperature).softmax(dim=1)
        return (shares[:, :, None] * self.centres[:, :, None, None]).sum(dim=1)


@lru_cache(maxsize=4)
def _bins(grid: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """The bins (K, 2), and which are nearest to each whole a and b, (221 * 221, N)."""
    with torch.device("cpu"):
        centres = _gamut(grid)
        units = torch.cartesian_prod(*[torch.arange(-REACH, REACH + 1).float()] * 2)  # (221 * 221, 2)
        far = (units[:, None] - centres).square().sum(dim=2)  # (221 * 221, K)
        return centres, far.sort(dim=1, stable=True).indices[:, :neighbours].clone()


def _gamut(grid: int) -> Tensor:
    """The grid points (K, 2) nearest to a colour on the surface of sRGB's cube, which reaches as far as all of it."""
    steps = torch.arange(256.0)
    plane = torch.cartesian_prod(steps, steps)  # (65536, 2)
    faces = []
    for axis, end in product(range(3), (0.0, 255.0)):
        columns = list(plane.unbind(1))
        columns.insert(axis, torch.full((len(plane),), end))
        faces.append(torch.stack(columns))
    colours = to_lab(torch.cat(faces, dim=1)[:, :, None])[1:, :, 0]  # (2, 6 * 65536)
    points = np.unique((colours / grid).round().int().T.numpy(), axis=0)  # (K, 2)
    return torch.from_numpy(points * grid).float()
