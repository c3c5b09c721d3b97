"""Detection through the real entry points."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from visiontasks.cli import train
from visiontasks.data import DigitScenes

TINY = (
    "task=detection",
    "backbone=resnet18",
    "data.image_size=64",
    "data.train_size=16",
    "data.val_size=5",
    "data.test_size=7",
    "data.batch_size=8",
    "head.width=32",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, trained for one epoch through the entry point."""
    folder = tmp_path_factory.mktemp("runs") / "detection"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY, f"hydra.run.dir={folder}"])
        train.main()
    return folder


def test_a_run_leaves_its_figures_and_pictures(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in ("map", "map_50", "mar_100", "precision", "recall", "f1", "loss", "centreness_loss"):
        assert 0 <= summary[f"test/{name}"] < 100, name
    assert list(summary["per_class_ap"]) == list("0123456789")
    pictures = {"predictions.png", "confusion.png", "per_class_ap.png", "precision_recall.png", "curves.png"}
    pictures |= {"misses.png", "misses.csv"}  # after so few steps every image has some
    assert {path.name for path in run.iterdir()} >= pictures
    assert (run / "validation" / "epoch_000.png").is_file()


def test_evaluation_rebuilds_the_run(run: Path, call: Callable[..., None]) -> None:
    call("evaluate", f"run={run}", "trainer=cpu", f"hydra.run.dir={run / 'again'}")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, run / "again"))
    assert second["test/loss"] == pytest.approx(first["test/loss"], rel=1e-3)
    assert second["test/map"] == pytest.approx(first["test/map"], abs=1e-3)


def test_predict_answers_in_the_pixels_of_each_file(run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    scenes = DigitScenes(image_size=96, train_size=32).source("train")
    Image.fromarray(scenes[0]["image"]).save(photos / "square.png")
    Image.fromarray(np.concatenate([scenes[1]["image"], scenes[2]["image"]], axis=1)).save(photos / "wide.png")
    out = tmp_path / "out"
    call("predict", f"run={run}", f"input={photos}", f"output={out}", "accelerator=cpu", "task.shown=0.0")
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    for line, (width, height) in zip(lines, ((96, 96), (192, 96)), strict=True):
        corners = np.array(line["boxes"]).reshape(-1, 4)
        assert len(corners) == len(line["scores"]) == len(line["classes"]) > 0
        assert (corners >= 0).all()
        assert (corners <= [width, height, width, height]).all()
        assert corners[:, 2].max() > 0.6 * width
    results = json.loads((out / "coco_results.json").read_text())
    assert len(results) == sum(len(line["boxes"]) for line in lines)
    assert {entry["image_id"] for entry in results} == {"square", "wide"}
    assert {entry["category_id"] for entry in results} <= set(range(1, 11))


def test_windows_see_small_objects_of_large_images(run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    settings = ["task.window=32", "task.overlap=0.5"]
    call("evaluate", f"run={run}", "trainer=cpu", *settings, f"hydra.run.dir={tmp_path}")
    assert 0 <= json.loads((tmp_path / "summary.json").read_text())["test/map"] <= 1


def test_masks_of_objects(call: Callable[..., None], tmp_path: Path) -> None:
    small = ["head=mask_rcnn", "head.hidden=32", "head.mask_width=16", "head.proposals=20"]
    call("train", *TINY, *small, f"hydra.run.dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 <= summary["test/mask_map"] <= 1
    assert summary["test/masks_loss"] > 0


def test_a_weight_of_no_loss_is_refused(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call("train", *TINY, "+task.weights.centre=2.0", f"hydra.run.dir={tmp_path}")
    said = capsys.readouterr().err
    assert "centre" in said
    assert "centreness" in said
