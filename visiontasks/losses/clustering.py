"""SwAV: views of an image predict each other's prototypes, which Sinkhorn's algorithm hands out evenly."""

import torch
from torch import Tensor, nn

from visiontasks.layers.distributed import gather, rank
from visiontasks.layers.embeddings import in_full_precision, sharpen, unit
from visiontasks.losses.distillation import other_view_entropy


class Prototypes(nn.Module):
    """Cosines between embeddings and learnt prototypes.

    Caron et al. 2020, SwAV, arXiv 2006.09882. Shapes: (..., D) to (..., K). `weight` (K, D) is kept at length 1 by
    calling `normalise` after each optimiser step.
    """

    def __init__(self, dim: int, count: int = 3000) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(count, dim))
        self.normalise()

    def forward(self, embeddings: Tensor) -> Tensor:
        return unit(embeddings) @ self.weight.T

    @torch.no_grad()
    def normalise(self) -> None:
        """Scales each prototype to length 1."""
        self.weight.copy_(unit(self.weight))


@in_full_precision
def swav(
    scores: Tensor,
    *,
    assigned: int = 2,
    past: Tensor | None = None,
    temperature: float = 0.1,
    epsilon: float = 0.05,
    iterations: int = 3,
) -> Tensor:
    """The cross-entropy of each crop's scores against the codes that Sinkhorn gives other crops of the same image.

    Caron et al. 2020, SwAV, arXiv 2006.09882, over the global batch. Computes in float32 or better, whatever autocast
    says, and returns the mean over this process's images; processes hold equally many.
    Shapes: scores (S, B, K) of all crops, of which the first `assigned` get codes; past (assigned, Q, K), scores of
    queues that are the same on each process. Raises UsageError where temperature or epsilon is not more than 0, and
    where there is a single crop.
    """
    queues = [None] * assigned if past is None else past
    pairs = zip(scores[:assigned], queues, strict=True)
    codes = [sinkhorn(crop, past=queue, epsilon=epsilon, iterations=iterations) for crop, queue in pairs]
    return other_view_entropy(sharpen(scores, temperature), torch.stack(codes))


@torch.no_grad()
@in_full_precision
def sinkhorn(scores: Tensor, *, past: Tensor | None = None, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Probabilities of the prototypes for each image, every prototype being taken equally often in the global batch.

    Cuturi 2013, arXiv 1306.0895, on logarithms, without gradient. Shapes: scores (B, K); past (Q, K), further scores
    that are the same on each process; returns (B, K). Raises UsageError where epsilon is not more than 0.
    """
    everything = gather(scores)
    everything = everything if past is None else torch.cat((everything, past.to(scores.dtype)))  # (N + Q, K)
    logits = sharpen(everything, epsilon)
    for _ in range(iterations):
        logits = logits.log_softmax(dim=0)
        logits = logits.log_softmax(dim=1)
    return logits[rank() * len(scores) :][: len(scores)].exp()
