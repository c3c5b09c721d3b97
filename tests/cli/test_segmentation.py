"""Segmentation through the real entry points."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TINY = (
    "task=segmentation",
    "backbone=resnet20",
    "head=fpn",
    "data.image_size=32",
    "data.train_size=32",
    "data.val_size=9",
    "data.test_size=11",
    "data.batch_size=8",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, trained for one epoch through the entry point."""
    import sys

    from visiontasks.cli import train

    folder = tmp_path_factory.mktemp("runs") / "segmentation"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY, "task.auxiliary=0.4", f"hydra.run.dir={folder}"])
        train.main()
    return folder


def test_a_run_leaves_its_figures_and_pictures(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    for name in ("miou", "pixel_accuracy", "mean_accuracy", "dice", "boundary_f1", "loss"):
        assert 0 <= summary[f"test/{name}"] < 100, name
    assert 0 <= summary["val/miou"] <= 1
    assert list(summary["per_class_iou"]) == ["background", *"0123456789"]
    pictures = {"predictions.png", "mistakes.png", "confusion.png", "per_class_iou.png", "curves.png"}
    assert {path.name for path in run.iterdir()} >= pictures
    assert (run / "validation" / "epoch_000.png").is_file()
    names = [line.split(",")[0] for line in (run / "mistakes.csv").read_text().splitlines()]
    assert names[1].startswith("digit_scenes/0/test/")


def test_evaluation_rebuilds_the_run_and_may_answer_otherwise(run: Path, call: Callable[..., None]) -> None:
    figures = []
    for name, settings in (("plain", []), ("more", ["task.flips=true", "task.scales=[1.0,1.5]", "task.window=24"])):
        call("evaluate", f"run={run}", "trainer=cpu", *settings, f"hydra.run.dir={run / name}")
        figures.append(json.loads((run / name / "summary.json").read_text())["test/loss"])
    trained = json.loads((run / "summary.json").read_text())["test/loss"]
    assert figures[0] == pytest.approx(trained, rel=1e-3)
    assert figures[1] != pytest.approx(trained, rel=1e-6)


def test_predict_writes_masks_of_each_images_own_size(run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    generator = np.random.default_rng(0)
    for name, shape in (("wide", (40, 70)), ("tall", (65, 33))):
        Image.fromarray(generator.integers(0, 256, (*shape, 3), np.uint8)).save(photos / f"{name}.png")
    (photos / "broken.png").write_bytes(b"no image")
    call("predict", f"run={run}", f"input={photos}", f"output={tmp_path / 'out'}", "accelerator=cpu")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["broken.png", "tall.png", "wide.png"]
    assert "error" in lines[0]
    for line, size in zip(lines[1:], ((33, 65), (70, 40)), strict=True):
        with Image.open(tmp_path / "out" / line["mask"]) as mask:
            assert (mask.mode, mask.size) == ("P", size)
            values, counts = np.unique(np.asarray(mask), return_counts=True)
            assert mask.getpalette()[:3] == [0, 0, 0]
        names = ["background", *"0123456789"]
        shares = {names[value]: count / counts.sum() for value, count in zip(values, counts, strict=True)}
        assert line["classes"] == pytest.approx(shares, abs=1e-5)
        assert (tmp_path / "out" / "pictures" / f"{Path(line['mask']).stem}.png").is_file()


def test_a_head_of_another_task_is_refused(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call("train", *TINY, "head=linear", f"hydra.run.dir={tmp_path}")
    assert "task=classification" in capsys.readouterr().err


def test_data_without_masks_is_refused_by_name(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    arguments = ["data=image_folder", f"data.root={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        call("train", "task=segmentation", "backbone=resnet20", *arguments)
    said = capsys.readouterr().err
    assert "mask" in said
    assert "data=mask_folder" in said


def test_balanced_class_weights_come_from_the_training_masks_and_stay_in_the_checkpoint(
    call: Callable[..., None], tmp_path: Path
) -> None:
    import torch

    from visiontasks.cli.build import load_task

    call("train", *TINY, "task.class_weights=balanced", "test=false", f"hydra.run.dir={tmp_path}")
    weights = load_task(tmp_path / "checkpoints" / "last.ckpt").class_weights
    assert isinstance(weights, torch.Tensor)
    assert weights.shape == (11,)
    assert weights[0] < 0.2 * weights[1:].mean()  # the background has most pixels
