"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal
import sys

PARENT = "VISIONTASKS_PARENT"  # in the environment of a rank that we started: the process that did
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def launched() -> bool:
    """Whether a first rank of ours, and not a shell, torchrun or SLURM, started this process."""
    return os.environ.get(PARENT) == str(os.getppid())


def die_with_parent(parent: int | None = None) -> None:
    """Has the kernel kill this process as soon as its parent, or the thread that forked it, ends; on Linux only.

    parent is the id of the process that is meant, where it may have ended already.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)
