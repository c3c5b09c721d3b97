"""Generation: a backbone is the critic of a generator that learns to make pictures like the data's."""

import copy
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from matplotlib.axes import Axes
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_

from visiontasks.contracts import Backbone, Batch, UsageError
from visiontasks.heads.generation.density import Density
from visiontasks.heads.generation.gan import MakeGAN
from visiontasks.layers import diffaugment as augment
from visiontasks.layers.batch_norm import in_parts, settle, values_normed
from visiontasks.layers.casting import cast_once
from visiontasks.layers.distributed import average_over_processes, mean_over_processes
from visiontasks.layers.draws import draws, image_keys
from visiontasks.layers.modes import at_rest
from visiontasks.layers.spectral import SpectralNorm
from visiontasks.losses.adversarial import OBJECTIVES, gradient_penalty, r1
from visiontasks.tasks.base import Prediction, Task
from visiontasks.tasks.extractors import MakeExtractor, RandomFeatures
from visiontasks.tasks.generation_metrics import SampleQuality
from visiontasks.tasks.generative import Generative, normal, rgb
from visiontasks.tasks.likelihood import Likelihood
from visiontasks.tasks.optimisation import at_rates, joined, parameter_groups

SETTLING = 16  # pictures of noise that batch norms settle on
LOUD = (1, 10, 100, 1000)  # steps left out, of which the person is told
Weights = dict[str, Tensor]  # by name in a network; what is not named is the network's own


