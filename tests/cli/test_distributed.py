"""Two gloo processes see the batches, take the steps and count the samples that one process would."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visiontasks.cli.build import load_task

ROOT = Path(__file__).parents[2]
PLAIN = (  # no batch norm, whose statistics are each process's own
    "backbone=vgg11",
    "data.image_size=32",
    "data.train_size=64",
    "data.val_size=10",
    "data.test_size=21",
    "trainer.max_epochs=2",
    "trainer.precision=32",
    "trainer.enable_progress_bar=false",
    "optimizer=sgd",
    "optimizer.lr=0.01",
    "optimizer.momentum=0.5",
    "task.class_weights=[1,2,3,4,5,5,4,3,2,1]",
)


def run(folder: Path, *arguments: str) -> dict[str, float]:
    command = [sys.executable, "train.py", *PLAIN, *arguments, f"hydra.run.dir={folder}"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "summary.json").read_text())  # type: ignore[no-any-return]


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    one = run(tmp_path / "one", "trainer=cpu", "data.batch_size=16")
    two = run(tmp_path / "two", "trainer=ddp_cpu", "data.batch_size=8")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert one["steps"] == two["steps"] == 8
    for name in ("test/accuracy", "test/loss", "test/f1", "test/ece", "val/loss"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name
    assert two["test/accuracy"] * 21 == pytest.approx(round(two["test/accuracy"] * 21), abs=1e-4)
    first, second = (load_task(tmp_path / name / "checkpoints" / "last.ckpt").state_dict() for name in ("one", "two"))
    difference = torch.cat([(first[name] - second[name]).flatten() for name in first]).norm()
    assert difference / torch.cat([value.flatten() for value in first.values()]).norm() < 1e-5


@pytest.mark.exhaustive
def test_batch_norms_of_two_processes_are_one(tmp_path: Path) -> None:
    normed = ("backbone=resnet20", "trainer.max_epochs=1", "trainer.sync_batchnorm=true")
    one = run(tmp_path / "one", *normed, "trainer=cpu", "data.batch_size=16")
    two = run(tmp_path / "two", *normed, "trainer=ddp_cpu", "data.batch_size=8")
    for name in ("val/loss", "test/loss"):
        assert two[name] == pytest.approx(one[name], rel=5e-4), name
