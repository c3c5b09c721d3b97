import csv
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.conftest import TINY
from visiontasks.callbacks import pictures
from visiontasks.cli.build import load_task, resolved_accelerator
from visiontasks.cli.command_line import CONF, quoted

ROOT = Path(__file__).parents[2]


def test_a_run_leaves_a_folder_to_look_at(finished_run: Path) -> None:
    names = {path.name for path in finished_run.iterdir()}
    pictures = {"curves.png", "predictions.png", "confusion.png"}
    assert names >= {"config.yaml", "command.txt", "metrics.csv", "summary.json", *pictures}
    assert {path.name for path in (finished_run / "checkpoints").iterdir()} == {
        "best.ckpt",
        "last.ckpt",
        "previous.ckpt",
    }
    assert any(name.startswith("events.out.tfevents") for name in names)
    for picture in pictures:
        assert Image.open(finished_run / picture).size[0] > 300


def test_summary_holds_the_figures_by_name(finished_run: Path) -> None:
    summary = json.loads((finished_run / "summary.json").read_text())
    for name in ("test/accuracy", "test/top5", "test/f1", "test/ece", "test/loss", "val/accuracy"):
        assert 0 <= summary[name] < 100
    assert summary["parameters"] > 250_000
    assert summary["images_per_second"] > 0
    assert summary["bad_files"] == {}
    assert torch.__version__.startswith(summary["versions"]["torch"])


