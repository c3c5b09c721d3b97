"""A data loader that waits so long for a batch and no longer, and then names the file that a worker hangs on."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from visiontasks.contracts import UsageError
from visiontasks.data.workers import begin_worker, worker_context

_IDLE = -1


class HungWorker(UsageError):
    """A data worker that gives no answer; it has been killed."""


class Reading:
    """Which sample each worker is reading, and since when, in memory that all processes share."""

    def __init__(self, workers: int) -> None:
        self.index = torch.full((workers,), _IDLE, dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]
        self.since = torch.zeros(workers, dtype=torch.float64).share_memory_()  # type: ignore[no-untyped-call]

    @contextmanager
    def sample(self, index: int) -> Iterator[None]:
        """Within it this worker reads a sample."""
        worker = get_worker_info()
        if worker is None:
            yield
            return
        self.since[worker.id] = time.monotonic()
        self.index[worker.id] = index
        try:
            yield
        finally:
            self.index[worker.id] = _IDLE

    def longest(self) -> tuple[int, int, float] | None:
        """The worker that has been reading one sample the longest, the sample, and for how many seconds."""
        busy = [at for at, index in enumerate(self.index.tolist()) if index != _IDLE]
        if not busy:
            return None
        worker = min(busy, key=lambda at: float(self.since[at]))
        return worker, int(self.index[worker]), time.monotonic() - float(self.since[worker])


class PatientLoader(DataLoader[Any]):
    """Raises HungWorker where no batch comes for `timeout` seconds; 0: it waits for ever, as without workers.

    The data set says in `reading` which sample it is at, and has the names of the samples in `source`.
    """

    def __init__(self, data: Any, *, timeout: float, num_workers: int, **options: Any) -> None:
        data.reading = Reading(num_workers)
        if num_workers:
            options |= {"timeout": timeout, "worker_init_fn": begin_worker, "multiprocessing_context": worker_context()}
        super().__init__(data, num_workers=num_workers, **options)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        batches: Any = super().__iter__()
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
                raise self._hung(batches) from error
            yield batch

    def _hung(self, batches: Any) -> HungWorker:
        data: Any = self.dataset
        longest = data.reading.longest()
        batches._shutdown_workers()  # waits five seconds, and has torch expect what comes
        for worker in batches._workers:
            worker.kill()
        if longest is None:
            return HungWorker(
                f"No data worker has given a batch for {self.timeout:g} s: type data.timeout=0 to wait on."
            )
        number, index, seconds = longest
        return HungWorker(
            f"Data worker {number} has been reading {data.source.name(index)} for {seconds:.0f} s and was killed: mend "
            f"or remove the file, or type a larger data.timeout (now {self.timeout:g})."
        )
