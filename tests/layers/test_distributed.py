import subprocess
import sys
from pathlib import Path

ENDED = """
import gc, sys, weakref
import torch.distributed as dist
from visiontasks.layers import distributed

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
world, beside = dist.group.WORLD, dist.new_group(backend="gloo")
distributed.dist.new_group = lambda backend: beside
if sys.argv[2] == "nccl":
    distributed.dist.get_backend = lambda group: "nccl"
group = distributed._between_cpus(world)
assert group is distributed._between_cpus(world) and group is (world if sys.argv[2] == "gloo" else beside)
known = [weakref.ref(world), weakref.ref(beside)]
distributed.dist.new_group = None
del world, beside, group
dist.destroy_process_group()
gc.collect()
print([group() for group in known])
"""


def test_no_group_outlives_its_world(tmp_path: Path) -> None:
    for backend in ("gloo", "nccl"):
        words = [sys.executable, "-c", ENDED, str(tmp_path / backend), backend]
        assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == "[None, None]"
