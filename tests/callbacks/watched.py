"""A tiny task on embedded scenes, and a trainer that only says what callbacks ask of it."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from visiontasks.contracts import Backbone, Level
from visiontasks.data import DigitScenes
from visiontasks.layers.distributed import rank, world_size
from visiontasks.tasks.base import Task


class Two(Backbone):
    """Two levels with a batch norm and dropout, so that a wrong mode would show."""

    def __init__(self) -> None:
        super().__init__()
        self.levels = (Level(6, 2), Level(12, 4))
        self.in_channels = 3
        self.mean, self.std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5))
        self.second = nn.Sequential(nn.Conv2d(6, 12, 3, 2, 1), nn.ReLU())

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.first(images)
        return [fine, self.second(fine)]


class Watched(Task):
    """Keeps what is logged."""

    needs: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset({"label"})

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(backbone=Two(), classes=(), monitor="val/knn", mode="max")
        self.logged: dict[str, float] = {}

    def log(self, name: str, value: Any, **options: Any) -> None:  # type: ignore[override]
        self.logged[name] = float(value)


def scenes(**options: Any) -> DigitScenes:
    sizes = {"train_size": 61, "val_size": 23, "test_size": 1, "image_size": 16, "batch_size": 4, "probe_images": 47}
    return DigitScenes(**{"digits": (1, 1), "digit_size": (0.6, 0.9)} | sizes | options)


def trainer_of(module: Watched, data: DigitScenes, **state: Any) -> Any:
    """A trainer in the middle of a fit."""
    said: dict[str, Any] = {
        "current_epoch": 0,
        "max_epochs": 1,
        "global_step": 0,
        "sanity_checking": False,
        "training": True,
    }
    said |= {"loggers": []}
    trainer = SimpleNamespace(
        datamodule=data,
        lightning_module=module,
        world_size=world_size(),
        global_rank=rank(),
        is_global_zero=rank() == 0,
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        **said | state,
    )
    data.trainer = trainer  # type: ignore[assignment]
    return trainer
