"""Mistakes that users make: one sentence, what to type instead, exit code 2, no traceback."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

TINY = ("data.train_size=16", "data.val_size=8", "data.test_size=8", "data.batch_size=8", "trainer=cpu")

MISTAKES = {
    "unknown backbone": (["backbone=resnet19"], ["resnet19", "backbone=resnet18"]),
    "unknown option": (["optimizer.lrr=1"], ["optimizer.lrr", "optimizer.lr"]),
    "unknown group": (["optimiser=sgd"], ["optimiser", "optimizer"]),
    "unknown task": (["task=clasification"], ["clasification", "task=classification"]),
    "missing folder": (["data=image_folder", "data.root=no/such/folder"], ["no/such/folder"]),
    "batch larger than the data": ([*TINY, "data.batch_size=64"], ["64", "data.batch_size=16"]),
    "no such weights": (["backbone.weights=no/such.pth"], ["no/such.pth"]),
    "undeclared target": (["optimizer._target_=os.system"], ["os.system", "conf"]),
    "resume from nothing": (["resume=no/such/run"], ["no/such/run", "last.ckpt"]),
    "class weights of other data": ([*TINY, "task.class_weights=[1,2]"], ["2 numbers", "10"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(
    mistake: str, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments, words = MISTAKES[mistake]
    with pytest.raises(SystemExit) as stop:
        call("train", *arguments, f"hydra.run.dir={tmp_path}")
    said = capsys.readouterr().err
    assert stop.value.code == 2
    assert said.startswith("error: ")
    assert len(said.strip().splitlines()) == 1
    assert all(word in said for word in words), said


def test_a_run_that_is_no_longer_finite(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    diverging = ("optimizer=sgd", "optimizer.lr=1e20", "scheduler=constant", "callbacks.non_finite.stop_after=2")
    sizes = (*TINY, "backbone=resnet20", "data.image_size=32", "data.batch_size=4", "trainer.enable_progress_bar=false")
    with pytest.raises(SystemExit) as stop:
        call("train", *sizes, *diverging, f"hydra.run.dir={tmp_path}")
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2
    assert said[-1].startswith("error: 2 steps in a row")
    assert (tmp_path / "non_finite.jsonl").read_text().count("\n") == 2


def test_an_empty_folder(call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        call("train", "data=image_folder", f"data.root={tmp_path}", f"hydra.run.dir={tmp_path / 'run'}")
    assert str(tmp_path) in capsys.readouterr().err


def test_weights_of_another_network(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from torchvision.models import mobilenet_v2

    torch.save(mobilenet_v2().state_dict(), tmp_path / "weights.pth")
    with pytest.raises(SystemExit):
        call("train", *TINY, f"backbone.weights={tmp_path / 'weights.pth'}", f"hydra.run.dir={tmp_path / 'run'}")
    said = capsys.readouterr().err
    assert "missing" in said
    assert "left over" in said


def test_no_network_for_published_weights(
    call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", _unreachable)
    monkeypatch.setattr("torch.hub.urlopen", _unreachable)
    with pytest.raises(SystemExit):
        call("train", *TINY, "backbone.weights=imagenet", f"hydra.run.dir={tmp_path / 'run'}")
    assert "backbone.weights=PATH" in capsys.readouterr().err


def _unreachable(*_: object, **__: object) -> None:
    raise OSError("no network")


def test_debug_shows_where(call: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(Exception, match="resnet19"):
        call("train", "backbone=resnet19", "debug=true", f"hydra.run.dir={tmp_path}")


def test_a_task_that_needs_what_the_data_lacks(tmp_path: Path) -> None:
    from visiontasks.data import MNIST, DigitScenes
    from visiontasks.errors import UsageError

    with pytest.raises(UsageError, match="mask") as refused:
        MNIST(root=str(tmp_path), image_size=28).select(frozenset({"mask"}))
    assert DigitScenes.__name__ in str(refused.value) or "digit_scenes" in str(refused.value)


def test_evaluating_nothing(call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        call("evaluate", f"run={tmp_path}")
    assert "best.ckpt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("evaluate")
    assert "run=PATH" in capsys.readouterr().err
