"""A run that was ended anywhere goes on to the same bits."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.survival import PATIENCE, Death, Run, compared, seen_once
from tests.cli.conftest import TINY
from visiontasks import durable
from visiontasks.callbacks.report import Report
from visiontasks.cli import train
from visiontasks.cli.build import read_checkpoint
from visiontasks.cli.train import resume_from
from visiontasks.contracts import UsageError

ROOT = Path(__file__).parents[2]
QUIET = (
    *("contact_sheets", "confusion_matrix", "precision_recall", "class_bars", "learning_curves"),
    *("embeddings",),
)
SHORT = (
    *("data.train_size=24", "data.val_size=6", "data.test_size=6", "data.batch_size=4", "trainer.max_epochs=2"),
    *("trainer.log_every_n_steps=3", "test=false", "logger=csv", "callbacks.ema.decay=0.9", "resume=auto"),
    "callbacks.checkpoint.every_n_train_steps=1",
)
CASES = {
    "classification": (
        *("head=mlp", "task.mixup=0.2", "task.cutmix=1.0", "trainer.val_check_interval=0.5", "scheduler=plateau"),
        *("scheduler.patience=0", "trainer.accumulate_grad_batches=2"),
    ),
    "pretraining": ("head=moco", "head.queue=16", "data.probe_images=8", "trainer.val_check_interval=4"),
}
MOMENTS = {  # of which method, and at which of its calls, the run ends
    "after a step": (Report, "on_train_batch_end", 8),
    "within an accumulation": (Report, "on_train_batch_end", 5),
    "in a validation in mid-epoch": (Report, "on_validation_batch_end", 2),
    "in the validation of an epoch": (Report, "on_validation_batch_end", 3),
    "in a save": (durable, "_write", 3),
    "between a save's renames": (durable, "_sync", 3),
    "before the first save": (Report, "on_train_batch_end", 1),
    "when training has ended": (Report, "summary", 1),
}


class _Death(BaseException):
    """Ends a run as a signal would: nothing catches it."""


def arguments(task: str, folder: Path) -> tuple[str, ...]:
    quiet = [f"callbacks.{name}=null" for name in QUIET if name != "embeddings" or task == "pretraining"]
    return (f"task={task}", *TINY, *SHORT, *CASES[task], *quiet, f"hydra.run.dir={folder}")


def note_samples(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Has each run write down what it learnt, as the benchmark does."""
    from benchmarks.survival import noting_samples

    patch.setattr(Report, "on_train_batch_end", noting_samples(Report.on_train_batch_end, folder, rank=0))


