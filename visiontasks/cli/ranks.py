"""The ranks of one job: each starts with its composed config, none outlives the others, the first cause is said."""

import faulthandler
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from lightning import Trainer
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from visiontasks.errors import UsageError
from visiontasks.layers.lifetime import PARENT

LAUNCHED = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")  # what a launcher tells its ranks
NOTES = "VISIONTASKS_NOTES"  # the file descriptor on which a rank says why it fails
GOOD = b"."  # what a rank is told when all have done well
_START = 300.0  # seconds in which all ranks are to start, at least
_FAREWELL = 60.0  # seconds in which a rank that has done well is to end
_PATIENCE = 5.0  # seconds in which ranks that have lost each other are heard
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|pair closure|broken pipe|timed out", re.IGNORECASE)


@dataclass(frozen=True)
class Note:
    """Why a rank fails: at a time of the node's clock, for its own reason or because it lost the others."""

    time: float
    reason: str
    lost: bool
    code: int  # what it exits with

    @classmethod
    def of(cls, error: BaseException) -> "Note":
        reason = " ".join(str(error).split())
        mistake = isinstance(error, UsageError)
        named = reason if mistake else f"{type(error).__name__}: {reason}"
        return cls(time.monotonic(), named, lost_contact(error), 2 if mistake else 1)


