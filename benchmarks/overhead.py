"""What Trainer.fit with our defaults costs over a bare PyTorch loop: python benchmarks/overhead.py [--rounds 7].

The same network, uint8 batches, precision, layout, loss, optimiser and schedule, in one process, alternating. The
clock runs from the first training batch to the last, so set-up, which happens once a run, is not in it. A third
column is Lightning as people write it: a bar that moves every step, self.log of loss and accuracy every step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from lightning import Callback, LightningModule, Trainer
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchmetrics.classification import MulticlassAccuracy

from visiontasks.cli.build import build_task, build_trainer, native_bfloat16, plain
from visiontasks.cli.command_line import CONF
from visiontasks.cli.train import quieten
from visiontasks.data.module import DataModule
from visiontasks.tasks.base import Task

CASES = {
    "ResNet-18, 96 px, batch 32": ("resnet18", 96, 32, 40, 1.03),
    "ResNet-20, 32 px, batch 128": ("resnet20", 32, 128, 80, 1.10),
}
CLASSES = tuple("0123456789")


class Batches(Dataset[dict[str, Tensor]]):
    """A few ready batches, over and over."""

    def __init__(self, size: int, batch: int, steps: int) -> None:
        self.steps = steps
        self.made = [
            {
                "image": torch.randint(0, 256, (batch, size, size, 3), dtype=torch.uint8).permute(0, 3, 1, 2),
                "label": torch.randint(0, len(CLASSES), (batch,)),
                "index": torch.arange(batch),
            }
            for _ in range(8)
        ]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.made[index % len(self.made)]


class Ready(DataModule):
    """The batches as a data module."""

    provides = frozenset({"label"})
    mirror = False

    def __init__(self, batches: Batches) -> None:
        super().__init__(image_size=batches.made[0]["image"].shape[-1], batch_size=len(batches.made[0]["image"]))
        self.batches = batches
        self.classes = CLASSES

    def setup(self, stage: str | None = None) -> None:
        """Has nothing to read."""

    def sizes(self) -> dict[str, int]:
        return {"train": len(self.batches) * self.batch_size}

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)

    def val_dataloader(self) -> list[Any]:
        return []


class Clock(Callback):
    """Seconds from the first training batch to the end of the last."""

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds = time.perf_counter() - self.start


class Usual(LightningModule):
    """A stock module around the same network."""

    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task
        self.accuracy = MulticlassAccuracy(len(CLASSES))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        logits = self.task(self.task.images(batch))
        loss = F.cross_entropy(logits.float(), batch["label"], label_smoothing=0.1)
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/accuracy", self.accuracy(logits, batch["label"]), prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, weight_decay=0.05, fused=True)


def composed(words: Iterable[str], folder: Path) -> dict[str, Any]:
    """The default config with every callback and logger, for one epoch."""
    overrides = [*words, "trainer.max_epochs=1", f"hydra.run.dir={folder}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    config.hydra.runtime.output_dir = str(folder)
    HydraConfig.instance().set_config(config)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return plain(config)


def ours(config: dict[str, Any], task: Task, data: Ready, folder: Path) -> float:
    """Seconds a step of Trainer.fit with our defaults."""
    trainer, clock = build_trainer(config, folder=folder), Clock()
    trainer.callbacks.append(clock)  # type: ignore[attr-defined]
    trainer.fit(task, datamodule=data)
    return clock.seconds / len(data.batches)


def usual(config: dict[str, Any], task: Task, data: Ready, folder: Path) -> float:
    """Seconds a step of a stock Lightning script in the same precision and layout."""
    clock = Clock()
    precision: Any = "bf16-mixed" if native_bfloat16() else "32-true"
    trainer = Trainer(
        max_epochs=1, precision=precision, callbacks=[clock], default_root_dir=folder, log_every_n_steps=50
    )
    trainer.fit(Usual(task), datamodule=data)
    return clock.seconds / len(data.batches)


def bare(config: dict[str, Any], task: Task, data: Ready, folder: Path) -> float:
    """Seconds a step of a plain loop."""
    task.train()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(data.batches))
    start = time.perf_counter()
    for batch in data.train_dataloader():
        with torch.autocast("cpu", torch.bfloat16, enabled=native_bfloat16()):
            logits = task(task.images(batch))
            loss = F.cross_entropy(logits.float(), batch["label"], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (time.perf_counter() - start) / len(data.batches)


def rounds(case: tuple[str, int, int, int, float], count: int) -> Iterator[tuple[float, float, float]]:
    """Seconds a step of the bare loop, ours and the usual script, once a round in turn, after one to warm up."""
    backbone, size, batch, steps, _ = case
    data = Ready(Batches(size, batch, steps))
    with tempfile.TemporaryDirectory() as name:
        for number in range(count + 1):
            folder = Path(name) / str(number)
            config = composed([f"backbone={backbone}", f"data.image_size={size}"], folder)
            task = build_task(config, classes=CLASSES)
            times = tuple(run(config, task, data, folder) for run in (bare, ours, usual))
            if number > 0:
                yield times  # type: ignore[misc]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    count = parser.parse_args().rounds
    quieten()
    for name, case in CASES.items():
        bares, mine, stock = zip(*rounds(case, count), strict=True)
        ratio = statistics.median(m / b for m, b in zip(mine, bares, strict=True))
        other = statistics.median(s / b for s, b in zip(stock, bares, strict=True))
        print(f"{name}: bare {1e3 * statistics.median(bares):.1f} ms a step; ", end="")
        print(f"ours x {ratio:.3f} (target {case[-1]}), a stock Lightning script x {other:.3f}")


if __name__ == "__main__":
    main()
