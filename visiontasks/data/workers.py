"""Data workers: they serve the process that started them until it lets them go, and do not outlive it."""

from __future__ import annotations

import copy
import multiprocessing
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import context
from typing import Any

import torch

from visiontasks.layers.lifetime import die_with_parent

_MEANT_FOR_ALL = (signal.SIGTERM, signal.SIGINT)  # which schedulers, `timeout` and terminals send to a whole group


def begin_worker(_: int) -> None:
    """Keep a worker process to one thread, as the cores are shared out already, and have it end with its parent."""
    die_with_parent()
    torch.set_num_threads(1)


def worker_context() -> context.BaseContext:
    """What starts data workers: deaf to SIGTERM and SIGINT, so that the process that they serve can save.

    They never hear of them, from their first instruction on; so whoever would terminate one kills it.
    """
    given = multiprocessing.get_context()
    own: Any = copy.copy(given)
    own.Process = _PROCESSES[given.get_start_method()]
    return own  # type: ignore[no-any-return]


class _Deaf:
    def start(self) -> None:
        with _blocked():
            super().start()  # type: ignore[misc]
        started: Any = self
        started._popen.terminate = started._popen.kill  # which multiprocessing and torch call at the end


class _Forked(_Deaf, context.ForkProcess):
    pass


class _Spawned(_Deaf, context.SpawnProcess):
    pass


class _Served(_Deaf, context.ForkServerProcess):
    pass


_PROCESSES: dict[str, type[Any]] = {"fork": _Forked, "spawn": _Spawned, "forkserver": _Served}


@contextmanager
def _blocked() -> Iterator[None]:
    """Within it this thread, and for good each process that it starts, does not receive the signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _MEANT_FOR_ALL)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
