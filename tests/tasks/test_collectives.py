"""What processes exchange: in a step gradients and the loss's count; in a log interval all figures, and bad files."""

import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Callback, LightningModule, Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from tests.data.test_module import NoiseData
from tests.test_equality import Plain
from visiontasks.heads import FCN, Linear
from visiontasks.tasks import Classification, Segmentation

INTERVAL = 3  # steps between two lines of the log
TASKS: dict[str, Any] = {"label": (Classification, Linear), "mask": (Segmentation, FCN)}


class Counting(Callback):
    """Counts the collectives of the second log interval, by which DDP has arranged its buckets."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}
        self.profiler = profile(activities=[ProfilerActivity.CPU])

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == INTERVAL:
            self.profiler.start()
        if batch_idx == 2 * INTERVAL:
            self.profiler.stop()
            names = [event.name for event in self.profiler.events() or ()]
            self.seen = dict(Counter(name for name in names if name.startswith("c10d::")))


def train(process: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"LOCAL_RANK": str(process), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=process, world_size=2)
    counts = {name: counted(name, *parts) for name, parts in TASKS.items()}
    torch.save(counts, f"{folder}/{process}.pt")
    dist.barrier()
    dist.destroy_process_group()


def counted(needs: str, kind: Any, head: Any) -> dict[str, int]:
    data = NoiseData(image_size=32, batch_size=2, train_size=32)
    data.select(frozenset({needs}))
    data.setup()
    task = kind(backbone=Plain(), classes=data.target_classes, head=head, monitor="val/loss", mode="min")
    for name, layer in list(task.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):  # whose buffers DDP broadcasts
            task.set_submodule(name, nn.Identity())
    counting = Counting()
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=2,
        max_epochs=1,
        limit_val_batches=0,
        log_every_n_steps=INTERVAL,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[counting],
    )
    trainer.fit(task, datamodule=data)
    return counting.seen


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> list[dict[str, dict[str, int]]]:
    """Of each process, by the task's annotation."""
    folder = tmp_path_factory.mktemp("processes")
    mp.start_processes(train, args=(str(folder),), nprocs=2, start_method="fork")
    return [torch.load(Path(folder) / f"{process}.pt") for process in range(2)]


@pytest.mark.parametrize("needs", TASKS)
def test_a_step_exchanges_gradients_and_the_count_and_an_interval_its_figures(needs: str, counts: Any) -> None:
    gradients, loss, log, bad_files = INTERVAL, INTERVAL, 1, 1
    sigterm = INTERVAL  # Lightning tells all ranks whether the first was asked to end
    for found in counts:
        assert found[needs] == {"c10d::allreduce_": gradients + loss + log + bad_files, "c10d::broadcast_": sigterm}
