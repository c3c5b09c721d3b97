"""A copy of a network that follows it slowly and learns nothing by itself."""

import copy
import math

import torch
from torch import Tensor, nn

from visiontasks.contracts import Backbone
from visiontasks.heads.pretraining.method import Pyramid


class Teacher(nn.Module):
    """A copy of a backbone and a projector whose weights are a moving average of theirs.

    Tarvainen and Valpola 2017, arXiv 1703.01780; He et al. 2019, arXiv 1911.05722. Batch norms see the batch, as the
    student's do, and keep statistics of their own. Nothing in it requires a gradient.
    """

    def __init__(self, backbone: Backbone, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = copy.deepcopy(backbone)
        self.projector = copy.deepcopy(projector)
        self.requires_grad_(False)

    def forward(self, features: Pyramid) -> Tensor:
        return self.projector(features)  # type: ignore[no-any-return]

    @torch.no_grad()
    def follow(self, backbone: Backbone, projector: nn.Module, momentum: float) -> None:
        """Moves each weight towards the student's by 1 - momentum."""
        for own, other in ((self.backbone, backbone), (self.projector, projector)):
            torch._foreach_lerp_(list(own.parameters()), list(other.parameters()), 1 - momentum)

    def become(self, backbone: Backbone, projector: nn.Module) -> None:
        """Takes over all weights and statistics."""
        self.backbone.load_state_dict(backbone.state_dict())
        self.projector.load_state_dict(projector.state_dict())

    def share_mode(self, backbone: Backbone, projector: nn.Module) -> None:
        """Puts each layer into training or evaluation mode as the student's is: frozen ones stay in evaluation."""
        for own, other in ((self.backbone, backbone), (self.projector, projector)):
            for layer, like in zip(own.modules(), other.modules(), strict=True):
                layer.training = like.training


def rising(base: float, final: float, progress: float) -> float:
    """A momentum between base and final along half a cosine (Grill et al. 2020, BYOL, arXiv 2006.07733).

    progress is the share of the training that is behind.
    """
    return final - (final - base) * (math.cos(math.pi * min(1.0, progress)) + 1) / 2
