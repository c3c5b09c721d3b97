"""A data worker that hangs is killed and the file it hung on named; no worker outlives its parent."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.data.test_module import NoiseData
from visiontasks.contracts import Sample
from visiontasks.data.patience import HungWorker
from visiontasks.data.source import Source


class Hanging(Source):
    """Samples of which one is never read."""

    def __init__(self, source: Source, hangs: int) -> None:
        self.source, self.hangs = source, hangs

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Sample:
        if index == self.hangs:
            time.sleep(1000)
        return self.source[index]

    def name(self, index: int) -> str:
        return self.source.name(index)


class HangingData(NoiseData):
    def source(self, split: str) -> Source:
        source = super().source(split)
        return Hanging(source, 7) if split == "train" else source


def alive(process: int) -> bool:
    try:
        status = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def awaited(find: Callable[[], Any], seconds: float = 60.0) -> Any:
    until = time.monotonic() + seconds
    while not (found := find()) and time.monotonic() < until:
        time.sleep(0.05)
    return found


def test_a_hung_worker_is_killed_and_its_file_named() -> None:
    data = HangingData(num_workers=2, timeout=2.0, batch_size=4)
    loader = data.train_dataloader()
    with pytest.raises(HungWorker, match=r"reading noise/7 for \d+ s and was killed.*data\.timeout"):
        list(loader)
    workers = loader._iterator._workers  # type: ignore[union-attr]
    for worker in workers:
        worker.join(10)
    assert not any(worker.is_alive() for worker in workers)


def test_a_slow_worker_is_waited_for() -> None:
    assert sum(len(batch["index"]) for batch in NoiseData(num_workers=1, timeout=60.0).train_dataloader()) > 0


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="the kernel's word is Linux's")
def test_a_hung_worker_does_not_outlive_a_killed_parent(one_thread: None) -> None:
    parent = os.fork()
    if parent == 0:
        next(iter(HangingData(num_workers=1, timeout=0, batch_size=24).train_dataloader()))
        os._exit(0)
    (worker,) = awaited(lambda: children(parent))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert awaited(lambda: not alive(worker))
