"""Generation by densities: how probable pictures are is learnt, by one optimiser, and measured."""

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from matplotlib.axes import Axes
from torch import Tensor, nn

from visiontasks.contracts import Backbone, Batch, UsageError
from visiontasks.heads.generation.density import Density, MakeDensity
from visiontasks.layers.distributed import mean_over_processes
from visiontasks.layers.draws import draws, image_keys
from visiontasks.layers.modes import at_rest
from visiontasks.losses.likelihood import bits_per_dim
from visiontasks.tasks.base import Prediction
from visiontasks.tasks.extractors import MakeExtractor, RandomFeatures
from visiontasks.tasks.generation_metrics import SampleQuality
from visiontasks.tasks.generative import EVALUATION, Generative, as_bytes, normal
from visiontasks.tasks.metrics import Figures, Sums


class Likelihood(Generative):
    """Learns to make pictures by making the data's likely: what task=generation is under a head that is a density.

    The loss is in bits a pixel and channel. What is drawn for an image is a function of (seed, epoch, index).

    Args:
        image_size: of the pictures, one side or height and width.
        extractor, measured, neighbours: in what features, of how many images and with what neighbourhoods samples are
            compared with real images, see SampleQuality.
        seed: keys what is drawn.
        generator_lr, ema: of a game, and refused.
        accumulate_grad_batches, gradient_clip_val: left to lightning.Trainer.

    Raises UsageError where the head wants a backbone that sees only what precedes a pixel, and this one sees all.
    """

    head: Density
    metrics: "LikelihoodFigures"

    def __init__(
        self,
        *,
        backbone: Backbone,
        image_size: int | Iterable[int],
        head: MakeDensity,
        classes: tuple[str, ...] = (),
        generator_lr: float | None = None,
        ema: float = 0.0,
        accumulate_grad_batches: int = 1,  # noqa: ARG002
        gradient_clip_val: float | None = None,  # noqa: ARG002
        extractor: MakeExtractor = RandomFeatures,
        measured: int = 2048,
        neighbours: int = 5,
        seed: int = 0,
        monitor: str = "val/bits_per_dim",
        mode: str = "min",
        **shared: Any,
    ) -> None:
        _check_no_game(generator_lr, ema)
        _check_causal(head, backbone)
        shared |= {"monitor": monitor, "mode": mode}
        super().__init__(backbone=backbone, classes=classes, head=head, image_size=image_size, seed=seed, **shared)
        self.bits = partial(bits_per_dim, dimensions=self.channels * self.image_size[0] * self.image_size[1])
        self.metrics = LikelihoodFigures(
            self.head, bits=self.bits, make=extractor, samples=measured, neighbours=neighbours
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        """The backbone's pyramid of normalised images."""
        return self.backbone(images)  # type: ignore[no-any-return]

    def surprise(self, batch: Batch, *, epoch: int) -> Tensor:
        """How surprising each image is, in parts (B, parts), nats."""
        pixels = self._seen(batch["image"])
        keys = image_keys(batch["index"], seed=self.seed, epoch=epoch)
        noise = normal(draws(keys, self.head.drawn))
        features = self(self._normalised(pixels))
        return self.head.surprise(features, pixels, noise, self.labels_of(batch))

    def _seen(self, images: Tensor) -> Tensor:
        return self.head.seen(self._in_channels(images.float()).round())

    def _normalised(self, pixels: Tensor) -> Tensor:
        return self.images({"image": pixels})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        parts = self.surprise(batch, epoch=self.current_epoch)  # (B, parts)
        count = parts.new_tensor(float(len(parts)))
        loss = mean_over_processes(self.bits((parts * parts.new_tensor(self.head.weights)).sum()), count)
        self.watch("loss", loss, torch.ones_like(loss))
        self.watch("bits_per_dim", self.bits(parts.sum()), count)
        for name, column in zip(self.head.parts, parts.unbind(1), strict=True):
            if len(self.head.parts) > 1:
                self.watch(name, column.sum(), count)
        return loss

    def evaluation_step(self, batch: Batch) -> Tensor:
        """The bits a dimension of each image, (B,); the metrics see as many pictures of the same classes."""
        self.compare(batch, self.labels_of(batch))
        parts = self.surprise(batch, epoch=EVALUATION)
        self.metrics.measure(parts)
        return self.bits(parts.sum(dim=1))

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.bits(self.surprise(batch, epoch=EVALUATION).sum(dim=1))

    def paint(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """What the density makes of noise."""
        with at_rest(self):
            return self.head.pictures(latents, labels, backbone=self.backbone, normalised=self._normalised)

    def reconstruct(self, images: Tensor) -> Tensor | None:
        with at_rest(self):
            made = self.head.reconstructions(self(self._normalised(self._seen(images))))
        return None if made is None else as_bytes(made)

    def compile_parts(self) -> None:
        for part in (self.backbone, *self.head.children()):
            for network in part if isinstance(part, nn.ModuleList) else (part,):
                network.compile()

    def predictions(self, raw: Tensor) -> list[Prediction]:
        return [{"bits_per_dim": round(bits, 6)} for bits in raw.float().tolist()]

    def errors(self, raw: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        return {"surprising": raw}

    def draw(self, axes: Axes, image: Tensor, prediction: Prediction, truth: Prediction | None) -> None:  # noqa: ARG002
        """Draws the image with its bits a dimension: the more, the less likely."""
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(f"{prediction['bits_per_dim']:.2f} bits")


class LikelihoodFigures(SampleQuality):
    """How likely images are, beside what SampleQuality measures of samples.

    bits_per_dim, what is learnt as loss, the mean log-likelihood or its bound in nats an image under the density's word
    for it and, of several, each part of the surprise.
    """

    def __init__(self, head: Density, *, bits: Any, make: MakeExtractor, samples: int, neighbours: int) -> None:
        super().__init__(make, samples=samples, neighbours=neighbours)
        self.sums = Sums(dict.fromkeys(head.parts, 1.0))
        self._word, self._weights, self._bits, self._known = head.word, head.weights, bits, head.facts()

    def measure(self, parts: Tensor) -> None:
        """Adds the parts of a batch's surprise, (B, parts) nats."""
        self.sums.update(torch.stack((parts.sum(dim=0), torch.full_like(parts[0], len(parts))), dim=1))

    def compute(self) -> tuple[Figures, Figures]:
        found = self.sums.compute()
        total = found["loss"]
        parts = {name: found.get(f"{name}_loss", total) for name in self.sums.weights}
        learnt = torch.stack([weight * mean for weight, mean in zip(self._weights, parts.values(), strict=True)]).sum()
        figures = {"loss": self._bits(learnt), "bits_per_dim": self._bits(total), self._word: -total}
        figures |= parts if len(parts) > 1 else {}
        compared, tables = super().compute()
        return figures | compared, tables

    def facts(self) -> dict[str, Any]:
        return super().facts() | self._known


def _check_no_game(generator_lr: float | None, ema: float) -> None:
    if generator_lr is not None:
        raise UsageError(
            f"task.generator_lr={generator_lr} is of a game, and this head has one optimiser: type optimizer.lr=."
        )
    if ema:
        raise UsageError(f"task.ema={ema} is of a game's generator: type callbacks.ema.decay={ema}, of all weights.")


def _check_causal(head: Any, backbone: Backbone) -> None:
    kind = getattr(head, "func", head)
    if kind.causal and not getattr(backbone, "causal", False):
        raise UsageError(
            f"{kind.__name__} learns each pixel from those before it, and {type(backbone).__name__} sees them all: "
            "leave out backbone=, so that its own layers are the backbone."
        )
