"""Each check of the first steps on a healthy task, and on one with the fault that it is for."""

import math
from functools import partial
from typing import Any

import pytest
import torch
from lightning import Trainer
from torch import Tensor, nn

from visiontasks.callbacks import examination
from visiontasks.callbacks.examination import Examination, Group
from visiontasks.contracts import Backbone, Level
from visiontasks.tasks.classification import Classification
from visiontasks.tasks.optimisation import constant

CLASSES = ("a", "b", "c", "d")


class Small(Backbone):
    """Two convolutions with batch norm; `frozen` stops the gradients of the first, and nothing else."""

    levels = (Level(4, 2), Level(8, 4))
    in_channels, mean, std = 3, (0.5,) * 3, (0.5,) * 3

    def __init__(self, *, frozen: bool = False, evaluated: bool = False) -> None:
        super().__init__()
        self.fine = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.coarse = nn.Sequential(nn.Conv2d(4, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.evaluated = evaluated
        if frozen:
            self.fine.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> "Small":
        super().train(mode)
        if self.evaluated:
            self.fine.eval()
        return self

    def forward(self, images: Tensor) -> list[Tensor]:
        fine = self.fine(images)
        return [fine, self.coarse(fine)]


class Head(nn.Module):
    """A linear layer over the pooled coarsest map, and where `spare` one that nothing uses."""

    def __init__(
        self, *, levels: tuple[Level, ...], num_classes: int, spare: bool = False, wrong: bool = False
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(levels[-1].channels, num_classes)
        self.wrong = wrong
        if spare:
            self.spare = nn.Linear(3, 3)

    def forward(self, features: list[Tensor]) -> Tensor:
        logits: Tensor = self.linear(features[-1].mean((2, 3)))
        return logits / 0 if self.wrong else logits


def watched(
    *, lr: float = 0.01, head: Any = Head, scale: float = 1.0, **options: Any
) -> tuple[Examination, Classification]:
    torch.manual_seed(0)
    optimizer = partial(torch.optim.SGD, lr=lr)
    task = Classification(
        backbone=Small(**options), classes=CLASSES, head=head, optimizer=optimizer, scheduler=constant
    )
    with torch.no_grad():
        task.head.linear.weight.mul_(scale)  # type: ignore[union-attr, operator]
    images = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8)
    batch = {"image": images, "label": torch.arange(8) % 4, "index": torch.arange(8)}
    seen = Examination()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", callbacks=[seen], limit_val_batches=0, **quiet)  # type: ignore[arg-type]
    trainer.fit(task, train_dataloaders=torch.utils.data.DataLoader([batch] * 4, batch_size=None))  # type: ignore[arg-type]
    return seen, task


@pytest.fixture(scope="module")
def healthy() -> tuple[Examination, Classification]:
    return watched()


def test_a_healthy_task_has_no_fault(healthy: tuple[Examination, Classification]) -> None:
    seen, task = healthy
    verdicts = [
        examination.first_loss(seen, task),
        examination.unused_parameters(seen),
        examination.frozen_parts(seen),
        examination.learning_rates(seen),
    ]
    assert [verdict.status for verdict in verdicts] == ["ok"] * 4
    assert verdicts[0].sentence.endswith("where chance gives 1.386")
    assert verdicts[1].sentence == "all 10 tensors that should learn had a gradient"
    assert verdicts[3].sentence == "3 tensors at 0.01 (decay 0), 7 tensors at 0.01 (decay 0)"
    assert seen.images_per_second() > 0


def test_a_frozen_stage_whose_statistics_move_is_found() -> None:
    seen, _ = watched(frozen=True)
    verdict = examination.frozen_parts(seen)
    assert verdict.status == "fault"
    assert "3 of 7 frozen tensors" in verdict.sentence
    assert all(f"fine.1.{name}" in verdict.sentence for name in ("running_mean", "running_var", "num_batches_tracked"))
    assert examination.unused_parameters(seen).status == "ok"


def test_a_stage_that_is_frozen_for_good_stays() -> None:
    seen, _ = watched(frozen=True, evaluated=True)
    verdict = examination.frozen_parts(seen)
    assert verdict.sentence == "all 7 frozen tensors of the backbone stayed to the bit"
    assert verdict.status == "ok"


def test_a_parameter_that_nothing_uses_is_found() -> None:
    verdict = examination.unused_parameters(watched(head=partial(Head, spare=True))[0])
    assert verdict.status == "fault"
    assert "2 of 12 tensors" in verdict.sentence
    assert "head.spare.bias, head.spare.weight" in verdict.sentence


def test_a_loss_that_is_not_finite_is_found() -> None:
    seen, task = watched(head=partial(Head, wrong=True))
    verdict = examination.first_loss(seen, task)
    assert verdict.status == "fault"
    assert "not finite at step 0" in verdict.sentence
    assert examination.overfits(seen.losses).status == "fault"


def test_a_first_loss_far_from_chance_is_found() -> None:
    verdict = examination.first_loss(*watched(scale=1000, lr=1e-6))
    assert verdict.status == "warning"


def test_a_rate_of_nothing_is_found(healthy: tuple[Examination, Classification]) -> None:
    seen = Examination()
    seen.groups = [Group(3, 0.01, 0.0), Group(2, 0.0, 0.0)]
    assert examination.learning_rates(seen).status == "fault"
    seen.groups = [Group(3, math.nan, 0.0)]
    assert examination.learning_rates(seen).status == "fault"
    assert examination.learning_rates(Examination()).status == "fault"


def test_one_batch_is_learnt_or_not() -> None:
    assert examination.overfits(watched(lr=0.5)[0].losses).status == "ok"
    assert examination.overfits(watched(lr=1e-9)[0].losses).status == "warning"


def test_the_one_that_waits_is_named() -> None:
    assert examination.who_waits(500, 100, workers=0, gpu=False).status == "ok"
    slow = examination.who_waits(100, 500, workers=2, gpu=True)
    assert slow.status == "warning"
    assert "type data.num_workers=4 or data.cache=ram" in slow.sentence
    assert "num_workers=" not in examination.who_waits(100, 500, workers=0, gpu=False).sentence
