"""What the process that trains asks of the system and of torch."""

import ctypes
import os
import sys

import torch

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3), of glibc
_KEPT = 1 << 30  # bytes of freed memory that stay with the process
_LARGEST = 1 << 25  # bytes, the largest threshold that glibc takes


def prepare_process() -> None:
    """Has the system and torch not repeat in every step what they need do once."""
    keep_freed_memory()
    search_no_driver()


def keep_freed_memory() -> None:
    """Has glibc, where it is there, keep up to 1 GiB of what a step frees for the next step.

    By itself it hands the memory of activations back to the system, which then clears it page by page once more: 2 to
    5 % of a step on a CPU.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT)
        mallopt(_MMAP_THRESHOLD, _LARGEST)


def search_no_driver() -> None:
    """Has torch ask CUDA's runtime whether there is a GPU, where there is none.

    Adam asks in every step. Lightning has torch ask the driver's library instead, so that a process with a GPU can
    fork; without a GPU that searches the disk for the library each time, up to 0.3 ms.
    """
    if torch.cuda.device_count() == 0:
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "0"
