"""What every task shares: its backbone, images on the device, optimisation, running means, checkpoints."""

from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import LightningModule
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.axes import Axes
from torch import Tensor
from torch.optim import AdamW, Optimizer

from visiontasks.contracts import Backbone, Batch, UsageError
from visiontasks.layers.distributed import collected, mean_over_processes, rank, sum_over_processes, world_size
from visiontasks.layers.draws import key_of
from visiontasks.layers.finite import poisoned
from visiontasks.layers.sharding import shard
from visiontasks.tasks.metrics import Metrics, weighted_sum
from visiontasks.tasks.optimisation import MakeOptimizer, MakeSchedule, Pace, at_rates, cosine, parameter_groups

# Buffers that are the same in every process
CONSTANT = ("pixel_scale", "pixel_shift", "picture_scale", "picture_shift", "class_weights")
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601
Prediction = dict[str, Any]  # of one image, in plain numbers, strings and lists, so that it is a line of JSON


class Task(LightningModule):
    """One learning problem: a backbone and a head joined with a loss, metrics and an optimiser.

    A subclass states what annotations it needs, has `metrics` and, of more than one loss, their `loss_weights`, and
    implements `training_step`, `evaluation_step`, `predict_step`, `predictions`, `truths`, `errors` and `draw`.
    The backbone's weights lie under `backbone.` in every checkpoint.
    """

    needs: frozenset[str]
    wants: frozenset[str] = frozenset()  # annotations that it takes where the data have them
    metrics: Metrics
    loss_weights: dict[str, float]  # by the losses' names
    sees_all: ClassVar[bool] = False  # its batch norms want statistics over all processes
    shards: ClassVar[bool] = True  # its parts use their parameters within their forward alone, as sharding wants it
    otherwise: ClassVar[str] = ""  # what to type where the data lack what its head needs
    full_precision: ClassVar[bool] = False  # trainer.precision=auto is float32 for it
    steps_itself: ClassVar[bool] = False  # it has several optimisers, and accumulates and clips gradients itself
    panels: ClassVar[int] = 1  # pictures side by side that `draw` makes of one image
    unit: ClassVar[str] = "images"  # what the confusion matrix counts

    def __init__(
        self,
        *,
        backbone: Backbone,
        classes: tuple[str, ...],
        monitor: str,
        mode: str,
        optimizer: MakeOptimizer | None = None,
        scheduler: MakeSchedule | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.classes = tuple(classes)
        self.monitor = monitor
        self.mode = mode
        self.optimizer = optimizer or partial(AdamW, lr=1e-3, weight_decay=0.05)
        self.scheduler = scheduler or cosine
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.lr: float | None = None  # the learning-rate finder's place to write; None leaves the optimiser's own
        self.pace: dict[str, Pace] = {}  # of parameters by name; the others learn from the start at the full rate
        self.step_skipped = False  # the optimiser's last step was left out: its gradients were not finite
        self.config: dict[str, Any] = {}  # the composed config as plain containers, where there is one
        self.tables: dict[str, Tensor] = {}  # of the last evaluation, such as a confusion matrix, for the pictures
        self._watched: list[tuple[str, Tensor, Tensor]] = []  # the training figures of this batch
        self._running: dict[str, Tensor] = {}  # their sums and counts before it, (N, 2), by their N names in one
        self._unflushed = 0
        self._seed: int | None = None  # of what training draws; torch's own, as it is when a run starts
        mean, std = torch.tensor(backbone.mean), torch.tensor(backbone.std)
        self.pixel_scale: Tensor
        self.pixel_shift: Tensor
        self.register_buffer("pixel_scale", (1 / (255 * std)).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("pixel_shift", (-mean / std).view(1, -1, 1, 1), persistent=False)
        self._ddp_params_and_buffers_to_ignore = list(CONSTANT)  # else DDP would send them in every step

    @classmethod
    def required(cls, head: type) -> frozenset[str]:  # noqa: ARG003
        """The annotations that the task needs under a kind of head."""
        return cls.needs

    @classmethod
    def under(cls, head: type) -> "type[Task]":  # noqa: ARG003
        """The class that the task is of under a kind of head."""
        return cls

    def images(self, batch: Batch) -> Tensor:
        """The batch's uint8 images as the backbone wants them: float, normalised, in its channels and layout."""
        return self._scaled(batch["image"].float(), self.pixel_scale, self.pixel_shift)

    def _scaled(self, pixels: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """Pixels (B, C, H, W) times a scale plus a shift, in the backbone's channels and layout."""
        return self._laid_out(torch.addcmul(shift, self._in_channels(pixels), scale))

    def _laid_out(self, images: Tensor) -> Tensor:
        return images.to(self.dtype).contiguous(memory_format=self.memory_format)

    def _in_channels(self, pixels: Tensor) -> Tensor:
        found, wanted = pixels.shape[1], self.backbone.in_channels
        if found == wanted:
            return pixels
        if (found, wanted) == (3, 1):
            return (pixels * pixels.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(dim=1, keepdim=True)
        raise UsageError(f"The images have {found} channels and the backbone takes {wanted}: type in_channels={found}.")

    def configure_model(self) -> None:
        """Shards the parts over all processes where trainer=fsdp, whose weights have to be contiguous."""
        if self.device_mesh is not None:
            shard(self.to(memory_format=torch.contiguous_format), self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        rate = self.learning_rate()
        chosen = {} if rate is None else {"lr": rate}
        optimizer = at_rates(self.optimizer(parameter_groups(self, self.pace), **chosen))
        if self.device_mesh is not None and isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["fused"]:
            raise UsageError("Weights in shards have no fused SGD: type optimizer.fused=false.")
        schedule: Any = self.scheduler(optimizer, total_steps=int(self.trainer.estimated_stepping_batches))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Backpropagates; a loss that is not finite makes every gradient so, on all processes."""
        super().backward(loss, *args, gradient=poisoned(loss), **kwargs)

    def learning_rate(self) -> float | None:
        """What stands in the place of the optimiser's own learning rate; None: nothing."""
        return self.lr

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        """Makes what the step draws, such as dropout, a function of (seed, epoch, batch, process) and nothing else."""
        if self._seed is None:
            self._seed = torch.initial_seed()
        seed_generators(key_of(self._seed, self.current_epoch, batch_idx, self.global_rank), self.device)

    def resumable(self, batches: int) -> bool:
        """Whether after so many batches of an epoch nothing is under way that a checkpoint would not hold.

        What is accumulated of gradients is; a task that accumulates by itself says here when it does not.
        """
        return batches % self.trainer.accumulate_grad_batches == 0

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips as Lightning does, and also under fused optimisers, which only float16's loss scaling forbids."""
        plugin: Any = self.trainer.precision_plugin
        if type(plugin) is not MixedPrecision or not gradient_clip_val:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif plugin.scaler is None:
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
        elif optimizer.defaults.get("fused"):
            raise UsageError("A fused optimiser cannot clip gradients in 16-mixed: type optimizer.fused=false.")
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def evaluation_step(self, batch: Batch) -> Any:
        """Adds a batch to the metrics, and returns its raw predictions."""
        raise NotImplementedError

    def validation_step(self, batch: Batch, batch_idx: int) -> Any:  # noqa: ARG002
        return self.evaluation_step(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> Any:  # noqa: ARG002
        return self.evaluation_step(batch)

    def on_validation_epoch_end(self) -> None:
        self._evaluated("val")

    def on_test_epoch_end(self) -> None:
        self._evaluated("test")

    def _evaluated(self, stage: str) -> None:
        """Logs figures that are already over the whole data set and all processes, as `stage/name`."""
        figures, self.tables = self.metrics.compute()
        self.metrics.reset()
        for name, value in figures.items():
            value = value.to(self.device, torch.float32)
            self.log(f"{stage}/{name}", value, prog_bar=f"{stage}/{name}" == self.monitor)

    def mean_loss(self, terms: Tensor) -> Tensor:
        """The weighted sum of losses, each averaged over all processes; terms (L, 2) are their sums and counts."""
        return weighted_sum(mean_over_processes(terms[:, 0], terms[:, 1]), self.loss_weights)

    def watch_losses(self, loss: Tensor, terms: Tensor) -> None:
        """Watches the loss that is learnt and, where it has several terms (L, 2), each by itself."""
        self.watch("loss", loss, torch.ones_like(loss))
        for name, (total, count) in zip(self.loss_weights, terms, strict=True):
            if len(terms) > 1:
                self.watch(f"{name}_loss", total, count)

    def watch(self, name: str, total: Tensor, count: Tensor) -> None:
        """Adds to the running mean of a training figure, which is logged every trainer.log_every_n_steps batches."""
        self._watched.append((name, total.detach(), count.detach()))

    def _add_up(self) -> None:
        """Adds a batch's figures to the running ones, all of them at once."""
        if not self._watched:
            return
        names = ",".join(name for name, _, _ in self._watched)
        rows = torch.stack([value.float() for _, *pair in self._watched for value in pair]).view(-1, 2)  # (N, 2)
        self._watched.clear()
        known = self._running.get(names)
        self._running[names] = rows if known is None else known.to(rows.device).add_(rows)

    def _sums(self) -> dict[str, Tensor]:
        """The running figures by name, (2,) each: sum and count."""
        sums: dict[str, Tensor] = {}
        for names, rows in self._running.items():
            for name, row in zip(names.split(","), rows.to(self.device), strict=True):
                sums[name] = sums[name] + row if name in sums else row
        return sums

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ARG002
        self._add_up()
        self._unflushed += 1
        if self._unflushed >= max(1, self.trainer.log_every_n_steps):  # type: ignore[attr-defined]
            self._flush()

    def on_train_epoch_end(self) -> None:
        self._flush()

    def _flush(self) -> None:
        """Logs the running means with one all-reduce for all of them, and starts them anew."""
        self._add_up()
        running = self._sums()
        if not running:
            return
        sums = sum_over_processes(torch.stack(list(running.values())))  # (N, 2)
        means = (sums[:, 0] / sums[:, 1].clamp(min=1e-12)).tolist()
        values = {f"train/{name}": mean for name, mean in zip(running, means, strict=True)}
        values["train/lr"] = max(group["lr"] for optimizer in self._optimizers() for group in optimizer.param_groups)
        for logger in self.loggers:
            logger.log_metrics(values | {"epoch": self.current_epoch}, step=max(0, self.trainer.global_step - 1))
        self.log("loss", means[0], prog_bar=True, logger=False)
        self._running.clear()
        self._unflushed = 0

    def _optimizers(self) -> list[Optimizer]:
        return self.trainer.optimizers

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["classes"] = list(self.classes)
        checkpoint["config"] = self.config
        checkpoint["visiontasks_version"] = version("visiontasks")
        self._add_up()
        running = {names: rows.cpu() for names, rows in self._running.items()}
        checkpoint["running"] = {"means": collected(running), "batches": self._unflushed, "seed": self._seed}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Goes on with the running means, this process with its own where there are as many processes as before."""
        stored = checkpoint.get("running")
        if stored is None:
            return
        self._seed, self._unflushed = stored["seed"], stored["batches"]
        parts: list[dict[str, Tensor]] = stored["means"]
        if len(parts) == world_size():
            own = parts[rank()]
        else:
            own = {names: torch.stack([part[names] for part in parts]).mean(dim=0) for names in parts[0]}
        self._running = {names: rows.view(-1, 2) for names, rows in own.items()}

    def predictions(self, raw: Any) -> list[Prediction]:
        """One plain dictionary an image of what raw predictions say."""
        raise NotImplementedError

    def truths(self, batch: Batch) -> list[Prediction]:
        """The annotations of a batch in the words of `predictions`."""
        raise NotImplementedError

    def errors(self, raw: Any, batch: Batch) -> dict[str, Tensor]:
        """How wrong each image's prediction is in each respect, (B,): 0 where it is right, the more the worse.

        The worst of each are drawn, in a file of that name.
        """
        raise NotImplementedError

    def draw(self, axes: Axes, image: Tensor, prediction: Prediction, truth: Prediction | None) -> None:
        """Draws an image, uint8 (3, H, W), with its prediction and, where known, the truth."""
        raise NotImplementedError

    @property
    def confusion_classes(self) -> tuple[str, ...]:
        """The names along the confusion matrix."""
        return self.classes

    def legend(self) -> dict[str, tuple[float, ...]]:
        """The colours that stand for classes in what `draw` draws, red, green and blue in 0..1."""
        return {}

    def save(self, prediction: Prediction, folder: Path, stem: str) -> Prediction:  # noqa: ARG002
        """Writes what does not fit into a line of JSON to files in a folder, and returns the line."""
        return prediction

    def finish(self, lines: list[Prediction], folder: Path) -> None:
        """Writes what all lines of a prediction together make, such as a results file, to a folder."""

    def compile_parts(self) -> None:
        """Compiles the networks in place, so that no weight changes its name."""
        for part in self.children():
            if next(part.parameters(), None) is not None:
                part.compile()


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds torch's generators of the CPU and of a device; torch.manual_seed, for all, takes several times as long."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
