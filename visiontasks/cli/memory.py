"""What the process that trains asks of the memory allocator."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3), of glibc
_KEPT = 1 << 30  # bytes of freed memory that stay with the process
_LARGEST = 1 << 25  # bytes, the largest threshold that glibc takes


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
