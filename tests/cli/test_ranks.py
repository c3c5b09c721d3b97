"""Ranks start with the config of their own job, agree before they train, and end together with the first cause said."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.distributed import DistNetworkError

from visiontasks.callbacks.agreement import difference, flat
from visiontasks.cli import ranks
from visiontasks.cli.meeting import at_one_time, first_told, meeting_place
from visiontasks.cli.ranks import Job, Note, lost_contact
from visiontasks.errors import UsageError

ROOT = Path(__file__).parents[2]
TINY = (
    *("backbone=resnet20", "data.image_size=32", "data.train_size=64", "data.val_size=8", "data.test_size=8"),
    *("data.batch_size=8", "trainer=ddp_cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false"),
    *("test=false", "trainer.timeout=10"),
)


@pytest.fixture(autouse=True)
def no_job_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test breaks is broken in it alone."""
    monkeypatch.setattr(ranks, "_BROKEN", threading.Event())


FAULT = """
import os, signal, time
from lightning import Callback

class Fault(Callback):
    def __init__(self, kind, rank, step):
        self.kind, self.rank, self.step = kind, rank, step

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_rank != self.rank or trainer.global_step != self.step:
            return
        if self.kind == "raise":
            raise ValueError("no such luck")
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        if self.kind == "hang":
            time.sleep(1000)
        if self.kind == "uneven":
            module.on_train_batch_start = lambda *_: -1  # which ends the epoch here
"""
EXPERIMENT = """# @package _global_
callbacks:
  fault: {_target_: mine.Fault, kind: raise, rank: 1, step: 2}
"""
CHILD = """
import json, os, pickle, sys, time
pickle.load(sys.stdin.buffer)
fate = os.environ["FATE"]
def note(lost, code):
    said = {"time": time.monotonic(), "reason": "ValueError: no luck", "lost": lost, "code": code}
    os.write(int(os.environ["VISIONTASKS_NOTES"]), (json.dumps(said) + "\\n").encode())
if fate == "raise":
    note(False, 1); sys.exit(1)
if fate == "mistake":
    note(False, 2); sys.exit(2)
if fate == "lost":
    note(True, 1); sys.exit(1)
if fate == "kill":
    os.kill(os.getpid(), 9)
if fate == "hang":
    import faulthandler, signal
    faulthandler.register(signal.SIGUSR1)
    time.sleep(1000)
sys.exit(int(sys.stdin.buffer.read(1) != b"."))
"""


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Job]:
    """A job whose second rank is a script that meets the fate that FATE says."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: popen([sys.executable, str(script)], **options))
    monkeypatch.setattr(ranks, "_PATIENCE", 1.0)
    monkeypatch.setattr(Job, "_watch", lambda _: None)
    made = Job(OmegaConf.create())
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create())
    yield made
    made.abandon()


@pytest.mark.parametrize(
    ("fate", "sentence", "code"),
    [
        ("raise", "rank 1 failed first, with ValueError: no luck", 1),
        ("mistake", "rank 1 failed first, with ValueError: no luck", 2),
        ("kill", "rank 1 failed first: it was killed by SIGKILL", 1),
        ("hang", "rank 1 hung: rank 0 waited in vain", 1),
        ("lost", "rank 0 lost a rank of another node", 1),
    ],
)
def test_a_rank_that_lost_another_names_the_first_cause(
    fate: str,
    sentence: str,
    code: int,
    job: Job,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FATE", fate)
    job.start(range(2))
    with pytest.raises(SystemExit) as stop:
        job.failed(RuntimeError("[gloo/pair.cc:12] Connection closed by peer"))
    assert stop.value.code == code
    assert f"error: {sentence}" in capfd.readouterr().err
    assert all(rank.process.poll() is not None for rank in job.others)


def test_a_rank_with_a_cause_of_its_own_says_so_and_goes_on_to_fail(
    job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FATE", "lost")
    job.start(range(2))
    job.failed(ValueError("no luck"))
    assert capfd.readouterr().err == "error: rank 0 failed first, with ValueError: no luck\n"


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]"), True),
        (RuntimeError("Application timeout caused pair closure"), True),
        (RuntimeError("NCCL communicator was aborted"), True),
        (DistNetworkError("recv failed"), True),
        (RuntimeError("CUDA out of memory"), False),
        (ValueError("gloo"), False),
        (UsageError("timed out"), False),
    ],
)
def test_what_tells_of_another_rank(error: Exception, lost: bool) -> None:
    assert lost_contact(error) == lost
    assert Note.of(error).lost == lost


def test_configs_differ_in_the_first_keys_by_name() -> None:
    first = {"optimizer": {"lr": 0.1, "betas": [0.9, 0.99]}, "seed": 0}
    second = {"optimizer": {"lr": 0.2, "betas": [0.9, 0.95]}, "seed": 0, "test": True}
    sentence = difference([flat(first), flat(first), flat(second)])
    assert "optimizer.betas.1 (0.99 on rank 0, 0.95 on rank 2), optimizer.lr (0.1 on rank 0, 0.2 on rank 2)" in sentence
    assert "test (absent on rank 0, True on rank 2)" in sentence
    assert "seed" not in sentence.replace("seeds", "")


def test_processes_that_meet_name_their_folders_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "LOCAL_RANK", "NODE_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert meeting_place() is None
    assert at_one_time(["-m", "seed=1"], "train") == ["-m", "seed=1"]
    monkeypatch.setattr("visiontasks.cli.meeting.first_told", lambda *_: "0")
    for name, value in {"NODE_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "5"}.items():
        monkeypatch.setenv(name, value)
    assert meeting_place() == ("127.0.0.1", 5, False)
    given = at_one_time(["seed=1", "hydra.run.dir=runs/${now:%Y}"], "train")
    assert given[:2] == ["seed=1", "hydra.run.dir=runs/1970"]
    assert given[2].startswith("hydra.sweep.dir=runs/${hydra:runtime.choices.task}/19")
    assert "${now" not in "".join(given)


def test_the_first_to_come_is_believed() -> None:
    from lightning.fabric.plugins.environments.lightning import find_free_network_port

    port = find_free_network_port()
    told = [first_told("127.0.0.1", port, host, value) for host, value in ((True, "1.5"), (False, "2.5"))]
    assert told == ["1.5", "1.5"]


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with a callback that fails."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "conf" / "experiment").mkdir(parents=True)
    (folder / "mine.py").write_text(FAULT)
    (folder / "conf" / "experiment" / "fault.yaml").write_text(EXPERIMENT)
    return folder


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def started(user: Path, *arguments: str, **environ: str) -> "subprocess.Popen[str]":
    command = [sys.executable, str(ROOT / "train.py"), *TINY, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=user, env=environment() | environ, stdout=pipe, stderr=pipe, text=True)


def running(folder: Path) -> list[str]:
    """The processes whose command or environment names a folder."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (place / "environ").read_bytes():
                found.append(place.name)
        except OSError:
            continue
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["raise", "kill", "hang", "stop", "uneven"])
def test_every_rank_ends_with_the_first_cause(kind: str, rank: int, user: Path, tmp_path: Path) -> None:
    if (kind, rank) == ("stop", 0):
        pytest.skip("a first rank that the kernel has stopped can end nobody")
    faults = ["experiment=fault", f"callbacks.fault.kind={kind}", f"callbacks.fault.rank={rank}"]
    process = started(user, *faults, f"hydra.run.dir={tmp_path / 'run'}", MARK=str(tmp_path))
    _, said = process.communicate(timeout=300)
    assert process.returncode not in {0, None}
    reasons = {
        "raise": f"rank {rank} failed first, with ValueError: no such luck",
        "kill": f"rank {rank} failed first: it was killed by SIGKILL",
        "hang": f"rank {rank} hung",
        "stop": f"rank {rank} hung",
        "uneven": "rank",
    }
    if (kind, rank) != ("kill", 0):  # nobody is left to report; the others end with it
        assert f"error: {reasons[kind]}" in said, said[-2000:]
    until = time.monotonic() + 10
    while running(tmp_path) and time.monotonic() < until:
        time.sleep(0.1)
    assert not running(tmp_path)


