"""Pretraining: a backbone learns from images alone."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from matplotlib.axes import Axes
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from visiontasks.contracts import Backbone, Batch
from visiontasks.heads.pretraining.method import MakeMethod, Pyramid, pooled
from visiontasks.heads.pretraining.simclr import SimCLR
from visiontasks.heads.pretraining.teacher import Teacher, rising
from visiontasks.layers.casting import cast_once
from visiontasks.layers.distributed import alone, collected
from visiontasks.layers.draws import image_keys
from visiontasks.tasks.base import Prediction, Task
from visiontasks.tasks.collapse import collapse_gauges
from visiontasks.tasks.metrics import Figures, Metrics, Sums

GAUGED = 2048  # validation images, the first ones, that the gauges of collapse look at
_EVALUATION = -1  # the epoch to which the draws of an evaluation belong


class Pretraining(Task):
    """Learns without labels, by the method that its head is; the backbone is what is wanted.

    reference_batch is the number of images of a step that the optimiser's learning rate is meant for: it is scaled in
    proportion to the images of a step over all processes and accumulated batches (Goyal et al. 2017, arXiv
    1706.02677); None leaves it. final_weight_decay is what the optimiser's weight decay changes to along half a cosine
    (Caron et al. 2021, arXiv 2104.14294). checkpointing computes each view's activations again in the backward pass
    instead of keeping them (Chen et al. 2016, arXiv 1604.06174). seed keys what a method draws for each image.
    The teacher of a method that has one lies under `teacher.`, and moves after each step of the optimiser.
    An evaluation measures val/loss on views that are the same in every epoch, in batches of each process by itself,
    and gauges of collapse of the backbone's pooled features of the first GAUGED images over all processes.
    """

    needs: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset({"label"})
    sees_all: ClassVar[bool] = True
    shards: ClassVar[bool] = False  # teachers and prototypes are used outside a forward
    panels: ClassVar[int] = 3  # of most methods: the image and two views
    metrics: "Gauges"

    def __init__(
        self,
        *,
        backbone: Backbone,
        classes: tuple[str, ...] = (),
        head: MakeMethod = SimCLR,
        reference_batch: int | None = None,
        final_weight_decay: float | None = None,
        checkpointing: bool = False,
        seed: int = 0,
        monitor: str = "val/loss",
        mode: str = "min",
        **shared: Any,
    ) -> None:
        super().__init__(backbone=backbone, classes=classes, monitor=monitor, mode=mode, **shared)
        self.head = head(levels=backbone.levels)
        self.teacher = None if self.head.momentum is None else Teacher(backbone, self.head.projector)
        self.reference_batch = reference_batch
        self.final_weight_decay = final_weight_decay
        self.checkpointing = checkpointing
        self.seed = seed
        self.metrics = Gauges(self.head.figures)

    def features(self, images: Tensor) -> Tensor:
        """The backbone's answer for normalised images, pooled: what is transferred, and probed. Shapes: (B, C)."""
        return pooled(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        self.head.progress = self._progress()
        outputs, targets = self._said(batch, epoch=self.current_epoch)
        loss = self.head.loss(outputs, targets)
        with torch.no_grad():
            self.head.observe(outputs, targets)
        self.watch("loss", loss, torch.ones_like(loss))
        return loss

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        return self.features(self.images(batch))

    def evaluation_step(self, batch: Batch) -> Tensor:
        """The pooled features of each image, (B, C)."""
        features = self.features(self.images(batch))
        with alone():
            outputs, targets = self._said(batch, epoch=_EVALUATION)
            if len(features) > 1:  # one image alone has nothing to be compared with
                loss = self.head.loss(outputs, targets).detach()
                self.metrics.update(loss, self.head.measure(outputs, targets), len(features))
        first = self.features(self.images({"image": batch["views"][0]}))
        self.metrics.gauge(features, first, batch["index"])
        return features

    def _said(self, batch: Batch, *, epoch: int) -> tuple[list[Tensor], Any]:
        """What the student says of each input, and the targets."""
        views = self._views(batch)
        keys = image_keys(batch["index"], seed=self.seed, epoch=epoch)
        pixels, targets = self.head.prepare(views, keys)
        inputs = [self.images({"image": image}) for image in pixels]
        with cast_once(self.device.type):
            outputs = self._answers(self.backbone, self.head, inputs[self.head.student_views])
        if self.teacher is None:
            return outputs, targets
        self.teacher.share_mode(self.backbone, self.head.projector)
        with torch.no_grad():
            return outputs, self._answers(self.teacher.backbone, self.teacher, inputs[self.head.teacher_views])

    def _views(self, batch: Batch) -> list[Tensor]:
        views: list[Tensor] = batch.get("views", [])
        self.head.check(len(views))
        return views

    def _answers(self, backbone: nn.Module, head: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
        """What a head says of each input, (B, ...) each."""
        if not self.head.together:
            return [head(self._seen(backbone, images)) for images in inputs]
        maps = [
            pooled(self._seen(backbone, torch.cat(list(same))))[:, :, None, None]  # (views * B, C, 1, 1)
            for _, same in groupby(inputs, key=lambda images: images.shape)
        ]
        return list(head([torch.cat(maps)]).chunk(len(inputs)))

    def _seen(self, backbone: nn.Module, images: Tensor) -> Pyramid:
        if self.checkpointing and torch.is_grad_enabled():
            contexts = partial(_recomputing, backbone)
            features: Pyramid = checkpoint(backbone, images, use_reentrant=False, context_fn=contexts)
            return features
        return backbone(images)  # type: ignore[no-any-return]

    def learning_rate(self) -> float | None:
        """The one that was found, else the optimiser's own in proportion to the images of a step."""
        if self.lr is not None or self.reference_batch is None:
            return self.lr
        own: float = cast(partial[Optimizer], self.optimizer).keywords["lr"]
        return own * self._images_a_step() / self.reference_batch

    def _images_a_step(self) -> int:
        data: Any = getattr(self.trainer, "datamodule")  # noqa: B009
        return int(data.batch_size * self.trainer.world_size * self.trainer.accumulate_grad_batches)

    def on_fit_start(self) -> None:
        """Says what the learning rate has become, and what accumulation does not enlarge."""
        if self.trainer.is_global_zero:
            print("".join(f"{line}\n" for line in self.notes()), end="", flush=True)

    def notes(self) -> list[str]:
        """Lines for the person who starts the run."""
        lines, accumulated = [], self.trainer.accumulate_grad_batches
        if self.reference_batch is not None and self.lr is None:
            factor = f"{self._images_a_step()} images a step / {self.reference_batch}"
            lines.append(f"rate       {self.learning_rate():.4g}: optimizer.lr x {factor}")
        if accumulated > 1 and self.head.in_batch:
            compared = (
                f"{type(self.head).__name__} compares {self._images_a_step() // accumulated} images with each other"
            )
            lines.append(f"accumulate {compared}, however many batches are accumulated")
        return lines

    def on_train_start(self) -> None:
        if self.teacher is not None and self.global_step == 0:
            self.teacher.become(self.backbone, self.head.projector)

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Takes a step; then, unless it was left out, the teacher follows."""
        progress = self._progress()
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if not self.step_skipped:
            self.after_step(progress)

    def after_step(self, progress: float) -> None:
        """Lets the method and its teacher follow a step of the optimiser, before which so much was behind."""
        self.head.after_step()
        if self.teacher is not None and self.head.momentum is not None:
            momentum = rising(self.head.momentum, self.head.final_momentum, progress)
            self.teacher.follow(self.backbone, self.head.projector, momentum)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.head.before_step()
        if self.final_weight_decay is not None:
            set_weight_decay(optimizer, self.final_weight_decay, self._progress())

    def _progress(self) -> float:
        """The share of the optimiser's steps that is behind; 0 without a trainer."""
        if self._trainer is None:
            return 0.0
        return self.global_step / max(1.0, self.trainer.estimated_stepping_batches)

    def predictions(self, raw: Tensor) -> list[Prediction]:
        return [{"embedding": [round(value, 6) for value in row]} for row in raw.float().tolist()]

    def truths(self, batch: Batch) -> list[Prediction]:
        views = [list(same) for same in zip(*(view.cpu() for view in batch["views"]), strict=True)]
        return [{"views": each, "index": index} for each, index in zip(views, batch["index"].tolist(), strict=True)]

    def errors(self, raw: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """None: no embedding is wrong by itself."""
        return {}

    def draw(self, axes: Axes, image: Tensor, prediction: Prediction, truth: Prediction | None) -> None:  # noqa: ARG002
        """Draws the image and, to its right, the views of it, or where the method shows more, what it answers."""
        shown, title = ([], "") if truth is None else (truth["views"], "")
        if truth is not None and self.head.pictured:
            shown, title = self._answered(**truth)
        axes.imshow(side_by_side([each.permute(1, 2, 0).numpy() for each in (image, *shown)]))
        axes.set_title(title)

    @torch.no_grad()
    def _answered(self, views: list[Tensor], index: int) -> tuple[list[Tensor], str]:
        """What the method shows of one image as an evaluation sees it, uint8 (3, h, w) each, and a title."""
        keys = image_keys(torch.tensor([index], device=self.device), seed=self.seed, epoch=_EVALUATION)
        pixels, targets = self.head.prepare([view[None].to(self.device) for view in views], keys)
        outputs = self._answers(self.backbone, self.head, [self.images({"image": image}) for image in pixels])
        shown, title = self.head.picture(pixels, outputs, targets)
        return [image.clamp(0, 255).round().byte().cpu() for image in shown], title

    def finish(self, lines: list[Prediction], folder: Path) -> None:
        """Writes embeddings.npy, (N, C) float32, a row for each line of predictions.jsonl that has one, in order."""
        rows = [line["embedding"] for line in lines if "embedding" in line]
        np.save(folder / "embeddings.npy", np.array(rows, np.float32).reshape(len(rows), -1))


class Gauges(Metrics):
    """The loss, what the method measures, and gauges of collapse over the first images of the data set."""

    def __init__(self, figures: tuple[str, ...]) -> None:
        super().__init__()
        self.sums = Sums(dict.fromkeys(("loss", *figures), 1.0))
        self.rows: list[Tensor] = []

    def update(self, loss: Tensor, measured: Tensor, images: int) -> None:
        """Adds a batch: the mean of its loss, and sums and counts (F, 2) of the method's figures."""
        own = torch.stack((loss * images, loss.new_tensor(images)))  # (2,)
        self.sums.update(torch.cat((own[None], measured.to(own))))

    def gauge(self, features: Tensor, views: Tensor, index: Tensor) -> None:
        """Adds features of images and of a view of each, (B, C) both."""
        pairs = torch.stack((features, views), dim=1)[index < GAUGED]  # (b, 2, C)
        self.rows.append(pairs.detach().float().cpu())

    def compute(self) -> tuple[Figures, Figures]:
        """The figures by name, and no tables."""
        means = self.sums.compute()
        figures = {name: means.get(f"{name}_loss", means["loss"]) for name in self.sums.weights}
        rows = [part for parts in collected(self.rows) for part in parts]
        if sum(map(len, rows)) < 2:
            return figures, {}
        with alone():
            return figures | collapse_gauges(*torch.cat(rows).unbind(1)), {}

    def reset(self) -> None:
        super().reset()
        self.rows = []


def _recomputing(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """The contexts of the first forward pass and of the one that repeats it."""
    return nullcontext(), statistics_kept(module)


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Within it forward passes leave the running statistics of the batch norms as they were."""
    buffers = [buffer for layer in module.modules() if isinstance(layer, _BatchNorm) for buffer in layer.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)


def set_weight_decay(optimizer: Optimizer, final: float, progress: float) -> None:
    """Moves the weight decay of weights, not that of norms and biases, along half a cosine from its first value."""
    for group in optimizer.param_groups:
        if any(parameter.ndim > 1 for parameter in group["params"]):
            group["weight_decay"] = rising(
                group.setdefault("initial_weight_decay", group["weight_decay"]), final, progress
            )


def side_by_side(images: list[NDArray[np.uint8]], gap: int = 2) -> NDArray[np.uint8]:
    """Images (h, w, 3) of any size from left to right on white, (H, W, 3)."""
    height, width = max(map(len, images)), sum(image.shape[1] + gap for image in images) - gap
    sheet = np.full((height, width, 3), 255, np.uint8)
    left = 0
    for image in images:
        sheet[: len(image), left : left + image.shape[1]] = image
        left += image.shape[1] + gap
    return sheet
