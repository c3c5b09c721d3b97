import ctypes
import subprocess
import sys

import pytest

STEP = """
import ctypes, sys
from visiontasks.cli.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
class Figures(ctypes.Structure):  # mallinfo2(3)
    _fields_ = [("all", ctypes.c_size_t * 10)]
libc.mallinfo2.restype = Figures
libc.free(libc.malloc(30 << 20))
print(libc.mallinfo2().all[8] >> 20)  # MiB that are free and the process's own
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33")
def test_what_a_step_frees_stays_for_the_next_one() -> None:
    kept, freed = (
        int(subprocess.run([sys.executable, "-c", STEP, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "freed")
    )
    assert freed < 30 <= kept