@pytest.fixture(scope="module", params=CASES)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A task, and the folder of a run of it that nothing ended."""
    folder = tmp_path_factory.mktemp("uninterrupted") / request.param
    with pytest.MonkeyPatch.context() as patch:
        note_samples(patch, folder)
        patch.setattr(sys, "argv", ["train.py", *arguments(request.param, folder)])
        train.main()
    return request.param, folder


@contextmanager
def ending(moment: str, end: Callable[[], None]) -> Iterator[None]:
    """Within it something happens at a moment of a run."""
    owner, name, number = MOMENTS[moment]
    method, calls = getattr(owner, name), [0]

    def counted(*given: Any, **options: Any) -> Any:
        result = method(*given, **options)
        calls[0] += 1
        if calls[0] == number:
            end()
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield


def die() -> None:
    raise _Death


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_that_ends_anywhere_goes_on_to_the_same_bits(
    reference: tuple[str, Path], moment: str, call: Callable[..., None], tmp_path: Path
) -> None:
    task, uninterrupted = reference
    if task != "classification" and moment not in {"after a step", "in a validation in mid-epoch"}:
        pytest.skip("one task goes through all moments")

    with pytest.MonkeyPatch.context() as patch:
        note_samples(patch, tmp_path)
        with ending(moment, die), pytest.raises(_Death):
            call("train", *arguments(task, tmp_path))
        call("train", *arguments(task, tmp_path))
    assert compared(uninterrupted, tmp_path) == []
    assert seen_once(tmp_path)


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGTERM, "after a step"), (signal.SIGINT, "in the validation of an epoch")],
)
def test_a_signal_saves_the_step_and_says_so(
    number: int, moment: str, call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    never = "callbacks.checkpoint.every_n_train_steps=null"
    before = signal.getsignal(number)
    with ending(moment, lambda: os.kill(os.getpid(), number)), pytest.raises(SystemExit) as stopped:
        call("train", *arguments("classification", tmp_path), never)
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) == before
    assert f"stopped    by {signal.Signals(number).name}: type resume={tmp_path}" in capsys.readouterr().out
    stored = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    done = stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["processed"]
    assert (stored["epoch"], done) == ((1, 2) if moment == "after a step" else (0, 6))


@pytest.mark.parametrize(
    ("number", "moment", "processes"),
    [
        (signal.SIGTERM, "step", 1),
        (signal.SIGTERM, "validation", 1),
        (signal.SIGINT, "step", 1),
        pytest.param(signal.SIGTERM, "step", 2, marks=pytest.mark.exhaustive),
        pytest.param(signal.SIGINT, "validation", 2, marks=pytest.mark.exhaustive),
    ],
)
def test_a_signal_to_the_whole_group_leaves_the_workers_to_the_run(
    number: int, moment: str, processes: int, reference: tuple[str, Path], one_thread: None, tmp_path: Path
) -> None:
    if reference[0] != "classification":
        pytest.skip("one task is enough")
    run = Run(tmp_path / "run", "classification", processes, workers=2)
    assert run.live(Death(moment, 2, by=number, group=True)) == 128 + number
    assert run.left < PATIENCE
    *_, last = said = (run.folder / "log.txt").read_text().splitlines()
    assert last == f"stopped    by {signal.Signals(number).name}: type resume={run.folder} to go on"
    assert not [line for line in said if "Traceback" in line or "worker" in line]
    assert read_checkpoint(run.folder / "checkpoints" / "last.ckpt")["global_step"] == (2 if moment == "step" else 3)


def test_an_epoch_is_not_gone_on_with_in_other_batches(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ending("after a step", die), pytest.raises(_Death):
        call("train", *arguments("classification", tmp_path))
    with pytest.raises(SystemExit):
        call("train", *arguments("classification", tmp_path), "data.batch_size=8")
    assert "type data.batch_size=4 trainer.devices=1" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    reference: tuple[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(reference[1], folder)
    last, previous = (folder / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    assert resume_from("auto", folder) == last
    for file in (last, previous):
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 4
        file.write_bytes(data)
        with pytest.raises(UsageError, match=f"{file} is damaged"):
            read_checkpoint(file)
        if file == last:
            assert resume_from("auto", folder) == previous
            said = capsys.readouterr().out
            assert f"{last} is damaged" in said
            assert f"Going on from {previous}" in said
    with pytest.raises(UsageError, match="Nothing is left to go on from"):
        resume_from("auto", folder)


def test_steps_draw_from_seed_epoch_and_batch_alone(reference: tuple[str, Path]) -> None:
    from visiontasks.cli.build import load_task

    task = load_task(reference[1] / "checkpoints" / "last.ckpt")
    drawn = []
    for batch in (3, 4, 3):
        torch.rand(batch)
        task.on_train_batch_start({}, batch)
        drawn.append(torch.rand(2).tolist())
    assert drawn[0] == drawn[2] != drawn[1]


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("task", ["classification", "segmentation", "detection", "pretraining"])
def test_random_kills(task: str, processes: int) -> None:
    survive("--task", task, "--kills", "4", "--processes", str(processes), "--workers", "1")


@pytest.mark.exhaustive
def test_preemptions_and_damages() -> None:
    survive("--sigterm", "8", "--workers", "1", "--saves", "100", "--mutations", "300")


def survive(*options: str) -> None:
    command = [sys.executable, "benchmarks/survival.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
