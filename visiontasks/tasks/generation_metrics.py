"""Figures of generated images beside as many real ones, the same on any number of processes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visiontasks.contracts import UsageError
from visiontasks.layers.distributed import in_order
from visiontasks.tasks.extractors import Extractor, MakeExtractor, RandomFeatures
from visiontasks.tasks.fidelity import (
    effective_number,
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbourhoods,
)
from visiontasks.tasks.metrics import Figures, Metrics

SUBSETS = 10  # of KID, of 1000 images each
SIDE = 8  # of the small images that are compared as they are


class SampleQuality(Metrics):
    """Compares generated with real images in the features of one network, whose name each figure carries.

    Of the images whose index is below `samples` it measures fid, kid, vendi, inception_score where the network knows
    classes, and with `neighbours` precision, recall, density and coverage. What is monitored needs a name that does not
    change with the network: fid_NAME is logged as fid, too; diversity needs no network. The network is made by
    `prepare`, or when it is first used, and is no part of the module: no checkpoint has it, and no optimiser finds it.
    Raises UsageError where samples or neighbours are no numbers of images.
    """

    def __init__(self, make: MakeExtractor = RandomFeatures, *, samples: int = 2048, neighbours: int = 5) -> None:
        super().__init__()
        if samples < 2 or neighbours < 0:
            raise UsageError(
                f"task.measured={samples} and task.neighbours={neighbours}: give 2 images or more, and 0 or more."
            )
        self.samples = samples
        self.neighbours = neighbours
        self._make = make
        self._made: tuple[Extractor, ...] = ()  # in a tuple, so that it is no submodule
        self._rows: list[tuple[Tensor, ...]] = []
        self._device = torch.device("cpu")  # where figures are computed
        self._compared = 0

    def prepare(self) -> Extractor:
        """The network whose features are compared; raises UsageError where it cannot be had."""
        if not self._made:
            self._made = (self._make().requires_grad_(False).eval(),)
        return self._made[0]

    def wanted(self, index: Tensor) -> Tensor:
        """The rows of a batch that are measured, (b,), by their positions in the data, (B,)."""
        return (index < self.samples).nonzero()[:, 0]

    def update(self, real: Tensor, generated: Tensor, index: Tensor) -> None:
        """Adds images and as many generated ones, uint8 (B, 3, H, W) both, at positions (B,) in the data."""
        rows = self.wanted(index)
        if len(rows):
            real, generated = real[rows], generated[rows]
            extractor = self.prepare().to(real.device)
            (features, _), (others, logits) = extractor(real), extractor(generated)
            row = (features, index[rows], others, small(real), small(generated), *([] if logits is None else [logits]))
            self._rows.append(tuple(column.cpu() for column in row))
            self._device = real.device if real.is_cuda else self._device

    def compute(self) -> tuple[Figures, Figures]:
        """The figures over the images of all processes, and no tables."""
        real, index, generated, small_real, small_generated, *logits = in_order(self._rows, self._device)
        self._compared = len(index)
        figures = feature_figures(real, generated, neighbours=self.neighbours)
        figures |= {"inception_score": inception_score(logits[0])} if logits else {}
        named = {f"{name}_{self.prepare().name}": value for name, value in figures.items()}
        return {"fid": figures["fid"], "diversity": diversity(small_real, small_generated), **named}, {}

    def reset(self) -> None:
        super().reset()
        self._rows = []

    def facts(self) -> dict[str, Any]:
        """What the figures are measured with."""
        extractor = self.prepare()
        return {
            "extractor": extractor.name,
            "extractor_source": extractor.source,
            "extractor_digest": extractor.digest(),
            "samples_compared": self._compared,
        }

    def notes(self) -> list[str]:
        """Lines for the person who starts the run."""
        extractor = self.prepare()
        known = f"{extractor.name} ({extractor.source}, {extractor.digest()})"
        counted = f"figures    of at most {self.samples:,} images and as many samples, in the features of {known}"
        lacking = f"           no inception_score: {extractor.name} knows no classes"
        return [counted] if extractor.knows_classes else [counted, lacking]


def feature_figures(real: Tensor, generated: Tensor, *, neighbours: int) -> Figures:
    """fid, kid, vendi and, of `neighbours` above 0, precision, recall, density and coverage.

    Shapes: (N, D) and (M, D), 2 images or more each.
    """
    figures = {
        "fid": frechet_distance(real, generated),
        "kid": kernel_distance(real, generated, subsets=SUBSETS)[0],
        "vendi": vendi(real, generated),
    }
    return figures | (neighbourhoods(real, generated, neighbours=neighbours) if neighbours else {})


def vendi(real: Tensor, generated: Tensor) -> Tensor:
    """The Vendi score of generated features over that of real ones, both as they differ from the mean real one.

    1 is as diverse as the data, near 0 the same image over and over. Shapes: (N, D) and (M, D); returns a scalar.
    """
    mean = real.double().mean(dim=0)
    of_real, of_generated = (effective_number(rows.double() - mean) for rows in (real, generated))
    return of_generated / of_real


def small(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) uint8 as the means of SIDE x SIDE regions in 0..1, (B, 3 * SIDE * SIDE) float32."""
    return F.adaptive_avg_pool2d(images.float() / 255, SIDE).flatten(1)


def diversity(real: Tensor, generated: Tensor) -> Tensor:
    """The standard deviation of small generated images over that of real ones: 0 is always the same picture.

    Shapes: (N, D) and (M, D); returns a scalar, 0 where the real images do not differ.
    """
    spread, found = (rows.double().var(dim=0, correction=0).sum().sqrt() for rows in (real, generated))
    share: Tensor = found / spread.where(spread > 0, torch.inf)
    return share
