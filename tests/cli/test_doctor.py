"""visiontasks doctor on a whole task: a line a check, the exit code, and no run left behind."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import TINY
from visiontasks.cli.doctor import compared, same_config

CHECKS = [
    *("config", "files", "classes", "augmentation", "evaluation", "weights"),
    *("pixels", "loss", "gradients", "frozen", "rates", "overfits", "speed"),
]


def lines(said: str) -> dict[str, str]:
    rows = [line.split(maxsplit=2) for line in said.splitlines() if line.startswith(("ok ", "warning ", "fault "))]
    return {check: status for status, check, _ in rows}


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
def test_a_healthy_task_has_no_fault(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call("train", "doctor=true", *TINY, f"hydra.run.dir={tmp_path / 'run'}")
    said = capsys.readouterr().out
    found = lines(said)
    assert list(found) == CHECKS
    assert {check: status for check, status in found.items() if status == "fault"} == {}
    assert found["augmentation"] == found["evaluation"] == found["gradients"] == found["frozen"] == "ok"
    assert "13 checks in" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "task",
    [
        ["task=segmentation", "head=fcn", "backbone.frozen_stages=1"],
        ["task=detection", "head=fcos", "backbone=resnet18"],
        ["task=pretraining", "head=moco"],
    ],
)
def test_every_task_has_a_doctor(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], task: list[str]
) -> None:
    call("doctor", *TINY, *task, f"hydra.run.dir={tmp_path / 'run'}")
    found = lines(capsys.readouterr().out)
    assert list(found) == CHECKS
    assert "fault" not in found.values()


@pytest.mark.filterwarnings("ignore:.*worker processes in total")
def test_a_fault_is_exit_code_1(call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        call("doctor", *TINY, "optimizer.lr=0", f"hydra.run.dir={tmp_path / 'run'}")
    assert stop.value.code == 1
    assert lines(capsys.readouterr().out)["rates"] == "fault"


def test_other_configs_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compared(["a", "a"]).status == "ok"
    verdict = compared(["a", "a", "b"])
    assert verdict.status == "fault"
    assert "ranks 2 of 3 have another config than rank 0" in verdict.sentence
    monkeypatch.delitem(os.environ, "WORLD_SIZE", raising=False)
    one, first = same_config({"seed": 1, "logger": "runs/a/log"}, Path("runs/a"))
    again, _ = same_config({"seed": 1, "logger": "runs/b/log"}, Path("runs/b"))
    other, _ = same_config({"seed": 2, "logger": "runs/a/log"}, Path("runs/a"))
    assert first
    assert one.status == "ok"
    assert one.sentence == again.sentence != other.sentence
