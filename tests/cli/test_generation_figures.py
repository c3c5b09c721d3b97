"""Figures and pictures of generation through the entry points."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
TINY = (
    *("task=generation", "backbone=resnet20", "head.generator.width=8", "data.train_size=64", "data.val_size=40"),
    *("data.test_size=21", "data.batch_size=16", "trainer=cpu", "trainer.max_epochs=2"),
    *("trainer.enable_progress_bar=false", "task.measured=30"),
)


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", ["dcgan", "cgan"])
def test_a_run_is_measured_and_drawn(
    head: str, call: Callable[..., None], finished_run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call("train", *TINY, f"head={head}", f"task.extractor={finished_run}", f"hydra.run.dir={tmp_path}")
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    name = "resnet20_digit_scenes"
    assert f"at most 30 images and as many samples, in the features of {name}" in said
    assert summary["val/fid"] == summary[f"val/fid_{name}"] > 0
    assert summary[f"val/inception_score_{name}"] >= 1
    assert (summary["extractor"], summary["extractor_source"]) == (name, str(finished_run))
    assert summary["samples_compared"] == 21  # of the test
    for picture in ("samples/epoch_000.png", "samples/epoch_001.png", "interpolations.png", "nearest.png"):
        assert Image.open(tmp_path / picture).size > (200, 200)
    assert Image.open(tmp_path / "samples.gif").n_frames == 2
    call("evaluate", f"run={tmp_path}", "task.extractor=random", f"hydra.run.dir={tmp_path / 'again'}")
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["test/fid"] == again["test/fid_random"] != summary["test/fid"]


@pytest.mark.exhaustive
def test_figures_are_the_same_on_two_processes(call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, "test=false", "watch=none", f"hydra.run.dir={tmp_path / 'run'}")
    one, two = (evaluated(tmp_path, trainer) for trainer in ("cpu", "ddp_cpu"))
    figures = [name for name in one if name.startswith("test/")]
    assert (one["processes"], two["processes"], len(figures)) == (1, 2, 9)
    assert {name: two[name] for name in figures} == pytest.approx({name: one[name] for name in figures}, abs=2e-6)


def evaluated(folder: Path, trainer: str) -> dict[str, float]:
    """The summary of the run's evaluation under a trainer."""
    where = f"hydra.run.dir={folder / trainer}"
    command = [
        sys.executable,
        "evaluate.py",
        f"run={folder / 'run'}",
        f"trainer={trainer}",
        "trainer.precision=32",
        where,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / trainer / "summary.json").read_text())  # type: ignore[no-any-return]