def lost_contact(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone or silent, and not what is wrong here."""
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and _LOST.search(str(error)) is not None


@dataclass
class Rank:
    """Another rank of this node, its process and what it has written."""

    number: int
    process: "subprocess.Popen[bytes]"
    notes: int
    _heard: bytes = field(default=b"", init=False)

    def note(self) -> Note | None:
        """Why it fails, where it has said so."""
        while part := _read(self.notes):
            self._heard += part
        return Note(**json.loads(self._heard)) if self._heard.endswith(b"\n") else None

    def dismiss(self) -> int:
        """Tells it that all is well, and returns what it then exits with."""
        with suppress(subprocess.TimeoutExpired):
            self.process.communicate(GOOD, timeout=_FAREWELL)
        self.process.kill()
        return self.process.wait()


class RankLauncher(_SubprocessScriptLauncher):
    """Starts the other ranks of this node with the composed config of this job, and watches them.

    Lightning's own repeats the command line, which in a sweep is that of all jobs.
    """

    def __init__(self, given: _SubprocessScriptLauncher, job: "Job") -> None:
        super().__init__(given.cluster_environment, given.num_processes, given.num_nodes)
        self.job = job

    def launch(self, function: Any, *args: Any, trainer: Trainer | None = None, **kwargs: Any) -> Any:  # noqa: ARG002
        """Calls the function in every rank; where it fails, notes why ahead of all that Lightning does then."""
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        try:
            return function(*args, **kwargs)
        except Exception as error:
            self.job.failed(error)
            raise

    def _start(self) -> None:
        environment = self.cluster_environment
        node, processes = environment.node_rank(), self.num_processes
        os.environ |= {
            "MASTER_ADDR": environment.main_address,
            "MASTER_PORT": str(environment.main_port),
            "NODE_RANK": str(node),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(processes * self.num_nodes),
        }
        numbers = range(node * processes, (node + 1) * processes)
        self.job.start(numbers)
        self.procs = [rank.process for rank in self.job.others]


class Job:
    """One composed job, of one process or, once its ranks are started, of several."""

    def __init__(self, composed: DictConfig) -> None:
        self.composed = composed
        self.number = 0  # of this rank
        self.others: list[Rank] = []
        self._noticed = threading.Event()  # this rank deals with the end of the job
        self._failed = False

    def start(self, numbers: range) -> None:
        """Starts all ranks of this node but the first, which is this process."""
        self.number = numbers[0]
        plain = (
            OmegaConf.to_container(self.composed, resolve=True),
            OmegaConf.to_container(HydraConfig.instance().cfg),
        )
        handed = pickle.dumps(plain)
        self.others = [_started(local, number, handed) for local, number in enumerate(numbers) if local]
        threading.Thread(target=self._watch, daemon=True, name="ranks").start()

    def finish(self) -> None:
        """Waits for the other ranks, which have done well if this one has."""
        self._noticed.set()
        codes = {rank.number: rank.dismiss() for rank in self.others}
        if any(codes.values()):
            self._end(self._cause())
        if self.others and dist.is_initialized():
            dist.destroy_process_group()

    def failed(self, error: BaseException) -> None:
        """Says why this rank fails; exits where another one is the cause."""
        if self._failed:
            return
        self._failed, note = True, Note.of(error)
        if NOTES in os.environ:
            os.write(int(os.environ[NOTES]), json.dumps(asdict(note)).encode() + b"\n")
        elif not self.others:
            get_error_handler().record_exception(error)  # torchrun's, which reports the first of all ranks
        else:
            self._noticed.set()
            self._judge(note)

    def abandon(self) -> None:
        """Ends the other ranks at once."""
        self._noticed.set()
        for rank in self.others:
            if rank.process.poll() is None:
                _BROKEN.set()
            rank.process.kill()
            rank.process.wait()

    def _judge(self, own: Note) -> None:
        if not own.lost:
            if own.code != 2:
                _say(f"rank {self.number} failed first, with {own.reason}")
            return
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until and not self._known():
            time.sleep(0.05)
        self._end(self._cause(own))

    def _known(self) -> bool:
        """Whether some other rank is known to have failed for a reason of its own."""
        ended = [rank for rank in self.others if rank.process.poll() is not None and rank.note() is None]
        return bool(ended) or any(not note.lost for note in self._notes().values())

    def _notes(self) -> dict[int, Note]:
        return {rank.number: note for rank in self.others if (note := rank.note()) is not None}

    def _watch(self) -> None:
        """Ends this process, which may wait for ever, soon after another rank has failed."""
        while not self._noticed.wait(0.2):
            if any(rank.process.poll() for rank in self.others):
                if not self._noticed.wait(_PATIENCE):
                    self._end(self._cause(), at_once=True)
                return

    def _cause(self, own: Note | None = None) -> tuple[str, int]:
        """What came first, in words, and the exit code."""
        notes = self._notes() | ({self.number: own} if own is not None else {})
        for rank in self.others:
            code = rank.process.poll()
            if code is not None and rank.number not in notes:
                return f"rank {rank.number} failed first: it {_ended(code)}", 1
        reasons = [(note.time, number) for number, note in notes.items() if not note.lost]
        if reasons:
            number = min(reasons)[1]
            return f"rank {number} failed first, with {notes[number].reason}", notes[number].code
        silent = [number for number in (self.number, *(r.number for r in self.others)) if number not in notes]
        _, first = min((note.time, number) for number, note in notes.items())
        if silent:
            self._show(silent)
            named = " and ".join(f"rank {number}" for number in silent)
            return f"{named} hung: rank {first} waited in vain, until {notes[first].reason}", 1
        return f"rank {first} lost a rank of another node: {notes[first].reason}", 1

    def _show(self, silent: Iterable[int]) -> None:
        """Prints where ranks hang, the last calls first."""
        for number in silent:
            print(f"rank {number} hangs in", file=sys.stderr, flush=True)
            if number == self.number:
                faulthandler.dump_traceback(sys.__stderr__ or 2)
        for rank in self.others:
            if rank.number in silent:
                rank.process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)

    def _end(self, cause: tuple[str, int], *, at_once: bool = False) -> NoReturn:
        sentence, code = cause
        _say(sentence)
        self.abandon()
        if at_once:
            os._exit(code)
        sys.exit(code)


_JOB: ContextVar[Job | None] = ContextVar("job", default=None)
_BROKEN = threading.Event()  # ranks of this process's last job are gone, and torch still counts on them


@contextmanager
def one_job(composed: DictConfig) -> Iterator[None]:
    """Within it a trainer of `trained_together` has its ranks; they end with it, so that a next job has its own."""
    if _BROKEN.is_set():
        raise UsageError("A job of several processes failed, and the sweep ends with it: start the other jobs anew.")
    before = {name: os.environ.get(name) for name in LAUNCHED}
    job = Job(composed)
    token = _JOB.set(job)
    try:
        yield
        job.finish()
    except Exception as error:
        job.failed(error)
        raise
    finally:
        _JOB.reset(token)
        job.abandon()
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def trained_together(trainer: Trainer, *, timeout: float) -> Trainer:
    """The trainer, whose ranks wait for each other so many seconds, and longer until all have started."""
    strategy, job = trainer.strategy, _JOB.get()
    if isinstance(strategy, ParallelStrategy) and hasattr(strategy, "_timeout"):
        strategy._timeout = timedelta(seconds=max(timeout, _START))
    if job is not None and isinstance(strategy.launcher, _SubprocessScriptLauncher):
        strategy._launcher = RankLauncher(strategy.launcher, job)
    return trainer


def _started(local: int, number: int, handed: bytes) -> Rank:
    reading, writing = os.pipe()
    os.set_blocking(reading, False)
    told = {"LOCAL_RANK": str(local), NOTES: str(writing), PARENT: str(os.getpid())}
    told["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "-m", "visiontasks.cli.rank"]
    process = subprocess.Popen(command, env=os.environ | told, stdin=subprocess.PIPE, pass_fds=(writing,))
    os.close(writing)
    assert process.stdin is not None
    process.stdin.write(handed)
    process.stdin.flush()
    return Rank(number, process, reading)


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 65536)
    except BlockingIOError:
        return b""


def _ended(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"


def _say(sentence: str) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
