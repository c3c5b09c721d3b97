from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visiontasks.callbacks.collapse import CollapseWarning, ModeCollapseWarning
from visiontasks.callbacks.report import warnings

FINE = {"val/feature_std": 0.3, "val/effective_rank": 20.0}


def validated(callback: CollapseWarning, figures: dict[str, float], epoch: int = 0, **state: Any) -> None:
    metrics = {name: torch.tensor(value) for name, value in figures.items()}
    trainer: Any = SimpleNamespace(
        **{"callback_metrics": metrics, "current_epoch": epoch, "is_global_zero": True, "sanity_checking": False}
        | state
    )
    callback.on_validation_end(trainer, None)  # type: ignore[arg-type]


def test_each_gauge_warns_once(capsys: pytest.CaptureFixture[str]) -> None:
    callback = CollapseWarning()
    validated(callback, FINE)
    assert capsys.readouterr().out == ""
    validated(callback, FINE | {"val/feature_std": 0.01}, epoch=3)
    (line,) = capsys.readouterr().out.splitlines()
    assert "Collapse in epoch 3" in line
    assert "val/feature_std is 0.01, below 0.15" in line
    validated(callback, FINE | {"val/feature_std": 0.02}, epoch=4)
    assert capsys.readouterr().out == ""
    validated(callback, {"val/feature_std": 0.02, "val/effective_rank": 1.2}, epoch=5)
    assert "val/effective_rank is 1.2, below 2" in capsys.readouterr().out


def test_the_summary_and_a_resumed_run_know_the_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = CollapseWarning(), CollapseWarning()
    validated(first, FINE | {"val/effective_rank": 1.0})
    second.load_state_dict(first.state_dict())
    capsys.readouterr()
    validated(second, FINE | {"val/effective_rank": 1.0}, epoch=7)
    assert capsys.readouterr().out == ""
    told: Any = SimpleNamespace(callbacks=[object(), second])
    assert warnings(told) == [first.warnings["val/effective_rank"]]


@pytest.mark.parametrize("figures", [{}, FINE])
def test_nothing_is_said_of_what_is_not_measured_or_fine(
    figures: dict[str, float], capsys: pytest.CaptureFixture[str]
) -> None:
    validated(CollapseWarning(), figures)
    validated(CollapseWarning(), {"val/feature_std": 0.0}, sanity_checking=True)
    assert capsys.readouterr().out == ""


def test_a_figure_that_is_no_number_warns(capsys: pytest.CaptureFixture[str]) -> None:
    validated(CollapseWarning(), {"val/feature_std": float("nan")})
    assert "val/feature_std is nan" in capsys.readouterr().out


def sampled(callback: ModeCollapseWarning, *values: float | None, **state: Any) -> None:
    """One validation after the other, with what it measures."""
    module: Any = SimpleNamespace(metrics=SimpleNamespace(prepare=lambda: SimpleNamespace(name="random")))
    for epoch, value in enumerate(values):
        metrics = {} if value is None else {"val/vendi_random": torch.tensor(value)}
        told = {"callback_metrics": metrics, "current_epoch": epoch, "is_global_zero": True, "sanity_checking": False}
        trainer: Any = SimpleNamespace(**told | state)
        callback.on_validation_end(trainer, module)


def test_samples_that_stay_alike_are_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    sampled(ModeCollapseWarning(), 0.1, 0.2, 0.9, 0.3, 0.4, None)
    sampled(ModeCollapseWarning(), 0.1, 0.1, 0.1, 0.1, sanity_checking=True)
    sampled(ModeCollapseWarning(), 0.1, 0.2, 0.3, 0.35, 0.4, 0.45)  # a generator that learns
    assert capsys.readouterr().out == ""
    sampled(ModeCollapseWarning(), 0.9, 0.3, 0.2, 0.1, 0.1, 0.9, 0.1, 0.1, 0.1)
    (line,) = capsys.readouterr().out.splitlines()
    assert "Mode collapse in epoch 3" in line
    assert "val/vendi_random is 0.1, below 0.5 3 times in a row" in line


def test_a_resumed_run_counts_on(capsys: pytest.CaptureFixture[str]) -> None:
    first, second = ModeCollapseWarning(), ModeCollapseWarning()
    sampled(first, 0.1, 0.1)
    second.load_state_dict(first.state_dict())
    sampled(second, 0.1, 0.1)
    assert "Mode collapse" in capsys.readouterr().out
    told: Any = SimpleNamespace(callbacks=[second])
    assert len(warnings(told)) == 1
