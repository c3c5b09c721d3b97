"""Transfers through the real entry points: sources, receipts, the table of tasks, several processes, the study."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision
from hydra import compose, initialize_config_dir
from PIL import Image

from tests.cli.conftest import TINY
from visiontasks.backbones import TorchvisionBackbone
from visiontasks.cli import train
from visiontasks.cli.build import build_task, load_task, plain
from visiontasks.cli.command_line import CONF
from visiontasks.layers.freezing import stage_parameters
from visiontasks.weights import load_backbone

ROOT = Path(__file__).parents[2]
TASKS = sorted(file.stem for file in (CONF / "task").glob("*.yaml"))
SMALL = (
    *(word for word in TINY if not word.startswith("data.")),
    *("data.image_size=32", "data.train_size=16", "data.val_size=8", "data.test_size=8", "data.batch_size=8"),
    "test=false",
)
ANY_TASK = (*SMALL, "backbone=resnet18", "data.image_size=64")


def test_a_run_leaves_its_receipt(finished_run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, f"init_from={finished_run}", f"hydra.run.dir={tmp_path}", "test=false")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    stored = torch.load(finished_run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert receipt["arrived"] == [name.removeprefix("backbone.") for name in stored if name.startswith("backbone.")]
    assert {name.removeprefix("state_dict.") for name in receipt["left_over"]} >= {n for n in stored if "head." in n}
    assert (receipt["missing"], receipt["share"]) == ([], 1.0)


def test_published_weights_of_either_library(
    call: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    cache = tmp_path / "home" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    network = torchvision.models.squeezenet1_1()
    url = torchvision.models.get_model_weights("squeezenet1_1").DEFAULT.url
    torch.save(network.state_dict(), cache / Path(url).name)
    still = ("backbone=squeezenet1_1", "optimizer.lr=0", "optimizer.weight_decay=0")
    for source in ("imagenet", "torchvision:squeezenet1_1"):
        folder = tmp_path / source.replace(":", "_")
        call("train", *SMALL[1:], *still, f"init_from={source}", f"hydra.run.dir={folder}")
        arrived = load_task(folder / "checkpoints" / "last.ckpt").backbone.state_dict()
        assert torch.equal(arrived["net.features.0.weight"], network.state_dict()["features.0.weight"])
        assert json.loads((folder / "receipt.json").read_text())["source"] == source


def test_less_than_all_is_refused_with_the_words_to_type(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], finished_run: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call("train", *SMALL, "backbone=resnet32", f"init_from={finished_run}", f"hydra.run.dir={tmp_path / 'a'}")
    said = capsys.readouterr().err
    assert "init_allow_missing=[layer1,layer2,layer3]" in said
    allowed = "init_allow_missing=[layer1,layer2,layer3]"
    call("train", *SMALL, "backbone=resnet32", f"init_from={finished_run}", allowed, f"hydra.run.dir={tmp_path / 'b'}")
    assert 0 < json.loads((tmp_path / "b" / "receipt.json").read_text())["share"] < 1


def test_what_stays_must_come_from_somewhere(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call("train", *SMALL, "transfer=frozen", f"hydra.run.dir={tmp_path}")
    assert "init_from=PATH" in capsys.readouterr().err


@pytest.mark.parametrize("transfer", sorted(file.stem for file in (CONF / "transfer").glob("[!_]*.yaml")))
def test_every_transfer_trains(
    transfer: str, finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    epochs = 4 if transfer == "gradual" else 2
    words = [f"transfer={transfer}", f"trainer.max_epochs={epochs}", f"init_from={finished_run}"]
    call("train", *(word for word in SMALL if "max_epochs" not in word), *words, f"hydra.run.dir={tmp_path}")
    task = load_task(tmp_path / "checkpoints" / "last.ckpt")
    source = load_task(finished_run / "checkpoints" / "best.ckpt").backbone.state_dict()
    same = {
        name.split(".")[1] for name, tensor in task.backbone.state_dict().items() if torch.equal(tensor, source[name])
    }
    stay = {
        "frozen": {"conv1", "bn1", "layer1", "layer2", "layer3"},
        "last_stages": {"conv1", "bn1", "layer1", "layer2"},
    }
    expected = stay["frozen"] if transfer == "auto" else stay.get(transfer, set())
    assert same == expected
    assert len(task.backbone.levels) == (2 if transfer == "cut" else 3)
    assert ("16 training images (fewer than 5,000), similar" in capsys.readouterr().out) == (transfer == "auto")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny run of every task."""
    folders = {task: tmp_path_factory.mktemp("sources") / task for task in TASKS}
    with pytest.MonkeyPatch.context() as patch:
        for task, folder in folders.items():
            patch.setattr(sys, "argv", ["train.py", f"task={task}", *ANY_TASK, f"hydra.run.dir={folder}"])
            train.main()
    return folders


@pytest.mark.parametrize("target", TASKS)
def test_every_task_is_a_source_of_every_other(target: str, sources: dict[str, Path]) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", [f"task={target}", *ANY_TASK, "~callbacks", "~logger"])
    config = plain(composed)
    for folder in sources.values():
        task = build_task(config, classes=tuple("0123456789"))
        receipt = load_backbone(task.backbone, folder)
        stored = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
        assert (receipt.share, receipt.missing) == (1.0, ())
        for name, tensor in task.backbone.state_dict().items():
            assert torch.equal(tensor, stored[f"backbone.{name}"]), name


