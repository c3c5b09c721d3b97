"""What survives: runs that are killed at random go on to the same bits, and no damaged checkpoint is used.

    python benchmarks/survival.py --task classification --kills 20 [--processes 2]     histories with SIGKILLs
    python benchmarks/survival.py --task classification --sigterm 20 [--processes 2]   preemptions, half to the group
    python benchmarks/survival.py --saves 100        kills within saves, temporary files elsewhere, a full disk
    python benchmarks/survival.py --mutations 300    bit flips, cuts and swaps of a checkpoint

Everything is imported once; each run is a fork of this process, which keeps to one thread: a forked child of a torch
with several would hang. Each is a run of train.py from its command line, and at two processes its launcher starts the
second one as it would, but by a fork.
"""

import argparse
import errno
import importlib
import json
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from visiontasks import durable
from visiontasks.callbacks.report import Report
from visiontasks.cli import rank, ranks, train
from visiontasks.cli.train import good_checkpoint
from visiontasks.errors import UsageError

COMMON = (
    *("backbone=resnet20", "data.image_size=32", "data.val_size=8", "data.test_size=8", "data.batch_size=4"),
    *(
        "trainer.max_epochs=2",
        "trainer.enable_progress_bar=false",
        "trainer.precision=32",
        "trainer.log_every_n_steps=2",
    ),
    *("test=false", "logger=csv", "callbacks.checkpoint.every_n_train_steps=3", "callbacks.ema.decay=0.9"),
    *("callbacks.contact_sheets=null", "callbacks.confusion_matrix=null", "callbacks.precision_recall=null"),
    *("callbacks.class_bars=null", "callbacks.learning_curves=null", "hydra.output_subdir=null"),
)
TASKS = {
    "classification": (
        *("head=mlp", "task.mixup=0.2", "task.cutmix=1.0", "data.train_size=24", "trainer.val_check_interval=0.5"),
        *("scheduler=one_cycle", "trainer.gradient_clip_val=1.0", "callbacks.early_stopping.patience=5"),
    ),
    "segmentation": (
        *("head=deeplabv3plus", "data.train_size=28", "scheduler=plateau", "scheduler.patience=0"),
        *("trainer.accumulate_grad_batches=2", "optimizer=sgd"),
    ),
    "detection": ("backbone=resnet18", "data.image_size=64", "data.train_size=16", "head=faster_rcnn", "head.width=32"),
    "generation": (
        *(
            "head=sngan",
            "head.critic_steps=2",
            "head.generator.width=8",
            "data.train_size=28",
            "callbacks.nearest=null",
        ),
        *("trainer.accumulate_grad_batches=2", "trainer.val_check_interval=0.5", "trainer.gradient_clip_val=10"),
    ),
    "pretraining": (
        *("head=moco", "head.queue=64", "data.train_size=64", "trainer.val_check_interval=4", "data.batch_size=8"),
        *("callbacks.embeddings=null", "data.probe_images=16", "callbacks.probes.every_n_epochs=2"),
    ),
}
MODULES = (
    *(f"visiontasks.{name}" for name in ("backbones", "callbacks", "cli.build", "data", "heads", "losses", "tasks")),
    *("albumentations", "hydra", "hydra._internal.hydra", "hydra.core.config_store", "hydra.core.hydra_config"),
    *("hydra._internal.core_plugins.basic_launcher", "visiontasks.heads.detection.faster_rcnn", "faster_coco_eval"),
)
MOMENTS = ("save", "validation", "step", "time")
PATIENCE = 10.0  # seconds in which nothing may be left of a killed run
LIMIT = 900.0  # seconds that a run may take at most


