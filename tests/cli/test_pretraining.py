"""Pretraining through the real entry points."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiontasks.cli import train
from visiontasks.cli.build import load_task
from visiontasks.data import DigitScenes

ROOT = Path(__file__).parents[2]
TINY = (
    "task=pretraining",
    "backbone=resnet20",
    "data.image_size=32",
    "data.train_size=32",
    "data.val_size=12",
    "data.test_size=9",
    "data.batch_size=16",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
)
HEADS = {
    "moco": ["head.queue=64"],
    "moco_v3": ["head.hidden=32"],
    "byol": ["head.hidden=32", "optimizer=lars", "task.reference_batch=256"],
    "simsiam": ["head.dim=32", "head.hidden=16", "task.checkpointing=true"],
    "barlow_twins": ["head.dim=32"],
    "vicreg": ["head.dim=32", "trainer.accumulate_grad_batches=2"],
    "swav": ["head.hidden=32", "head.prototypes=20", "head.queue=32"],
    "dino": ["head.hidden=32", "head.outputs=64", "task.final_weight_decay=0.4"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of BYOL, trained for one epoch through the entry point."""
    folder = tmp_path_factory.mktemp("runs") / "pretraining"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY, "head=byol", "head.hidden=32", f"hydra.run.dir={folder}"])
        train.main()
    return folder


def test_a_run_leaves_its_figures_and_pictures(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in ("loss", "feature_std", "effective_rank", "alignment", "uniformity"):
        assert np.isfinite(summary[f"test/{name}"]), name
    assert 0 <= summary["best/val/knn"] <= 1
    assert (run / "validation" / "epoch_000.png").is_file()
    assert Image.open(run / "predictions.png").size[0] > 300


def test_evaluation_rebuilds_the_run(run: Path, call: Callable[..., None]) -> None:
    call("evaluate", f"run={run}", "trainer=cpu", f"hydra.run.dir={run / 'again'}")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, run / "again"))
    assert second["test/loss"] == pytest.approx(first["test/loss"], rel=1e-3)
    assert second["test/feature_std"] == pytest.approx(first["test/feature_std"], rel=1e-3)


def test_the_backbone_starts_another_task(run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    words = [word for word in TINY if word != "task=pretraining"]
    call("train", *words, f"init_from={run}", "transfer=frozen", "test=false", f"hydra.run.dir={tmp_path}")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["share"], receipt["missing"]) == (1.0, [])
    source = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    arrived = load_task(tmp_path / "checkpoints" / "last.ckpt").backbone.state_dict()
    for name, value in arrived.items():
        assert torch.equal(value, source[f"backbone.{name}"]), name
    first = next(iter(arrived))
    assert not torch.equal(source[f"teacher.backbone.{first}"], arrived[first])


def test_predict_embeds_each_image(run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    scenes = DigitScenes(image_size=48, train_size=32).source("train")
    for at in range(2):
        Image.fromarray(scenes[at]["image"]).save(photos / f"{at}.png")
    (photos / "broken.png").write_bytes(b"no image")
    call("predict", f"run={run}", f"input={photos}", f"output={tmp_path / 'out'}", "accelerator=cpu", "pictures=false")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    rows = np.array([line["embedding"] for line in lines if "embedding" in line])
    assert rows.shape == (2, 64)
    assert np.allclose(np.load(tmp_path / "out" / "embeddings.npy"), rows, atol=1e-5)


def test_without_labels_the_loss_is_watched_and_said(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    scenes = DigitScenes(image_size=32, train_size=40).source("train")
    for at in range(40):
        Image.fromarray(scenes[at]["image"]).save(photos / f"{at}.png")
    data = ["data=image_folder", f"data.root={photos}", "data.val_fraction=0.2"]
    words = [word for word in TINY if not word.startswith("data.") or "image_size" in word or "batch" in word]
    call("train", *words, *data, "test=false", f"hydra.run.dir={tmp_path / 'run'}")
    said = capsys.readouterr().out
    assert "monitor    val/loss: val/knn is measured on labels, by watch=probes" in said
    assert "best/val/loss" in json.loads((tmp_path / "run" / "summary.json").read_text())


def test_a_head_of_another_task_is_refused(call: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("train", *TINY, "head=linear", "augment=simclr")
    assert "serves task=classification" in capsys.readouterr().err


def test_views_of_another_method_are_refused(call: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("train", *TINY, "head=byol", "head.hidden=32", "augment=classification")
    assert "makes 0: type augment=byol" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", HEADS)
def test_every_method_runs_on_its_papers_views(head: str, call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, f"head={head}", *HEADS[head], f"hydra.run.dir={tmp_path}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert np.isfinite(summary["test/loss"])
    assert summary["test/feature_std"] > 0


@pytest.mark.exhaustive
def test_two_processes_pretrain_as_one(tmp_path: Path) -> None:
    settings = ["head=byol", "head.hidden=32", "optimizer=sgd", "optimizer.lr=0.001", "trainer.precision=32"]
    summaries = []
    for name, words in {
        "one": ["trainer=cpu", "data.batch_size=16"],
        "two": ["trainer=ddp_cpu", "data.batch_size=8"],
    }.items():
        command = [sys.executable, "train.py", *TINY, *settings, *words, f"hydra.run.dir={tmp_path / name}"]
        limited = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=limited, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        summaries.append(json.loads((tmp_path / name / "summary.json").read_text()))
    one, two = summaries
    assert (one["processes"], two["processes"]) == (1, 2)
    for figure in ("val/loss", "val/feature_std", "val/uniformity", "val/knn", "test/alignment", "test/loss"):
        assert two[figure] == pytest.approx(one[figure], rel=1e-3), figure