PLAIN = (  # no batch norm, whose statistics are each process's own
    "backbone=squeezenet1_1",
    "data.image_size=32",
    "data.train_size=32",
    "data.val_size=8",
    "trainer.max_epochs=4",
    "trainer.precision=32",
    "trainer.enable_progress_bar=false",
    "optimizer=sgd",
    "optimizer.lr=0.05",
    "optimizer.momentum=0.5",
    "scheduler=constant",
    "transfer=gradual",
    "augment=none",  # squeezenet makes much of rounding on augmented images: 5e-3 to 7e-2 apart, 1e-6 without
    "test=false",
)


@pytest.mark.exhaustive
def test_stages_that_learn_later_are_synchronised(call: Callable[..., None], tmp_path: Path) -> None:
    torch.manual_seed(0)
    backbone = TorchvisionBackbone(name="squeezenet1_1")
    torch.save(backbone.state_dict(), tmp_path / "start.pth")
    words = (*PLAIN, f"init_from={tmp_path / 'start.pth'}")
    call("train", *words, "trainer=cpu", "data.batch_size=16", f"hydra.run.dir={tmp_path / 'one'}")
    command = [sys.executable, "train.py", *words, "trainer=ddp_cpu", "data.batch_size=8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"hydra.run.dir={tmp_path / 'two'}"], cwd=ROOT, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    one, two = (load_task(tmp_path / name / "checkpoints" / "last.ckpt").state_dict() for name in ("one", "two"))
    for stage in stage_parameters(backbone):
        before, first, second = (
            torch.cat([state[prefix + name].flatten() for name in stage])
            for state, prefix in ((backbone.state_dict(), ""), (one, "backbone."), (two, "backbone."))
        )
        learnt, apart = (first - before).norm(), (first - second).norm()
        assert apart < 0.01 * learnt, (stage[0], learnt, apart)  # without synchronisation about as far as it learnt


def test_the_study_compares_six_runs(
    finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [*TINY, f"init_from={finished_run}", "transfer=frozen", "transfer_study=true"]
    call("train", *words, f"hydra.run.dir={tmp_path}")
    assert capsys.readouterr().out.count("1% of the training images, repeated") == 2
    with (tmp_path / "study.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [(row["labels"], row["start"]) for row in rows] == [
        (labels, start) for labels in ("0.01", "0.1", "1.0") for start in ("scratch", "transferred")
    ]
    for row in rows:
        folder = tmp_path / f"{row['start']}_{float(row['labels']):.0%}".replace("%", "_percent")
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["steps"] == 4
        assert summary["test/accuracy"] == pytest.approx(float(row["test/accuracy"]))
        assert (folder / "receipt.json").exists() == (row["start"] == "transferred")
        assert ("init_from=" in (folder / "command.txt").read_text()) == (row["start"] == "transferred")
    assert Image.open(tmp_path / "study.png").size[0] > 300
    capsys.readouterr()
    call("train", f"resume={tmp_path}")
    assert "transferred minus scratch" in capsys.readouterr().out
    with (tmp_path / "study.csv").open() as lines:
        assert list(csv.DictReader(lines)) == rows


def test_a_study_of_nothing_is_refused(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call("train", *TINY, "transfer_study=true", f"hydra.run.dir={tmp_path}")
    assert "nothing to transfer" in capsys.readouterr().err


FINDERS = ("transfer=linear_probe_then_finetune", "find_lr=true", "trainer.max_epochs=60")


@pytest.mark.exhaustive
def test_the_finders_leave_the_plan_as_it_was(
    finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    few = (f"init_from={finished_run}", f"hydra.run.dir={tmp_path}", "trainer.limit_train_batches=2")
    call("train", *(word for word in SMALL if "max_epochs" not in word), *FINDERS, *few)
    source, found = (
        load_task(run / "checkpoints" / name).backbone.state_dict()
        for run, name in ((finished_run, "best.ckpt"), (tmp_path, "last.ckpt"))
    )
    assert not any(torch.equal(found[name], source[name]) for name in source if "conv" in name)
    assert capsys.readouterr().out.count("from epoch 30;") == 3


def test_an_average_of_what_is_frozen_is_what_it_was(
    finished_run: Path, call: Callable[..., None], tmp_path: Path
) -> None:
    call(
        "train",
        *SMALL,
        "transfer=frozen",
        "callbacks.ema.decay=0.9",
        f"init_from={finished_run}",
        f"hydra.run.dir={tmp_path}",
    )
    source, found = (
        load_task(run / "checkpoints" / name).backbone.state_dict()
        for run, name in ((finished_run, "best.ckpt"), (tmp_path, "last.ckpt"))
    )
    assert all(torch.equal(found[name], source[name]) for name in source)


def test_an_average_that_estimates_statistics_anew_is_refused(
    finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ("transfer=frozen", "callbacks.swa.lr=0.01", f"init_from={finished_run}")
    with pytest.raises(SystemExit):
        call("train", *SMALL, *words, f"hydra.run.dir={tmp_path}")
    assert "of frozen stages too" in capsys.readouterr().err
