"""What a step of a GAN costs over a bare PyTorch loop: python benchmarks/generation.py [--rounds 7] [--steps 30].

`python train.py task=generation` as it comes, with every callback, without its validation, against a plain loop: the
same networks, uint8 batches, objective, noise, precision, layout, optimisers, schedules and moving average. Both
alternate in one process; the clock runs from the first training batch to the last; medians of the times, and of the
ratios within a round. SNGAN's five critic steps for one of the generator are counted as five steps.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from overhead import CLASSES, Batches, Ready, composed, ours
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from visiontasks.cli.build import build_task
from visiontasks.cli.train import quieten
from visiontasks.tasks import Generation

WORDS = ("task=generation", "callbacks.nearest=null", "callbacks.interpolations=null", "callbacks.samples=null")
CASES: dict[str, tuple[str, ...]] = {
    "as it comes": (),
    "head=dcgan trainer.precision=bf16-mixed": ("head=dcgan", "trainer.precision=bf16-mixed"),
    "head=sngan backbone=resnet20": ("head=sngan", "head.generator.width=16", "backbone=resnet20"),
}
TARGET = 1.03
Game = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]
GAMES: dict[str, Game] = {
    "non_saturating": (
        lambda real, fake: (F.softplus(-real) + F.softplus(fake)).mean(),
        lambda fake: F.softplus(-fake).mean(),
    ),
    "hinge": (lambda real, fake: (F.relu(1 - real) + F.relu(1 + fake)).mean(), lambda fake: -fake.mean()),
}


class Bare:
    """A plain loop over the networks of a task."""

    def __init__(self, task: Generation, steps: int, precision: str) -> None:
        self.task = task.train()
        self.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bf16-mixed")
        self.backbone, self.critic, self.generator = task.backbone, task.head.critic, task.head.generator
        self.of_critic, self.of_generator = GAMES[task.head.objective]
        if task.head.spectral_norm:
            for layer in [*self.backbone.modules(), *self.critic.modules()]:
                if isinstance(layer, nn.Conv2d | nn.Linear):
                    spectral_norm(layer)
        judges = [*self.backbone.parameters(), *self.critic.parameters()]
        self.optimizers = [
            torch.optim.Adam(parameters, lr=2e-4, betas=(0.5, 0.999), fused=True)
            for parameters in (judges, list(self.generator.parameters()))
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(each, lambda step: 1 - step / steps) for each in self.optimizers
        ]

    def scores(self, images: Tensor, labels: Tensor) -> Tensor:
        seen = images.contiguous(memory_format=self.task.memory_format)
        judged: Tensor = self.critic(self.backbone(seen), labels).float()
        return judged

    def step(self, number: int, pixels: Tensor, labels: Tensor) -> None:
        noise = torch.randn(2, len(pixels), self.task.head.latent_dim)
        with self.autocast():
            with torch.no_grad():
                fake = self.generator(noise[0], labels).float()
            torch.clear_autocast_cache()
            loss = self.of_critic(self.scores(pixels.float() / 127.5 - 1, labels), self.scores(fake, labels))
        self.learn(0, loss)
        if number % self.task.head.critic_steps == 0:
            for parameter in [*self.backbone.parameters(), *self.critic.parameters()]:
                parameter.requires_grad_(False)
            with self.autocast():
                loss = self.of_generator(self.scores(self.generator(noise[1], labels).float(), labels))
            self.learn(1, loss)
            for parameter in [*self.backbone.parameters(), *self.critic.parameters()]:
                parameter.requires_grad_(True)
            self.follow()

    def learn(self, which: int, loss: Tensor) -> None:
        self.optimizers[which].zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizers[which].step()
        self.schedules[which].step()

    @torch.no_grad()
    def follow(self) -> None:
        average, own = list(self.task.average.parameters()), list(self.generator.parameters())
        torch._foreach_lerp_(average, own, 0.001)


def bare(config: dict[str, Any], task: Generation, data: Ready, _: Path) -> float:
    """Seconds a step of the plain loop."""
    loop = Bare(task, len(data.batches), config["trainer"]["precision"])
    start = time.perf_counter()
    for number, batch in enumerate(data.train_dataloader(), start=1):
        loop.step(number, batch["image"], batch["label"])
    return (time.perf_counter() - start) / len(data.batches)


def rounds(words: tuple[str, ...], count: int, steps: int) -> Iterator[tuple[float, float]]:
    """Seconds a step of the bare loop and of ours, once a round in turn, after one to warm up."""
    with tempfile.TemporaryDirectory() as name:
        for number in range(count + 1):
            folder = Path(name) / str(number)
            config = composed((*WORDS, *words), folder)
            data = Ready(Batches(config["data"]["image_size"], config["data"]["batch_size"], steps))
            times = []
            for run in (bare, ours):
                task = build_task(config, classes=CLASSES)
                assert isinstance(task, Generation)
                times.append(run(config, task.to(memory_format=task.memory_format), data, folder))
            if number > 0:
                yield times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=30)
    given = parser.parse_args()
    quieten()
    for name, words in CASES.items():
        bares, mine = zip(*rounds(words, given.rounds, given.steps), strict=True)
        ratio = statistics.median(m / b for m, b in zip(mine, bares, strict=True))
        print(f"{name}: bare {1e3 * statistics.median(bares):.1f} ms a step; ours x {ratio:.3f} (target {TARGET})")


if __name__ == "__main__":
    main()
