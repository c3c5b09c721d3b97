"""What a step of a GAN costs over a bare PyTorch loop: python benchmarks/generation.py [--rounds 7] [--steps 100].

`python train.py task=generation` as it comes, with every callback, without its validation, against a plain loop: the
same networks, uint8 batches, objective, noise, precision, layout, optimisers, schedules and moving average. The loop
has a process of its own, which asks the allocator for what ours asks it for. They take turns of some steps; what
Trainer.fit does between steps counts as ours. Medians over rounds of the mean times of a step, and of their ratios.
SNGAN takes five steps of the critic for one of the generator, and each counts as a step.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning import LightningModule, Trainer
from overhead import CLASSES, Batches, Clock, Ready, composed
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from visiontasks.cli.build import build_task, build_trainer
from visiontasks.cli.process import keep_freed_memory
from visiontasks.cli.train import quieten
from visiontasks.tasks import Generation

WORDS = ("task=generation", "callbacks.nearest=null", "callbacks.interpolations=null", "callbacks.samples=null")
CASES: dict[str, tuple[str, ...]] = {
    "as it comes": (),
    "head=dcgan trainer.precision=bf16-mixed": ("head=dcgan", "trainer.precision=bf16-mixed"),
    "head=sngan backbone=resnet20": ("head=sngan", "head.generator.width=16", "backbone=resnet20"),
}
TARGET = 1.03
TURN = 20  # steps
WARM_UP = 60  # steps, in which what happens once a run is done, such as opening the logs
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


def plain_steps(asked: Connection, config: dict[str, Any], steps: int) -> None:
    """Takes as many steps of the plain loop as it is asked for, again and again, and answers with their seconds."""
    quieten()
    os.environ.pop("PYTORCH_NVML_BASED_CUDA_CHECK", None)  # Lightning sets it, and Adam's steps take longer
    keep_freed_memory()
    loop = Bare(made(config), steps, config["trainer"]["precision"])
    batches = Batches(config["data"]["image_size"], config["data"]["batch_size"], steps)
    taken = 0
    while count := asked.recv():
        start = time.perf_counter()
        for number in range(taken, taken + count):
            loop.step(number + 1, batches[number]["image"], batches[number]["label"])
        taken += count
        asked.send(time.perf_counter() - start)


class Turns(Clock):
    """After every TURN of our steps lets the plain loop take as many, and times both once warm."""

    def __init__(self, loop: Connection) -> None:
        self.loop = loop
        self.ours = self.bare = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % TURN:
            return
        own = time.perf_counter() - self.start
        self.loop.send(TURN)
        theirs = self.loop.recv()
        if batch_idx >= WARM_UP:
            self.ours += own
            self.bare += theirs
        self.start = time.perf_counter()


def rounds(words: tuple[str, ...], count: int, steps: int) -> Iterator[tuple[float, float]]:
    """Seconds a step of the plain loop and of ours, which take turns."""
    spawned = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            folder = Path(name) / str(number)
            config = composed((*WORDS, *words), folder)
            data = Ready(Batches(config["data"]["image_size"], config["data"]["batch_size"], WARM_UP + steps))
            here, there = spawned.Pipe()
            spawned.Process(target=plain_steps, args=(there, config, WARM_UP + steps), daemon=True).start()
            trainer, turns = build_trainer(config, folder=folder), Turns(here)
            trainer.callbacks.append(turns)  # type: ignore[attr-defined]
            trainer.fit(made(config), datamodule=data)
            here.send(0)
            yield turns.bare / steps, turns.ours / steps


def made(config: dict[str, Any]) -> Generation:
    task = build_task(config, classes=CLASSES)
    assert isinstance(task, Generation)
    return task.to(memory_format=task.memory_format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=100, help=f"a round, a multiple of {TURN}")
    given = parser.parse_args()
    quieten()
    for name, words in CASES.items():
        bares, mine = zip(*rounds(words, given.rounds, given.steps), strict=True)
        ratio = statistics.median(m / b for m, b in zip(mine, bares, strict=True))
        print(f"{name}: bare {1e3 * statistics.median(bares):.1f} ms a step; ours x {ratio:.3f} (target {TARGET})")


if __name__ == "__main__":
    main()
