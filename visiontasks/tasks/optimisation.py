"""Parameter groups, optimisers and learning-rate schedules."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR, OneCycleLR, ReduceLROnPlateau

Groups = list[dict[str, Any]]
MakeOptimizer = Callable[..., Optimizer]  # called with the parameter groups
Schedule = dict[str, Any]  # what Lightning takes under "lr_scheduler"
MakeSchedule = Callable[..., Schedule]  # called with the optimiser and total_steps


class Pace(NamedTuple):
    """When and how fast a parameter learns."""

    start: int = 0  # the epoch
    rate: float = 1.0  # share of the learning rate


def parameter_groups(module: nn.Module, pace: Mapping[str, Pace] | None = None) -> Groups:
    """The trainable parameters in groups: for each pace weights, and norms and biases, which are not decayed.

    A parameter that pace does not name learns from the start at the full rate. The rate stands in each group as "rate",
    for `at_rates`. What starts later has groups of its own: fused SGD takes no group with only some of its momenta.
    """
    pace = pace or {}
    groups: dict[tuple[Pace, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((pace.get(name, Pace()), parameter.ndim > 1), []).append(parameter)
    ordered = sorted(groups.items(), key=lambda item: (item[0][0].start, -item[0][0].rate, not item[0][1]))
    return [
        {"params": parameters, "start": start, "rate": rate} | ({} if decayed else {"weight_decay": 0.0})
        for ((start, rate), decayed), parameters in ordered
    ]


def at_rates(optimizer: Optimizer) -> Optimizer:
    """The optimiser, whose groups now learn at their share of its learning rate."""
    for group in optimizer.param_groups:
        group["lr"] *= group["rate"]
    return optimizer


def joined(optimizer: Optimizer) -> Optimizer:
    """The optimiser, whose groups that learn alike, as where nothing is decayed, are one: fewer calls a step."""
    groups: Groups = []
    for group in optimizer.param_groups:
        twin = next((one for one in groups if _options(one) == _options(group)), None)
        if twin is None:
            groups.append(group)
        else:
            twin["params"] += group["params"]
    optimizer.param_groups[:] = groups
    return optimizer


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name != "params"}


def timm_optimizer(groups: Groups, *, opt: str, lr: float, weight_decay: float = 0.0, **options: Any) -> Optimizer:
    """Any optimiser of timm by its name, such as lion or adafactor; further options are passed on to it."""
    from timm.optim import create_optimizer_v2

    optimizer: Optimizer = create_optimizer_v2(groups, opt=opt, lr=lr, weight_decay=weight_decay, **options)
    return optimizer


def constant(optimizer: Optimizer, *, total_steps: int, warmup: float = 0.0) -> Schedule:
    """A linear warm-up over a fraction of the training, then the full learning rate."""
    return _by_step(optimizer, lambda step: _ramp(step, warmup * total_steps))


def cosine(
    optimizer: Optimizer,
    *,
    total_steps: int,
    warmup: float = 0.05,
    final: float = 0.0,
) -> Schedule:
    """A linear warm-up over a fraction of the training, then half a cosine (Loshchilov and Hutter 2016, 1608.03983).

    final is a fraction of the full learning rate.
    """

    def factor(step: int) -> float:
        fall = 0.5 * (1 + math.cos(math.pi * _progress(step, total_steps, warmup)))
        return _ramp(step, warmup * total_steps) * (final + (1 - final) * fall)

    return _by_step(optimizer, factor)


def polynomial(
    optimizer: Optimizer,
    *,
    total_steps: int,
    power: float = 0.9,
    warmup: float = 0.0,
) -> Schedule:
    """A linear warm-up over a fraction of the training, then (1 - t) ** power (Liu et al. 2015, 1506.04579)."""

    def factor(step: int) -> float:
        fall: float = (1 - _progress(step, total_steps, warmup)) ** power
        return _ramp(step, warmup * total_steps) * fall

    return _by_step(optimizer, factor)


def step(
    optimizer: Optimizer,
    *,
    total_steps: int,
    milestones: Iterable[float] = (0.5, 0.75),
    gamma: float = 0.1,
) -> Schedule:
    """A learning rate multiplied by gamma at each milestone, a fraction of the training."""
    steps = [round(milestone * total_steps) for milestone in milestones]
    return {"scheduler": MultiStepLR(optimizer, steps, gamma), "interval": "step"}


def one_cycle(
    optimizer: Optimizer,
    *,
    total_steps: int,
    rise: float = 0.3,
) -> Schedule:
    """One rise and fall of the learning rate, and of momentum against it (Smith and Topin 2017, 1708.07120)."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    return {"scheduler": OneCycleLR(optimizer, peaks, total_steps, pct_start=rise), "interval": "step"}


def plateau(
    optimizer: Optimizer,
    *,
    total_steps: int,  # noqa: ARG001
    patience: int = 5,
    factor: float = 0.1,
) -> Schedule:
    """A learning rate multiplied by factor when the validation loss has not fallen for some validations."""
    scheduler = ReduceLROnPlateau(optimizer, factor=factor, patience=patience)
    return {"scheduler": scheduler, "interval": "epoch", "monitor": "val/loss"}


def _by_step(optimizer: Optimizer, factor: Callable[[int], float]) -> Schedule:
    return {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}


def _ramp(step: int, steps: float) -> float:
    return min(1.0, (step + 1) / steps) if steps > 0 else 1.0


def _progress(step: int, total_steps: int, warmup: float) -> float:
    start = warmup * total_steps
    return min(1.0, max(0.0, (step - start) / max(1.0, total_steps - start)))