@dataclass(frozen=True)
class Death:
    """When a process ends itself: at the n-th event of a kind, a little later."""

    moment: str
    number: int
    delay: float = 0.0
    rank: int = 0
    by: int = signal.SIGKILL
    group: bool = False  # the signal goes to all processes of the run, data workers and ranks included

    def tick(self, moment: str, counts: dict[str, int]) -> None:
        counts[moment] = counts.get(moment, 0) + 1
        if moment != self.moment or counts[moment] != self.number:
            return
        if self.delay:
            threading.Timer(self.delay, self._come).start()
        else:
            self._come()

    def _come(self) -> None:
        if self.group:
            os.killpg(os.getpgid(0), self.by)
        else:
            os.kill(os.getpid(), self.by)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="classification")
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="histories, with at least one SIGKILL each")
    parser.add_argument("--sigterm", type=int, default=0, metavar="N", help="preemptions, every second to all")
    parser.add_argument("--saves", type=int, default=0, metavar="N", help="kills within saves")
    parser.add_argument("--mutations", type=int, default=0, metavar="N", help="damaged files")
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--workers", type=int, default=0, help="data workers of each process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go; a temporary folder otherwise")
    given = parser.parse_args()
    torch.set_num_threads(1)
    _load()
    with _place(given.folder) as folder:
        failures = sum(
            [
                histories(given, folder) if given.kills else 0,
                preemptions(given, folder) if given.sigterm else 0,
                kills_in_saves(given.saves, given.seed, folder) if given.saves else 0,
                mutations(given.mutations, given.seed, folder) if given.mutations else 0,
            ]
        )
    sys.exit(1 if failures else 0)


def _load() -> None:
    """Imports once what each run would import by itself."""
    for name in MODULES:
        importlib.import_module(name)


