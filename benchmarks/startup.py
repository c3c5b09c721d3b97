"""How long until help is printed and until the first training step, and which imports weigh most.

python benchmarks/startup.py [key=value ...]     the arguments go to train.py
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "torch",
    "torchvision",
    "albumentations",
    "timm",
    "torchmetrics",
    "lightning",
    "matplotlib",
    "sklearn",
    "hydra",
)
SHORT = ("trainer.max_steps=2", "trainer.max_epochs=1", "trainer.limit_val_batches=1", "test=false")


def seconds(command: list[str]) -> float:
    """Wall-clock seconds of a command, the median of three after one to warm the file cache."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[1]


def first_step(arguments: list[str]) -> float:
    """Seconds from the start of `python train.py` to the end of its first training step."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "train.py", *SHORT, f"hydra.run.dir={folder}", *arguments]
        start = time.time()
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        summary = json.loads((Path(folder) / "summary.json").read_text())
    return float(summary["first_step_at"]) - start


def main() -> None:
    print(f"python train.py --help        {seconds([sys.executable, 'train.py', '--help']):.2f} s (target 1.5)")
    steps = sorted(first_step(sys.argv[1:]) for _ in range(3))
    print(f"python train.py: first step   {steps[1]:.1f} s")
    for name in HEAVY:
        print(f"  import {name:<15}        {seconds([sys.executable, '-c', f'import {name}']):.2f} s")


if __name__ == "__main__":
    main()
