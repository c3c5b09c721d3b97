"""Spectral normalisation that leaves a network's weights, and so their names, where they are."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_NORMED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.Embedding)
_SETTLING = 15  # power iterations before the first use, as in torch


class SpectralNorm(nn.Module):
    """Weights of convolutions, linear layers and embeddings over their largest singular value.

    Miyato et al. 2018, arXiv 1802.05957. It keeps the singular vectors alone, one pair a weight, and makes one step of
    the power iteration in each call while it trains; the answer is for `torch.func.functional_call`.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.names = tuple(
            f"{prefix}.weight".lstrip(".")
            for prefix, layer in network.named_modules()
            if isinstance(layer, _NORMED) and layer.weight is not None
        )
        for name, weight in self._weights(network):
            rows = weight.detach().flatten(1)
            for place, size in zip(("left", "right"), rows.shape, strict=True):
                start = F.normalize(torch.randn(size, device=weight.device), dim=0)
                self.register_buffer(_key(name, place), start)
        self.settle(network)

    def forward(self, network: nn.Module) -> dict[str, Tensor]:
        """The normalised weights by name."""
        if self.training:
            self.iterate(network)
        return self.normalised(network)

    def normalised(self, network: nn.Module) -> dict[str, Tensor]:
        """The same without a step of the iteration."""
        with torch.autocast(next(self.buffers()).device.type, enabled=False):
            return {name: weight / self._largest(name, weight) for name, weight in self._weights(network)}

    def settle(self, network: nn.Module) -> None:
        """Finds the singular vectors of weights that have just arrived."""
        for _ in range(_SETTLING):
            self.iterate(network)

    @torch.no_grad()
    def iterate(self, network: nn.Module) -> None:
        """Makes one step of the power iteration for every weight."""
        with torch.autocast(next(self.buffers()).device.type, enabled=False):
            for name, weight in self._weights(network):
                rows = weight.flatten(1)
                left, right = self._pair(name)
                left.copy_(F.normalize(rows.mv(right), dim=0))
                right.copy_(F.normalize(rows.T.mv(left), dim=0))

    def _largest(self, name: str, weight: Tensor) -> Tensor:
        left, right = (vector.clone() for vector in self._pair(name))  # the next step writes over them
        return left.dot(weight.flatten(1).mv(right))

    def _pair(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(_key(name, "left")), self.get_buffer(_key(name, "right"))

    def _weights(self, network: nn.Module) -> Iterator[tuple[str, Tensor]]:
        for name in self.names:
            yield name, network.get_parameter(name)


def _key(name: str, place: str) -> str:
    """The name of a buffer, which may hold no dot."""
    return f"{name.replace('.', '/')}/{place}"