class Generation(Generative):
    """Learns to make pictures: a generator against a critic, which is the backbone under a head with one output.

    A step is one of the critic, on accumulate_grad_batches batches; every head.critic_steps-th is followed by one of
    the generator, on as much noise. `trainer.global_step` counts steps. What is drawn for an image is a function of
    (seed, epoch, index). The gradients are averaged over processes once a step, and a step whose losses or gradients
    are not finite is left out by all of them.

    Args:
        image_size: of the pictures, one side or height and width.
        generator_lr: the generator's learning rate; None for the critic's (two time-scales: Heusel et al. 2017, arXiv
            1706.08500).
        ema: the decay of the moving average of the generator that samples come from; it starts lower (Karras et al.
            2017, arXiv 1710.10196; Tensorflow's ramp (1 + t) / (10 + t)).
        accumulate_grad_batches, gradient_clip_val: as of lightning.Trainer, which leaves both to a task with two
            optimisers.
        extractor, measured, neighbours: in what features, of how many images and with what neighbourhoods samples are
            compared with real images, see SampleQuality.
        seed: keys what is drawn.
    """

    full_precision: ClassVar[bool] = True  # the game goes worse in bfloat16, see docs/generation.md
    steps_itself: ClassVar[bool] = True

    def __init__(
        self,
        *,
        backbone: Backbone,
        image_size: int | Iterable[int],
        head: MakeGAN,
        classes: tuple[str, ...] = (),
        generator_lr: float | None = None,
        ema: float = 0.999,
        accumulate_grad_batches: int = 1,
        gradient_clip_val: float | None = None,
        extractor: MakeExtractor = RandomFeatures,
        measured: int = 2048,
        neighbours: int = 5,
        seed: int = 0,
        monitor: str = "val/fid",
        mode: str = "min",
        **shared: Any,
    ) -> None:
        shared |= {"monitor": monitor, "mode": mode}
        super().__init__(backbone=backbone, classes=classes, head=head, image_size=image_size, seed=seed, **shared)
        self.automatic_optimization = False
        self.average = copy.deepcopy(self.head.generator).requires_grad_(False)
        self.spectral = nn.ModuleDict()
        if self.head.spectral_norm:
            self.spectral.update({"backbone": SpectralNorm(backbone), "critic": SpectralNorm(self.head.critic)})
        if self.judges_alone:
            self._settle()
        self._centred = set(backbone.mean) == set(backbone.std) == {0.5}  # the backbone takes -1..1
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (backbone.mean, backbone.std))
        self.picture_scale: Tensor
        self.picture_shift: Tensor
        self.register_buffer("picture_scale", 0.5 / std, persistent=False)
        self.register_buffer("picture_shift", (0.5 - mean) / std, persistent=False)
        self.objective = OBJECTIVES[self.head.objective]
        self.generator_lr = generator_lr
        self.ema = ema
        self.accumulate_grad_batches = accumulate_grad_batches
        self.gradient_clip_val = gradient_clip_val
        self.metrics = SampleQuality(extractor, samples=measured, neighbours=neighbours)
        self.left_out = 0  # steps that were not finite
        self._waiting: list[Drawn] = []  # of the batches since the last step
        self._losses: list[Tensor] = []
        self._judging = 0  # weights of the critic
        self._norms: list[_BatchNorm] = []  # of the critic, that learn
        self._normed: int | None = None  # values that they are given of an image; None until training starts
        self._moving: list[Tensor] = []  # statistics of batch norms
        self._followed: tuple[list[Tensor], list[Tensor]] = ([], [])  # the averaged generator's and the generator's
        self._before: list[Tensor] = []  # what they were before the step
        self.register_state_dict_post_hook(_bake)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_unbake)  # type: ignore[no-untyped-call]
        self.train()

    def _settle(self) -> None:
        """Gives the batch norms that will keep their statistics those of noise that is as rough as images are."""
        size = (SETTLING, self.backbone.in_channels, *self.image_size)
        noise = rough_noise(size, torch.Generator().manual_seed(self.seed))
        weights = {place: norm.normalised(network) for place, norm, network in self.normalised()}
        settle(self.backbone, lambda: self._call("backbone", self.backbone, weights, noise))
        if self.head.penalised:
            self._check_derivatives(noise[:1], weights)

    def _check_derivatives(self, image: Tensor, weights: dict[str, Weights]) -> None:
        """Raises UsageError where a layer of the critic has no second derivative, which a penalty learns by."""
        labels = torch.zeros(1, dtype=torch.long)
        try:
            r1(lambda images: self._judged(images, labels, weights), image)[0].backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            missing = re.search(r"derivative for (?:aten::)?(\w+) is not implemented", str(error))
            if missing is None:
                raise
            name = getattr(self.backbone, "name", type(self.backbone).__name__)
            raise UsageError(
                f"backbone={name} has a layer without a second derivative ({missing[1]}), and a gradient "
                "penalty needs it: type another backbone, or head.gradient_penalty=0 head.r1=0."
            ) from error
        self.zero_grad()

    def paint(self, latents: Tensor, labels: Tensor | None) -> Tensor:
        """What the averaged generator makes."""
        self.average.eval()
        pictures: Tensor = self.average(latents, labels)
        return (pictures.float() + 1) * 127.5

    @classmethod
    def under(cls, head: type) -> type[Task]:
        """Likelihood where the head is a density: it has one loss, and no critic."""
        return Likelihood if issubclass(head, Density) else cls

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The critic's scores of normalised images, (B,)."""
        weights = self._weights()
        return self._judged(images, labels, weights)

    def _judged(self, images: Tensor, labels: Tensor | None, weights: dict[str, Weights]) -> Tensor:
        features = self._call("backbone", self.backbone, weights, images)
        scores: Tensor = self._call("head.critic", self.head.critic, weights, features, labels)
        return scores

    def _weights(self) -> dict[str, Weights]:
        """The normalised weights of the critic's parts, where they are normalised."""
        return {place: norm(network) for place, norm, network in self.normalised()}

    def normalised(self) -> Iterator[tuple[str, SpectralNorm, nn.Module]]:
        """The parts whose weights are spectrally normalised: where they lie, the norm and the network."""
        parts = {"backbone": ("backbone", self.backbone), "critic": ("head.critic", self.head.critic)}
        for name, norm in self.spectral.items():
            place, network = parts[name]
            yield place, cast(SpectralNorm, norm), network

    def _call(self, name: str, network: nn.Module, weights: dict[str, Weights], *inputs: Any) -> Any:
        return functional_call(network, weights[name], inputs) if name in weights else network(*inputs)

    def _scores(
        self, pictures: Tensor, *, numbers: Tensor, labels: Tensor | None, weights: dict[str, Weights]
    ) -> Tensor:
        """The critic's scores (B,) of augmented pictures (B, C, H, W) in -1..1."""
        seen = augment.diffaugment(rgb(pictures), numbers, self.head.diffaugment)
        return self._judged(self._wanted(seen), labels, weights)

    def _wanted(self, pictures: Tensor) -> Tensor:
        """Pictures (B, C, H, W) in -1..1 as the backbone wants them."""
        if self._centred:
            return self._laid_out(self._in_channels(pictures))
        return self._scaled(pictures, self.picture_scale, self.picture_shift)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        """Learns from a batch; returns what of the losses is new, without gradients."""
        critic, generator = cast(list[LightningOptimizer], self.optimizers())
        if not self._waiting:
            critic.optimizer.zero_grad()
            self._remember()
        drawn = self.draw_for(batch)
        self._waiting.append(drawn)
        loss = self._learn(self.critic_loss(batch["image"].float() / 127.5 - 1, drawn))
        if len(self._waiting) < self.accumulate_grad_batches and not self.trainer.is_last_batch:
            return loss
        self.step_skipped = not self._average("critic", critic)
        critic.step()  # the one that Lightning counts; without gradients it changes nothing
        self._schedule(0)
        if not self.step_skipped and self.global_step % self.head.critic_steps == 0:
            loss = loss + self._teach(generator)
        self._waiting.clear()
        return loss

    def _teach(self, optimizer: LightningOptimizer) -> Tensor:
        """Takes a step of the generator, on the noise of the batches since the last step, and averages it."""
        optimizer.optimizer.zero_grad()
        with held((*self.backbone.parameters(), *self.head.critic.parameters())):
            loss = torch.stack([self._learn(self.generator_loss(drawn)) for drawn in self._waiting]).sum()
        self.step_skipped = not self._average("generator", optimizer)
        if not self.step_skipped:
            optimizer.optimizer.step()
            self._follow()
        self._schedule(1)
        return loss

    def resumable(self, batches: int) -> bool:  # noqa: ARG002
        return not self._waiting

    def draw_for(self, batch: Batch) -> "Drawn":
        """What is drawn for each image of a batch."""
        keys = image_keys(batch["index"], seed=self.seed, epoch=self.current_epoch)
        sizes = [2 * self.head.latent_dim, augment.DRAWS, augment.DRAWS, augment.DRAWS, 1]
        latents, real, fake, made, mix = torch.split(draws(keys, sum(sizes)), sizes, dim=1)
        first, second = normal(latents).chunk(2, dim=1)
        return Drawn(first, second, real, fake, made, mix[:, 0], self.labels_of(batch))

    def critic_loss(self, real: Tensor, drawn: "Drawn") -> Tensor:
        """What the critic is to make small; pictures are (B, C, H, W) in -1..1."""
        weights, labels = self._weights(), drawn.labels
        with torch.no_grad():
            fake = rgb(self.head.generator(drawn.critic_latents, labels).float())
        torch.clear_autocast_cache()  # what was cast without gradients would stay without
        scores = partial(self._scores, labels=labels, weights=weights)
        of_real, of_fake = self._scores_of_both(scores, real, fake, drawn)
        total, count = self.objective.critic(of_real, of_fake)
        self.watch("critic_loss", total, count)
        self.watch("real_score", of_real.sum(), count)
        self.watch("fake_score", of_fake.sum(), count)
        if self.head.penalised:
            total = total + self._penalty(scores, real, fake, drawn)
        return self._mean(total, count)

    def _scores_of_both(self, scores: Any, real: Tensor, fake: Tensor, drawn: "Drawn") -> tuple[Tensor, Tensor]:
        """The scores of real and of generated pictures, in one pass of the critic where that is faster."""
        if not self._at_once(len(real)):
            with cast_once(self.device.type):
                return scores(real, numbers=drawn.real_numbers), scores(fake, numbers=drawn.fake_numbers)
        numbers = torch.cat((drawn.real_numbers, drawn.fake_numbers))
        labels = None if drawn.labels is None else drawn.labels.repeat(2)
        with in_parts(self._norms, 2):
            of_real, of_fake = scores(torch.cat((rgb(real), fake)), numbers=numbers, labels=labels).chunk(2)
        return of_real, of_fake

    def _at_once(self, images: int) -> bool:
        """Whether one pass of the critic over twice as many images takes less time than two.

        It reads the weights once. But batch norms that learn take statistics of real and of generated pictures by
        themselves, for which what they are given is copied: worth it while those are fewer values than weights.
        """
        return self._normed is not None and 2 * images * self._normed <= self._judging

    def _penalty(self, scores: Any, real: Tensor, fake: Tensor, drawn: "Drawn") -> Tensor:
        """The weighted sum over images of what penalises gradients with regard to them, in float32."""
        weights, terms = [], []
        with torch.autocast(self.device.type, enabled=False):
            if self.head.gradient_penalty > 0:
                between = partial(scores, numbers=drawn.fake_numbers)
                weights.append(self.head.gradient_penalty)
                terms.append(gradient_penalty(between, real, fake, drawn.mix))
            if self.head.r1 > 0:
                weights.append(self.head.r1)
                terms.append(r1(partial(scores, numbers=drawn.real_numbers), real))
        totals = torch.stack([total for total, _ in terms])
        self.watch("penalty", totals.sum(), terms[0][1])
        return (totals * totals.new_tensor(weights)).sum()

    def generator_loss(self, drawn: "Drawn") -> Tensor:
        torch.clear_autocast_cache()  # what was cast before the critic's step is stale
        fake = self.head.generator(drawn.generator_latents, drawn.labels).float()
        of_fake = self._scores(fake, numbers=drawn.generator_numbers, labels=drawn.labels, weights=self._weights())
        total, count = self.objective.generator(of_fake)
        self.watch("generator_loss", total, count)
        return self._mean(total, count)

    def _mean(self, total: Tensor, count: Tensor) -> Tensor:
        """The mean over all processes and accumulated batches."""
        return mean_over_processes(total, count * self.accumulate_grad_batches)

    def _remember(self) -> None:
        """Keeps what the statistics of batch norms are before a step."""
        if self._moving:
            torch._foreach_copy_(self._before, self._moving)

    def _learn(self, loss: Tensor) -> Tensor:
        casts = torch.is_autocast_enabled(self.device.type)
        with torch.autocast(self.device.type, enabled=False) if casts else nullcontext():
            loss.backward()  # type: ignore[no-untyped-call]
        self._losses.append(loss.detach())
        return loss.detach()

    @torch.no_grad()
    def _average(self, name: str, optimizer: LightningOptimizer) -> bool:
        """Averages the gradients over processes and clips them; drops all of them where one, or a loss, is not finite.

        Every process comes to the same answer, which is whether the step may be taken.
        """
        parameters = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
        loss = torch.stack(self._losses).sum()
        self._losses.clear()
        gradients = average_over_processes([cast(Tensor, each.grad) for each in parameters], loss)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
        if not math.isfinite(norm + loss):
            self._leave_out(name, optimizer)
            return False
        self.watch(f"{name}_gradient", norm, torch.ones_like(norm))
        if self.gradient_clip_val:
            clip_grads_with_norm_(parameters, self.gradient_clip_val, norm)
        return True

    def _leave_out(self, name: str, optimizer: LightningOptimizer) -> None:
        """Undoes what a step that is not finite has done, and says so."""
        optimizer.optimizer.zero_grad()
        if self._moving:
            torch._foreach_copy_(self._moving, self._before)
        self.left_out += 1
        if self.left_out in LOUD and self.trainer.is_global_zero:
            print(
                f"warning    step {self.global_step} of the {name} left out: its loss or gradients are not finite "
                f"({self.left_out} so far)",
                flush=True,
            )

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the averaged generator, with its statistics, towards the one that learns."""
        steps = self.global_step // self.head.critic_steps
        weight = 1 - min(self.ema, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(*self._followed, weight)

    def _schedule(self, which: int) -> None:
        schedulers: Any = self.lr_schedulers()
        schedulers[which].step()

    def evaluation_step(self, batch: Batch) -> Tensor:
        """The critic's scores of each image, (B,); the metrics see as many pictures of the same classes."""
        labels = self.labels_of(batch)
        self.compare(batch, labels)
        return self(self.images(batch), labels).float()  # type: ignore[no-any-return]

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:  # noqa: ARG002
        scores: Tensor = self(self.images(batch))
        return scores

    def configure_optimizers(self) -> OptimizerLRScheduler:
        steps = self._steps()
        rate = self.learning_rate()
        generator_rate = rate if self.generator_lr is None else self.generator_lr
        critic = nn.ModuleDict({"backbone": self.backbone, "critic": self.head.critic})
        return [
            self._optimizer(critic, rate, steps),
            self._optimizer(self.head.generator, generator_rate, max(1, steps // self.head.critic_steps)),
        ]

    def _optimizer(self, network: nn.Module, rate: float | None, steps: int) -> Any:
        chosen = {} if rate is None else {"lr": rate}
        optimizer = joined(at_rates(self.optimizer(parameter_groups(network, self.pace), **chosen)))
        schedule = self.scheduler(optimizer, total_steps=steps)
        if schedule.get("interval") != "step":
            raise UsageError("A generator has no loss that tells when to slow down: type scheduler=cosine or constant.")
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _steps(self) -> int:
        """The steps of the critic in the whole training."""
        batches = self.trainer.estimated_stepping_batches
        if self.accumulate_grad_batches == 1 or self.trainer.max_epochs == -1:
            return int(batches)
        steps = math.ceil(self.trainer.num_training_batches / self.accumulate_grad_batches) * int(
            self.trainer.max_epochs or 1
        )
        return steps if self.trainer.max_steps == -1 else min(steps, self.trainer.max_steps)

    def on_fit_start(self) -> None:
        """Says what differs from what was asked; raises UsageError where the task cannot train so."""
        plugin: Any = self.trainer.precision_plugin
        if isinstance(plugin, MixedPrecision) and plugin.scaler is not None:
            raise UsageError("Generation trains in 32 or bf16-mixed, not 16-mixed: type trainer.precision=32.")
        if not isinstance(self.trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            name = type(self.trainer.strategy).__name__
            raise UsageError(f"Generation cannot train under {name}: type trainer.strategy=ddp or auto.")
        super().on_fit_start()

    def notes(self) -> list[str]:
        """Lines for the person who starts the run."""
        normed = any(isinstance(layer, _BatchNorm) for layer in self.backbone.modules())
        if not (normed and self.judges_alone):
            return []
        why = "a gradient penalty" if self.head.penalised else "head.batch_norms=false"
        return [
            f"norms      the critic's batch norms keep their statistics, as {why} wants each image judged by itself"
        ]

    @property
    def judges_alone(self) -> bool:
        """Whether the critic's batch norms keep their statistics, so that images of a batch do not meet in it."""
        return self.head.penalised or not self.head.batch_norms

    def on_train_start(self) -> None:
        critic = nn.ModuleList((self.backbone, self.head.critic))
        self._judging = sum(parameter.numel() for parameter in critic.parameters())
        self._norms = _learning_norms(critic)
        image = torch.zeros(1, self.backbone.in_channels, *self.image_size, device=self.device)
        with at_rest(self):
            self._normed = values_normed(self._norms, lambda: self(self._laid_out(image)))
        self._moving = [buffer for layer in _learning_norms(self) for buffer in layer.buffers()]
        self._before = [buffer.clone() for buffer in self._moving]
        self._followed = _values(self.average), _values(self.head.generator)
        if self.global_step == 0:
            for _, norm, network in self.normalised():
                norm.settle(network)

    def train(self, mode: bool = True) -> "Generation":
        super().train(mode)
        self.average.eval()
        if mode and self.judges_alone:
            for layer in self.backbone.modules():
                layer.train(layer.training and not isinstance(layer, _BatchNorm))
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["left_out"] = self.left_out

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.left_out = checkpoint.get("left_out", 0)

    def _evaluated(self, stage: str) -> None:
        super()._evaluated(stage)
        if stage == "val":
            self.log("step", float(self.global_step - 1))  # else Lightning would count batches that are accumulated

    def compile_parts(self) -> None:
        for part in (self.backbone, self.head.critic, self.head.generator, self.average):
            part.compile()

    def predictions(self, raw: Tensor) -> list[Prediction]:
        return [{"score": round(score, 6)} for score in raw.float().tolist()]

    def errors(self, raw: Tensor, batch: Batch) -> dict[str, Tensor]:  # noqa: ARG002
        """None: the critic's score is no answer that could be wrong."""
        return {}

    def draw(self, axes: Axes, image: Tensor, prediction: Prediction, truth: Prediction | None) -> None:  # noqa: ARG002
        """Draws the image with what the critic thinks of it: the higher, the more real."""
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_title(f"{prediction['score']:.2f}")


class Drawn(NamedTuple):
    """What is drawn for the images of a batch: latents (B, latent_dim), numbers for what alters images, and classes."""

    critic_latents: Tensor
    generator_latents: Tensor
    real_numbers: Tensor  # (B, augment.DRAWS)
    fake_numbers: Tensor
    generator_numbers: Tensor
    mix: Tensor  # (B,)
    labels: Tensor | None


def rough_noise(size: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Normal noise (B, C, H, W) of variance 1, a quarter of which lies at each of four scales."""
    *count, height, width = size
    sides = [(max(1, height >> power), max(1, width >> power)) for power in range(4)]
    scales = [torch.randn(*count, *side, generator=generator) for side in sides]
    return torch.stack([F.interpolate(scale, (height, width)) for scale in scales]).sum(dim=0) / 2


@contextmanager
def held(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within it parameters want no gradients."""
    learning = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def _learning_norms(network: nn.Module) -> list[_BatchNorm]:
    """The batch norms whose statistics move."""
    return [layer for layer in network.modules() if isinstance(layer, _BatchNorm) and layer.training]


def _values(network: nn.Module) -> list[Tensor]:
    """What can be averaged."""
    return [value for value in (*network.parameters(), *network.buffers()) if value.is_floating_point()]


def _bake(task: Generation, state: dict[str, Any], prefix: str, metadata: Any) -> None:  # noqa: ARG001
    """Puts normalised weights into a state dict in the places of the raw ones, which lie beside them under `spectral.`.

    So a backbone that is transferred computes what it did here.
    """
    for place, norm, network in task.normalised():
        for name, weight in norm.normalised(network).items():
            key = f"{prefix}{place}.{name}"
            state[_raw(prefix, key)], state[key] = state[key], weight.detach().to(state[key].dtype)


def _unbake(task: Generation, state: dict[str, Any], prefix: str, *rest: Any) -> None:  # noqa: ARG001
    """Takes the raw weights back."""
    for place, norm, _ in task.normalised():
        for name in norm.names:
            key = f"{prefix}{place}.{name}"
            if _raw(prefix, key) in state:
                state[key] = state.pop(_raw(prefix, key))


def _raw(prefix: str, key: str) -> str:
    return f"{prefix}spectral.raw/{key.removeprefix(prefix).replace('.', '/')}"
