"""Tiny GANs, and what trains them, for the tests of generation."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from torch.optim import SGD
from torch.utils.data import DataLoader

from tests.tasks.pretraining_parts import Tiny
from visiontasks import heads
from visiontasks.contracts import Batch
from visiontasks.heads.generation.generators import ResidualGenerator, TransposedGenerator
from visiontasks.tasks import Generation
from visiontasks.tasks.base import Task
from visiontasks.tasks.optimisation import constant

SIDE = 16
CLASSES = ("a", "b", "c")
GAMES: dict[str, dict[str, Any]] = {
    "non_saturating": {},
    "least_squares": {"objective": "least_squares"},
    "wasserstein": {"objective": "wasserstein", "gradient_penalty": 10.0},
    "hinge": {"objective": "hinge", "spectral_norm": True, "batch_norms": False},
    "conditional": {"objective": "hinge", "spectral_norm": True, "batch_norms": False, "conditional": True},
    "r1": {"r1": 1.0, "diffaugment": ("colour", "translation", "cutout")},
}


def game(name: str = "non_saturating", *, residual: bool = False, **options: Any) -> Any:
    """What makes a tiny GAN."""
    chosen: dict[str, Any] = GAMES[name] | options
    conditional = chosen.pop("conditional", False)
    kind = ResidualGenerator if residual or conditional else TransposedGenerator
    generator = partial(kind, latent_dim=6, width=4)
    return partial(heads.ConditionalGAN if conditional else heads.GAN, generator=generator, **chosen)


def made(
    name: str = "non_saturating", *, seed: int = 0, task: dict[str, Any] | None = None, **options: Any
) -> Generation:
    torch.manual_seed(seed)
    sgd = partial(SGD, lr=0.05, momentum=0.5)
    settings: dict[str, Any] = {"optimizer": sgd, "scheduler": constant} | (task or {})
    return Generation(backbone=Tiny(), classes=CLASSES, head=game(name, **options), image_size=SIDE, **settings)


def images(count: int = 8, *, batch_size: int = 8) -> list[Batch]:
    """Batches of pictures, the same in every call."""
    random = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (count, 3, SIDE, SIDE), generator=random, dtype=torch.uint8)
    labels = torch.randint(0, len(CLASSES), (count,), generator=random)
    everything = {"image": pixels, "label": labels, "index": torch.arange(count)}
    rows = torch.arange(count).split(batch_size)
    return [{key: values[row] for key, values in everything.items()} for row in rows]


def fit(task: Task, batches: list[Batch], *, ckpt: Path | None = None, **options: Any) -> Trainer:
    """Trains a task on batches, in their order."""
    chosen: dict[str, Any] = {"max_epochs": 1, "accelerator": "cpu", "devices": 1} | options
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(**quiet, logger=False, **chosen)
    trainer.fit(task, DataLoader(batches, batch_size=None), ckpt_path=ckpt)  # type: ignore[arg-type]
    return trainer
