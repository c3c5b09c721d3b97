import math

import pytest
import torch
from torch import nn

from visiontasks.tasks import optimisation
from visiontasks.tasks.optimisation import parameter_groups


def rates(make: optimisation.MakeSchedule, steps: int, **options: float) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0, momentum=0.9)
    scheduler = make(optimizer, total_steps=steps, **options)["scheduler"]
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_cosine_warms_up_and_falls_to_its_end() -> None:
    seen = rates(optimisation.cosine, 100, warmup=0.1, final=0.05)
    assert seen[0] == pytest.approx(0.2)
    assert max(seen) == pytest.approx(2.0)
    assert seen[55] == pytest.approx(2.0 * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * 45 / 90))))
    assert seen[-1] == pytest.approx(0.1, abs=0.01)


def test_polynomial_is_a_power_of_what_is_left() -> None:
    assert rates(optimisation.polynomial, 10, power=2.0) == pytest.approx([2 * (1 - i / 10) ** 2 for i in range(10)])


def test_step_falls_at_its_milestones() -> None:
    seen = rates(optimisation.step, 8, milestones=[0.5, 0.75], gamma=0.1)
    assert seen == pytest.approx([2.0] * 4 + [0.2] * 2 + [0.02] * 2)


def test_constant_stays() -> None:
    assert rates(optimisation.constant, 4) == [2.0] * 4


def test_one_cycle_rises_and_falls() -> None:
    seen = rates(optimisation.one_cycle, 50, rise=0.3)
    assert seen[0] < seen[14] > seen[-1]
    assert max(seen) == pytest.approx(2.0, rel=1e-3)


def test_plateau_waits_for_the_validation_loss() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = optimisation.plateau(optimizer, total_steps=10, patience=1, factor=0.5)
    assert schedule["monitor"] == "val/loss"
    for _ in range(3):
        schedule["scheduler"].step(1.0)
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_norms_and_biases_are_not_decayed_and_frozen_parameters_left_out() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1).requires_grad_(False))
    decayed, plain = parameter_groups(network)
    assert [p.shape for p in decayed["params"]] == [network[0].weight.shape]
    assert len(plain["params"]) == 3
    assert plain["weight_decay"] == 0.0


def test_timm_optimizers_by_name() -> None:
    groups = parameter_groups(nn.Linear(3, 2))
    optimizer = optimisation.timm_optimizer(groups, opt="lion", lr=0.01, weight_decay=0.1)
    assert type(optimizer).__name__ == "Lion"
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
