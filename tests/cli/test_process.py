import ctypes
import subprocess
import sys

import pytest
import torch
from torch import nn

from visiontasks.cli.process import search_no_driver

STEP = """
import ctypes, sys
from visiontasks.cli.process import keep_freed_memory
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


@pytest.mark.skipif(torch.cuda.device_count() > 0, reason="needs a machine without a GPU")
def test_without_a_gpu_no_step_of_adam_searches_for_the_drivers_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # as Lightning does
    searches = []

    def counted() -> int:
        searches.append("libnvidia-ml")
        return 0

    monkeypatch.setattr(torch.cuda, "device_count", counted)
    optimizer = torch.optim.Adam(nn.Linear(2, 2).parameters())
    optimizer.step()
    assert searches
    search_no_driver()
    searches.clear()
    optimizer.step()
    assert not searches