@contextmanager
def _place(folder: Path | None) -> Iterator[Path]:
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()
        return
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run of train.py in a folder, in one life or several."""

    folder: Path
    task: str
    processes: int
    workers: int
    codes: list[int] = field(default_factory=list)
    left: float = 0.0  # the longest that anything was left of it, in seconds

    def live(self, death: Death | None) -> int:
        """One life, until it ends or is ended; gives the exit code, negative for a signal."""
        child = os.fork()
        if child == 0:
            _detached(self.folder / "log.txt", lambda: self._train(death))
        code = _waited(child)
        self.left = max(self.left, _gone(child))
        self.codes.append(code)
        return code

    def _train(self, death: Death | None) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        strategy = ["trainer=cpu"] if self.processes == 1 else ["trainer=ddp_cpu"]
        sys.argv = [
            *("train.py", f"task={self.task}", *strategy, *COMMON, *TASKS[self.task]),
            *(f"data.num_workers={self.workers}", "resume=auto", f"hydra.run.dir={self.folder}"),
        ]
        if self.processes > 1:
            _launch_by_fork(self.folder, death)
        _instrument(self.folder, death, rank=0)
        train.main()


def _detached(log: Path, job: Callable[[], None]) -> None:
    """Runs a job in a session of its own, and ends this process with its exit code."""
    os.setsid()
    log.parent.mkdir(parents=True, exist_ok=True)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    _ended_by(job)


class _Forked:
    """What the launcher of ranks takes for a subprocess.Popen: a fork that waits for its environment."""

    def __init__(self, job: Callable[[], None]) -> None:
        self.returncode: int | None = None
        told, self.telling = os.pipe()
        fed, feeding = os.pipe()
        self.notes, noting = os.pipe()
        self.pid = os.fork()
        if self.pid:
            for end in (told, fed, noting):
                os.close(end)
            os.set_blocking(self.notes, False)
            self.stdin = os.fdopen(feeding, "wb")
            return
        for end in (self.telling, feeding, self.notes):
            os.close(end)
        with os.fdopen(told, "rb") as pipe:
            received = pipe.read()
        if not received:  # the parent ended before it launched anything
            os._exit(0)
        os.environ.update(pickle.loads(received) | {ranks.NOTES: str(noting)})
        os.dup2(fed, 0)
        sys.stdin = os.fdopen(0)
        _ended_by(job)

    def start(self, environment: dict[str, str], handed: bytes) -> "_Forked":
        with os.fdopen(self.telling, "wb") as pipe:
            pipe.write(pickle.dumps(environment))
        self.stdin.write(handed)
        self.stdin.flush()
        return self

    def poll(self) -> int | None:
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout: float = LIMIT) -> int:
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout)
            time.sleep(0.01)
        return cast(int, self.returncode)

    def communicate(self, given: bytes, *, timeout: float) -> None:
        with suppress(BrokenPipeError):
            self.stdin.write(given)
            self.stdin.close()
        self.wait(timeout)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _ended_by(job: Callable[[], None]) -> None:
    """Does a job and ends this process with its exit code."""
    code = 1
    try:
        job()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _launch_by_fork(folder: Path, death: Death | None) -> None:
    """Has the launcher of this process start the second rank by a fork."""

    def second() -> None:
        _instrument(folder, death, rank=1)
        rank.main()

    waiting: Any = _Forked(second)

    def started(local: int, number: int, handed: bytes) -> ranks.Rank:
        told = {"LOCAL_RANK": str(local), ranks.PARENT: str(os.getpid())}
        return ranks.Rank(number, waiting.start(dict(os.environ) | told, handed), waiting.notes)

    ranks._started = started


def _instrument(folder: Path, death: Death | None, *, rank: int) -> None:
    """Has this process note the samples of each batch that it has learnt, and end itself when it should."""
    counts: dict[str, int] = {}
    tick = (lambda moment: death.tick(moment, counts)) if death and death.rank == rank else (lambda _: None)
    learn, begun = noting_samples(Report.on_train_batch_end, folder, rank=rank), Report.on_validation_start

    def on_train_batch_end(*given: Any) -> None:
        learn(*given)
        tick("step")

    def on_train_batch_start(self: Any, *_: Any) -> None:
        tick("time")

    def on_validation_start(self: Any, trainer: Any, module: Any) -> None:
        begun(self, trainer, module)
        tick("validation")

    Report.on_train_batch_end = on_train_batch_end  # type: ignore[method-assign]
    Report.on_train_batch_start = on_train_batch_start  # type: ignore[method-assign]
    Report.on_validation_start = on_validation_start  # type: ignore[method-assign]
    Report.on_validation_batch_end = lambda *_, **__: tick("validation")  # type: ignore[method-assign, misc]
    _watch_saves(lambda: tick("save"))


def noting_samples(ended: Callable[..., None], folder: Path, *, rank: int) -> Callable[..., None]:
    """A callback's method for the end of a batch, which first writes down the samples."""

    def note(self: Any, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        line = [rank, trainer.current_epoch, batch_idx, batch["index"].tolist()]
        with (folder / "samples.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        ended(self, trainer, module, outputs, batch, batch_idx)

    return note


def _watch_saves(tick: Callable[[], None]) -> None:
    """Calls back before each write, sync and rename of a save."""

    def before(function: Callable[..., Any]) -> Callable[..., Any]:
        def told(*arguments: Any, **options: Any) -> Any:
            tick()
            return function(*arguments, **options)

        return told

    durable._Signed._pass_on = before(durable._Signed._pass_on)  # type: ignore[method-assign]
    durable._sync = before(durable._sync)
    os.fsync, Path.replace = before(os.fsync), before(Path.replace)  # type: ignore[method-assign]


def _waited(child: int) -> int:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise SystemExit(f"A run hung for {LIMIT:.0f} s and was ended: see its log.txt.")


def _gone(session: int) -> float:
    """The seconds until no process of a session was left; what is left after PATIENCE is ended, and infinite."""
    start = time.monotonic()
    while _members(session):
        if time.monotonic() - start > PATIENCE:
            for member in _members(session):
                os.kill(member, signal.SIGKILL)
            return float("inf")
        time.sleep(0.05)
    return time.monotonic() - start


def _members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split() if entry.name.isdigit() else []
        except OSError:  # it has ended
            continue
        if fields and int(fields[3]) == session and fields[0] != "Z":
            found.append(int(entry.name))
    return found


# ---- what is compared ------------------------------------------------------------------------------------------------

EXACT = (
    "state_dict",
    "current_model_state",
    "averaging_state",
    "optimizer_states",
    "lr_schedulers",
    "running",
    "loops",
)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its bits: a figure of nothing is NaN, which no NaN equals."""
    return tensor.contiguous().flatten().view(torch.uint8)


def differences(first: Any, second: Any, name: str = "") -> list[str]:
    """The names of what is not the same to the bit."""
    if type(first) is not type(second):
        return [name]
    if isinstance(first, torch.Tensor):
        same = first.dtype == second.dtype and first.shape == second.shape
        return [] if same and torch.equal(_bytes(first), _bytes(second)) else [name]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [f"{name}: {sorted(map(str, first.keys() ^ second.keys()))}"]
        return [found for key in first for found in differences(first[key], second[key], f"{name}.{key}")]
    if isinstance(first, list | tuple):
        if len(first) != len(second):
            return [name]
        return [
            found
            for index, pair in enumerate(zip(first, second, strict=True))
            for found in differences(*pair, f"{name}.{index}")
        ]
    return [] if first == second else [name]


def compared(reference: Path, folder: Path) -> list[str]:
    """What differs between two finished runs: weights, optimiser, average, schedulers, counters, figures, samples."""
    first, second = (_loaded(run / "checkpoints" / "last.ckpt") for run in (reference, folder))
    found = [each for key in EXACT for each in differences(first.get(key), second.get(key), key)]
    best = [_loaded(run / "checkpoints" / "best.ckpt")["state_dict"] for run in (reference, folder)]
    found += differences(best[0], best[1], "best")
    scores = [_watched(stored["callbacks"]) for stored in (first, second)]
    found += differences(scores[0], scores[1], "callbacks")
    if (reference / "metrics.csv").read_text() != (folder / "metrics.csv").read_text():
        found.append("metrics.csv")
    if learnt(reference) != learnt(folder):
        found.append("samples")
    return found


def _loaded(file: Path) -> Any:
    durable.verify(file)
    return torch.load(file, "cpu", weights_only=True)


def _watched(callbacks: dict[str, Any]) -> dict[str, Any]:
    """The callbacks' states without places and times."""
    passing = ("path", "dirpath", "best_k_models", "seconds", "_saved")
    return {
        name: {key: value for key, value in state.items() if not any(word in key for word in passing)}
        for name, state in callbacks.items()
    }


def learnt(folder: Path) -> dict[tuple[int, int, int], list[int]]:
    """The samples of each batch as it was learnt last, by process, epoch and number."""
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return {(rank, epoch, batch): samples for rank, epoch, batch, samples in lines}


def seen_once(folder: Path) -> bool:
    """Whether every epoch has each of the same samples exactly once."""
    epochs: dict[int, list[int]] = {}
    for (_, epoch, _), samples in learnt(folder).items():
        epochs.setdefault(epoch, []).extend(samples)
    return all(len(seen) == len(set(seen)) == len(next(iter(epochs.values()))) for seen in epochs.values())


# ---- histories -------------------------------------------------------------------------------------------------------


def histories(given: argparse.Namespace, folder: Path) -> int:
    """Runs with one to three deaths each, against one without; gives how many came out different."""
    draw = random.Random(f"{given.task} {given.processes} {given.seed}")
    reference = Run(folder / "reference", given.task, given.processes, given.workers)
    start = time.monotonic()
    _finished(reference, reference.live(None))
    duration = time.monotonic() - start
    step = min(0.5, duration / 40)
    print(f"{given.task}, {given.processes} processes: the uninterrupted run took {duration:.1f} s", flush=True)
    equal, once, deaths, left = 0, 0, dict.fromkeys(MOMENTS, 0), 0.0
    for number in range(given.kills):
        run = Run(folder / f"history_{number}", given.task, given.processes, given.workers)
        wanted, died = draw.choice((1, 1, 2, 3)), 0
        lived: list[str] = []
        while died < wanted:
            moment = MOMENTS[(number + died) % len(MOMENTS)] if died < 2 else draw.choice(MOMENTS)
            death = _drawn(moment, draw, step, given.processes)
            if run.live(death) == 0:
                shutil.rmtree(run.folder)  # it was over before it could die
                deaths = {each: deaths[each] - lived.count(each) for each in MOMENTS}
                died, lived, run.codes = 0, [], []
                continue
            died, deaths[moment], lived = died + 1, deaths[moment] + 1, [*lived, moment]
        _finished(run, run.live(None))
        found = compared(reference.folder, run.folder)
        equal, once, left = equal + (not found), once + seen_once(run.folder), max(left, run.left)
        print(f"  history {number}: exit codes {run.codes}, {found[:6] or 'equal'}", flush=True)
        if not found:
            shutil.rmtree(run.folder)
    print(
        f"{given.task}, {given.processes} processes: {equal} of {given.kills} histories equal to the bit; every sample "
        f"once in {once}; kills {deaths}; nothing left after {left:.1f} s",
        flush=True,
    )
    return given.kills - min(equal, once) + (left > PATIENCE)


def _drawn(moment: str, draw: random.Random, step: float, processes: int) -> Death:
    if moment == "save":
        return Death("save", draw.randint(1, 900), rank=0)
    victim = draw.randrange(processes)
    number = draw.randint(1, 5)
    delay = {"time": draw.uniform(0.001, 6 * step), "step": 0.0, "validation": draw.choice((0.0, step * draw.random()))}
    return Death(moment, number, delay[moment], victim)


def _finished(run: Run, code: int) -> None:
    if code != 0:
        lines = (run.folder / "log.txt").read_text().splitlines()
        raise SystemExit("\n".join([f"{run.folder} ended with {code}:", *lines[-30:]]))


def preemptions(given: argparse.Namespace, folder: Path) -> int:
    """Runs that get a SIGTERM at a random moment; each must leave a checkpoint of that step and a code that says so.

    Every second one goes to the whole process group, as from `timeout`, scancel or a terminal, the others to one.
    """
    draw = random.Random(f"{given.task} {given.processes} {given.seed} term")
    reference = Run(folder / "reference", given.task, given.processes, given.workers)
    _finished(reference, reference.live(None))
    good, equal, left = 0, 0, 0.0
    for number in range(given.sigterm):
        run = Run(folder / f"preemption_{number}", given.task, given.processes, given.workers)
        moment = ("step", "validation", "time", "save")[number // 2 % 4]
        count = draw.randint(1, 300) if moment == "save" else draw.randint(1, 5)
        delay = draw.uniform(0.001, 0.3) if moment == "time" else 0.0
        group = number % 2 == 1
        code = run.live(Death(moment, count, delay, by=signal.SIGTERM, group=group))
        stored = _loaded(run.folder / "checkpoints" / "last.ckpt")
        taken = sum(1 for rank, *_ in learnt(run.folder) if rank == 0)
        place = stored["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["processed"]
        batches = OmegaConf.load(run.folder / "config.yaml")["trainer"]["accumulate_grad_batches"]  # of a step
        ok = code == 128 + signal.SIGTERM and place > taken - batches
        good += ok
        _finished(run, run.live(None))
        found = compared(reference.folder, run.folder)
        equal, left = equal + (not found), max(left, run.left)
        what = f"{moment}, to {'all' if group else 'one'}"
        verdict = f"{place} of {taken} batches saved"
        print(f"  preemption {number} ({what}): exit code {code}, {verdict}, {found[:6] or 'equal'}", flush=True)
        if not found:
            shutil.rmtree(run.folder)
    print(
        f"{given.task}, {given.processes} processes: {good} of {given.sigterm} SIGTERMs left a checkpoint of the last "
        f"step and exit code 143; {equal} went on to the same bits; nothing left after {left:.1f} s",
        flush=True,
    )
    return given.sigterm - min(good, equal) + (left > PATIENCE)


# ---- files -----------------------------------------------------------------------------------------------------------


def _content(step: int) -> dict[str, Any]:
    """What a checkpoint of a step holds, in a size that takes many writes."""
    generator = torch.Generator().manual_seed(step)
    return {"step": step, "state_dict": {f"{n}": torch.randn(200, 100, generator=generator) for n in range(30)}}


def _save(folder: Path, step: int) -> None:
    from visiontasks.callbacks.checkpoints import DurableCheckpoints

    DurableCheckpoints().save_checkpoint(_content(step), folder / "checkpoints" / "last.ckpt")


def kills_in_saves(count: int, seed: int, folder: Path) -> int:
    """Kills between any two writes of a save; afterwards the last good checkpoint is that save's or the one before."""
    draw = random.Random(seed)
    elsewhere = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    outcomes = {"new": 0, "old": 0, "lost": 0}
    ticks = _ticks_of_a_save(folder / "counted")
    for number in range(count):
        place = folder / f"saves_{number}"
        environment = {"TMPDIR": elsewhere} if elsewhere and number % 2 else {}
        _save(place, 1)
        _save(place, 2)
        death = Death("save", draw.randint(1, ticks))
        child = os.fork()
        if child == 0:
            os.environ.update(environment)
            counts: dict[str, int] = {}
            _watch_saves(lambda death=death, counts=counts: death.tick("save", counts))  # type: ignore[misc]
            _detached(place / "log.txt", lambda place=place: _save(place, 3))  # type: ignore[misc]
        killed = _waited(child) == -signal.SIGKILL
        outcomes[_survivor(place) if killed else "lost"] += 1
        shutil.rmtree(place)
    print(
        f"{count} kills in saves, half of them with temporary files on another file system: {outcomes['lost']} without "
        f"a good checkpoint, {outcomes['old']} went on from the one before, {outcomes['new']} from the new one"
    )
    return outcomes["lost"] + full_disks(20, seed, folder)


def _ticks_of_a_save(folder: Path) -> int:
    """The number of writes, syncs and renames of a save."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        counts: dict[str, int] = {}
        _watch_saves(lambda: Death("", 0).tick("save", counts))
        _save(folder, 1)
        _save(folder, 2)
        os.write(writing, str(counts["save"] // 2).encode())
        os._exit(0)
    os.waitpid(child, 0)
    return int(os.read(reading, 32))


def _survivor(place: Path) -> str:
    """Which step the files of a run hold: that of the save that was interrupted, the one before, or none."""
    names = ("last.ckpt", "previous.ckpt")
    found = [file for name in names if (file := place / "checkpoints" / name).is_file()]
    try:
        stored = torch.load(good_checkpoint(found), weights_only=True, mmap=True)
    except (UsageError, RuntimeError, OSError):
        return "lost"
    whole = not differences(stored, _content(stored["step"]))
    return {2: "old", 3: "new"}.get(stored["step"], "lost") if whole else "lost"


def full_disks(count: int, seed: int, folder: Path) -> int:
    """Saves that find no room after so many bytes, by RLIMIT_FSIZE; the one before stays, and one sentence says so."""
    draw = random.Random(seed)
    kept = 0
    for number in range(count):
        place = folder / f"full_{number}"
        _save(place, 2)
        size = (place / "checkpoints" / "last.ckpt").stat().st_size
        limit = draw.randrange(size)
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            os._exit(_refused(place))
        kept += _waited(child) == 0 and _survivor(place) == "old" and len(list((place / "checkpoints").iterdir())) == 1
        shutil.rmtree(place)
    print(f"{count} saves to a full disk: the one before was intact, and one sentence said so, in {kept}")
    return count - kept


def _refused(place: Path) -> int:
    try:
        _save(place, 3)
    except UsageError as error:
        cause = error.__cause__
        return int(not (isinstance(cause, OSError) and cause.errno in {errno.EFBIG, errno.ENOSPC}))
    return 1


def mutations(count: int, seed: int, folder: Path) -> int:
    """Damages last.ckpt in one way after the other; each must be refused, and the one before be found."""
    draw = random.Random(seed)
    _save(folder, 2)
    _save(folder, 3)
    file = folder / "checkpoints" / "last.ckpt"
    whole = file.read_bytes()
    refused = {"flip": 0, "cut": 0, "swap": 0}
    for number in range(count):
        kind = ("flip", "cut", "swap")[number % 3]
        file.write_bytes(_damaged(whole, kind, draw))
        refused[kind] += _survivor(folder) == "old"
    print(f"{sum(refused.values())} of {count} damaged checkpoints refused, and the one before used instead: {refused}")
    file.write_bytes(whole)
    return count - sum(refused.values()) + (_survivor(folder) != "new")


def _damaged(whole: bytes, kind: str, draw: random.Random) -> bytes:
    data = bytearray(whole)
    edges = draw.random() < 0.5  # the first and last bytes are where a format says what it is
    if kind == "cut":
        return bytes(data[: -draw.randint(1, 200) if edges else draw.randrange(len(data))])
    if kind == "flip":
        place = draw.randrange(-200, 200) % len(data) if edges else draw.randrange(len(data))
        data[place] ^= 1 << draw.randrange(8)
        return bytes(data)
    while bytes(data) == whole:
        length = draw.randint(1, 4096)
        first, second = sorted(draw.randrange(len(data) - length) for _ in range(2))
        if second - first >= length:
            one, other = data[first : first + length], data[second : second + length]
            data[first : first + length], data[second : second + length] = other, one
    return bytes(data)


if __name__ == "__main__":
    main()
