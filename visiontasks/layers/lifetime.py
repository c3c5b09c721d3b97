"""Processes that do not outlive the one that started them."""

import ctypes
import os
import signal
import sys

_SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl
_LAUNCHER = "VISIONTASKS_LAUNCHER"  # in the environment: the number of the process that launches others


def join_launcher() -> None:
    """Binds this process to the one of ours that launched it; any other becomes the launcher of those it may start."""
    if launched():
        end_with_parent()
    else:
        os.environ[_LAUNCHER] = str(os.getpid())


def launched() -> bool:
    """Whether a process of ours, and not a shell, torchrun or SLURM, started this one."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and os.environ.get(_LAUNCHER) == str(os.getppid())


def end_with_parent() -> None:
    """Has Linux kill this process when its parent ends, however that happens; elsewhere does nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended in the meantime
        os.kill(os.getpid(), signal.SIGKILL)