@pytest.mark.exhaustive
def test_a_sweep_gives_every_rank_the_hyper_parameters_of_its_job(user: Path, tmp_path: Path) -> None:
    process = started(user, "-m", "optimizer.lr=0.001,0.002", f"hydra.sweep.dir={tmp_path}")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said[-2000:]
    for number, rate in enumerate(("0.001", "0.002")):
        assert json.loads((tmp_path / str(number) / "summary.json").read_text())["processes"] == 2
        assert f"lr: {rate}" in (tmp_path / str(number) / "config.yaml").read_text()


@pytest.mark.exhaustive
@pytest.mark.parametrize("by", ["torchrun", "slurm"])
def test_processes_that_others_start_make_one_folder(by: str, user: Path, tmp_path: Path) -> None:
    (tmp_path / "conf").symlink_to(user / "conf")
    if by == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py"), *TINY]
        done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    else:
        slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
        slurm |= {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "train", "SLURM_NODELIST": "127.0.0.1"}
        tasks = []
        for number in ("1", "0"):
            tasks.append(started(tmp_path, **slurm, SLURM_PROCID=number, SLURM_LOCALID=number))
            time.sleep(1.5)  # another second in the name
        assert [(task.communicate(timeout=300)[1][-2000:], task.returncode)[1] for task in tasks] == [0, 0]
    (folder,) = (tmp_path / "runs" / "classification").iterdir()
    assert json.loads((folder / "summary.json").read_text())["processes"] == 2


@pytest.mark.exhaustive
def test_ranks_with_unlike_configs_do_not_train(user: Path, tmp_path: Path) -> None:
    script = tmp_path / "unlike.py"
    lines = ["import os, sys", f"sys.path.insert(0, {str(ROOT)!r})", "from visiontasks.cli.train import main"]
    lines += ['sys.argv.append("optimizer.lr=0.0" + os.environ["LOCAL_RANK"] + "1")', "main()"]
    script.write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), *TINY]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode != 0
    for rank in range(2):
        sentence = f"Rank {rank} does not train: the processes' configs differ in optimizer.lr (0.001 on rank 0"
        assert sentence in done.stderr, done.stderr[-3000:]


@pytest.mark.exhaustive
def test_a_network_in_shards_trains_as_one_and_leaves_a_whole_checkpoint(user: Path, tmp_path: Path) -> None:
    from visiontasks.cli.build import load_task

    plain = ("backbone=vgg11", "optimizer=sgd", "optimizer.lr=0.01", "trainer.precision=32", "test=true")
    refused = started(user, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2", *plain)
    assert "Weights in shards have no fused SGD: type optimizer.fused=false." in refused.communicate(timeout=300)[1]
    assert refused.returncode == 2
    plain += ("optimizer.fused=false",)
    ends = {}
    for name, options in {"ddp": (), "fsdp": ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")}.items():
        process = started(user, *options, *plain, f"hydra.run.dir={tmp_path / name}")
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said[-3000:]
        ends[name] = load_task(tmp_path / name / "checkpoints" / "last.ckpt").state_dict()
    assert ends["ddp"].keys() == ends["fsdp"].keys()
    for name, value in ends["ddp"].items():
        torch.testing.assert_close(ends["fsdp"][name], value, rtol=1e-4, atol=1e-5)