def test_metrics_file_has_training_and_validation(finished_run: Path) -> None:
    with (finished_run / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert any(row["train/loss"] for row in rows)
    assert any(row["val/accuracy"] for row in rows)


def test_the_command_repeats_the_run(finished_run: Path) -> None:
    command = (finished_run / "command.txt").read_text()
    assert command.startswith("python train.py backbone=resnet20 data.image_size=32")


def test_the_same_seed_gives_the_same_weights(finished_run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, f"hydra.run.dir={tmp_path}", "test=false")
    first, second = (load_task(run / "checkpoints" / "last.ckpt").state_dict() for run in (finished_run, tmp_path))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_checkpoint_is_plain_data_and_rebuilds_its_task(finished_run: Path) -> None:
    stored = torch.load(finished_run / "checkpoints" / "best.ckpt", weights_only=True)
    assert stored["classes"] == list("0123456789")
    assert stored["config"]["backbone"]["depth"] == 20
    task = load_task(finished_run / "checkpoints" / "best.ckpt")
    assert task.classes == tuple("0123456789")
    assert not task.training
    assert all(name.startswith(("backbone.", "head.")) for name in stored["state_dict"])


def test_resume_goes_on_in_the_same_folder(call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, f"hydra.run.dir={tmp_path}", "test=false")
    call("train", f"resume={tmp_path}", "trainer.max_epochs=2")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (2, 8)
    with (tmp_path / "metrics.csv").open() as lines:
        steps = [int(row["step"]) for row in csv.DictReader(lines) if row["val/accuracy"]]
    assert steps == [3, 7]


def test_a_run_without_validation_is_tested_with_its_last_weights(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    call("train", *TINY, "trainer.limit_val_batches=0", f"hydra.run.dir={tmp_path}")
    assert "no validation ran, so there is no best val/accuracy" in capsys.readouterr().out
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["best/val/accuracy"] is None
    call("evaluate", f"run={tmp_path}")
    assert f"{summary['test/loss']:.4f}" in capsys.readouterr().out


def test_another_run_is_not_written_over(
    finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        call("train", *TINY, f"hydra.run.dir={finished_run}")
    assert "resume=auto" in capsys.readouterr().err


def test_init_from_a_run(
    finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    still = ("optimizer.lr=0", "optimizer.weight_decay=0", "test=false")
    call("train", *TINY, *still, f"init_from={finished_run}", f"hydra.run.dir={tmp_path}")
    assert "100.0% of the parameters" in capsys.readouterr().out
    source, arrived = (load_task(run / "checkpoints" / "best.ckpt").backbone for run in (finished_run, tmp_path))
    names = [name for name, _ in source.named_parameters()]
    assert all(torch.equal(source.state_dict()[name], arrived.state_dict()[name]) for name in names)


OPTIONS = {
    "sgd, step": ["optimizer=sgd", "scheduler=step"],
    "lamb, plateau": ["optimizer=lamb", "scheduler=plateau"],
    "timm, one cycle": ["optimizer=timm", "optimizer.opt=lion", "scheduler=one_cycle"],
    "ema": ["callbacks.ema.decay=0.9"],
    "swa": ["callbacks.swa.lr=0.01", "trainer.max_epochs=2"],
    "early stopping": ["callbacks.early_stopping.patience=1"],
    "mixup and cutmix": ["task.mixup=0.2", "task.cutmix=1.0"],
    "clipping and accumulation": ["trainer.gradient_clip_val=1.0", "trainer.accumulate_grad_batches=2"],
    "float32": ["trainer.precision=32", "channels_last=false"],
    "float16": ["trainer.precision=bf16-mixed", "channels_last=true"],
    "learning-rate finder": ["find_lr=true", "trainer.max_epochs=6"],
    "batch-size finder": ["find_batch_size=true"],
    "step checkpoints": ["callbacks.checkpoint.every_n_train_steps=2"],
    "many labels": ["data=digit_scenes", "data.multi_label=true", "task.multi_label=true"],
    "grey": ["backbone.in_channels=1"],
    "mlp": ["head=mlp"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_train(option: str, call: Callable[..., None], tmp_path: Path) -> None:
    limits = ["trainer.limit_train_batches=3", "trainer.limit_val_batches=1", "trainer.limit_test_batches=1"]
    extra = OPTIONS[option]
    data = [a for a in extra if a.startswith("data=")]
    call("train", *data, *TINY, *limits, *(a for a in extra if a not in data), f"hydra.run.dir={tmp_path}")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["steps"] > 0
    assert summary["test/loss"] == summary["test/loss"]


def test_help_lists_every_choice_without_torch() -> None:
    start = time.perf_counter()
    script = (
        "import sys; sys.argv=['train.py','--help']; import runpy; runpy.run_path('train.py', run_name='__main__');"
    )
    command = [sys.executable, "-c", script + "assert 'torch' not in sys.modules"]
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert time.perf_counter() - start < 30
    for file in CONF.glob("*/*.yaml"):
        if not file.stem.startswith("_") and file.parent.name != "callbacks":
            assert file.stem in shown, file


def test_paths_are_quoted_for_hydra() -> None:
    assert quoted("data.root=my photos, 2024=a") == "data.root='my photos, 2024=a'"
    assert quoted("input=it's") == r"input='it\'s'"
    assert quoted("data.root=/plain/path") == "data.root=/plain/path"
    assert quoted("optimizer.lr=0.1") == "optimizer.lr=0.1"


def test_a_users_own_conf_folder(tmp_path: Path) -> None:
    (tmp_path / "conf" / "backbone").mkdir(parents=True)
    (tmp_path / "conf" / "backbone" / "tiny.yaml").write_text("_target_: mine.Tiny\nwidth: 4\nin_channels: 3\n")
    guide = (ROOT / "CONTRIBUTING.md").read_text()
    (tmp_path / "mine.py").write_text(guide.partition("```python\n")[2].partition("```")[0])
    arguments = ["backbone=tiny", *TINY[1:], f"hydra.run.dir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "visiontasks.cli.main", "train", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["parameters"] < 10_000


def test_evaluate_rebuilds_the_run(finished_run: Path, call: Callable[..., None]) -> None:
    call("evaluate", f"run={finished_run}", "trainer=cpu", "trainer.enable_progress_bar=false")
    (folder,) = (finished_run / "evaluation").iterdir()
    evaluated = json.loads((folder / "summary.json").read_text())
    trained = json.loads((finished_run / "summary.json").read_text())
    assert evaluated["test/accuracy"] == pytest.approx(trained["test/accuracy"], abs=1e-6)
    assert evaluated["test/loss"] == pytest.approx(trained["test/loss"], rel=1e-3)


def test_evaluate_other_data_and_another_split(
    finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    call("evaluate", f"run={finished_run}", "split=val", "data.val_size=10", "trainer=cpu")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["val/"] in lines
    assert any(line[:1] == ["accuracy"] and 0 <= float(line[1]) <= 1 for line in lines)
    with pytest.raises(SystemExit):
        call("evaluate", f"run={finished_run}", "split=validation")
    assert "split=val" in capsys.readouterr().err


def test_predict_writes_lines_and_pictures(finished_run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    photos = tmp_path / "my photos"
    photos.mkdir()
    for index in range(3):
        Image.new("RGB", (50 + index, 40), (index * 80, 0, 0)).save(photos / f"{index}.png")
    (photos / "broken.jpg").write_bytes(b"no picture")
    call("predict", f"run={finished_run}", f"input={photos}", f"output={tmp_path / 'out'}", "accelerator=cpu")
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert [Path(line["file"]).name for line in lines] == ["0.png", "1.png", "2.png", "broken.jpg"]
    assert all(line["class"] in "0123456789" and 0 < line["score"] <= 1 for line in lines[:3])
    assert "error" in lines[3]
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"predictions.png"}
    assert len(list((tmp_path / "out" / "pictures").glob("*.png"))) == 3


def test_bad_files_are_named_and_allowed_up_to_a_share(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn: dict[str, list[tuple[int, float]]] = {}
    monkeypatch.setattr(pictures, "draw_curves", lambda columns, *_: drawn.update(columns))
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for index in range(count):
            file = tmp_path / "photos" / split / "ab"[index % 2] / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 32), (index * 20, 255 - index * 20, 0)).save(file)
    (tmp_path / "photos" / "train" / "b" / "3.png").write_bytes(b"<html>not found</html>")
    data = ["data=image_folder", f"data.root={tmp_path / 'photos'}", "data.image_size=32", "data.batch_size=4"]
    options = [*data, "backbone=resnet20", "trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"]
    with pytest.raises(SystemExit):
        call("train", *options, f"hydra.run.dir={tmp_path / 'strict'}")
    assert "3.png" in capsys.readouterr().err
    lenient = tmp_path / "lenient"
    call("train", *options, "data.max_bad_fraction=0.1", f"hydra.run.dir={lenient}")
    said = capsys.readouterr().out
    assert said.count("bad file   ") == 1
    assert "test/ is of the weights with the best val/accuracy" in said
    summary = json.loads((lenient / "summary.json").read_text())
    assert [Path(name).name for name in summary["bad_files"]] == ["3.png"]
    assert len(drawn["train/loss"]) == summary["epochs"] == 1

    (tmp_path / "photos" / "test" / "b" / "1.png").write_bytes(b"")
    call(
        "evaluate", f"run={lenient}", "trainer=cpu", "data.max_bad_fraction=0.5", f"hydra.run.dir={tmp_path / 'again'}"
    )
    said = capsys.readouterr().out
    assert "data       ImageFolder: 4 test" in said
    assert said.count("bad file   ") == 1
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert [Path(name).name for name in summary["bad_files"]] == ["1.png"]
    assert "steps" not in summary


def test_the_readmes_library_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = (ROOT / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    small = "image_size=32, batch_size=8, train_size=16, val_size=8, test_size=8"
    assert "image_size=64, batch_size=32" in example
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(example.replace("image_size=64, batch_size=32", small), names)
    assert names["trainer"].global_step == 4  # type: ignore[attr-defined]


def test_apples_gpu_which_has_no_float64_is_taken_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolved_accelerator("auto") == "auto"
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: True)
    assert [resolved_accelerator(asked) for asked in ("auto", "mps", "gpu")] == ["cpu", "mps", "gpu"]


@pytest.mark.parametrize(
    ("backbone", "size", "narrow"), [("resnet18", 32, True), ("resnet18", 64, False), ("resnet20", 32, False)]
)
def test_bfloat16_is_left_where_its_gradients_would_be_wrong(
    backbone: str, size: int, narrow: bool, call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("visiontasks.cli.build.native_bfloat16", lambda: True)
    settings = [f"backbone={backbone}", f"data.image_size={size}", "data.train_size=16", "trainer.max_epochs=1"]
    call("train", *TINY, *settings, "test=false", f"hydra.run.dir={tmp_path}")
    precision = json.loads((tmp_path / "summary.json").read_text())["precision"]
    assert precision == ("32-true" if narrow else "bf16-mixed")
