from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visiontasks.callbacks.collapse import CollapseWarning
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
