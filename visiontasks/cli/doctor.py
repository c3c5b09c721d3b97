"""visiontasks doctor: what would go wrong in silence in a training with the same arguments, in seconds."""

import copy
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontasks.cli.command_line import run

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch.utils.data import DataLoader

    from visiontasks.cli.build import Config
    from visiontasks.contracts import Verdict
    from visiontasks.data.module import DataModule
    from visiontasks.tasks.base import Task

USAGE = """
python train.py doctor=true [the arguments of the training]      the same as: visiontasks doctor [arguments]

  visiontasks doctor task=segmentation backbone=resnet50 data=camvid data.root=camvid
  torchrun --nproc-per-node 2 -m visiontasks.cli.main doctor     compares the configs of all processes, too

One line a check: ok, warning or fault. The exit code is 1 where there is a fault, else 0.
"""
STEPS = 4  # of training that are watched
REPEATS = 12  # times that one batch is learnt
_SMALL = 16  # images of that batch
_SECONDS = 3.0  # that the loader is timed
_PROCESSES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "GROUP_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID")


def main() -> None:
    run(doctor, config="train", usage=USAGE, arguments=sys.argv[1:])


def doctor(composed: "DictConfig") -> None:
    """Prints a line for each check and exits with 1 where there is a fault."""
    from hydra.core.hydra_config import HydraConfig
    from lightning import seed_everything

    from visiontasks.cli.build import plain
    from visiontasks.cli.train import quieten

    config, folder = plain(composed), Path(HydraConfig.get().runtime.output_dir)
    quieten()
    begin = time.perf_counter()
    equal, first = same_config(config, folder)
    if not first:
        return
    seed_everything(config["seed"], workers=True, verbose=False)
    found = []
    for verdict in chain([equal], examined(composed, config, folder)):
        print(f"{verdict.status:<8} {verdict.check:<13} {verdict.sentence}", flush=True)
        found.append(verdict.status)
    with suppress(OSError):  # a run folder that something was written to stays
        folder.rmdir()
    faults, warnings = found.count("fault"), found.count("warning")
    seconds = time.perf_counter() - begin
    print(f"\n{len(found)} checks in {seconds:.0f} s: {faults} faults, {warnings} warnings")
    if faults:
        sys.exit(1)


def same_config(config: "Config", folder: Path) -> tuple["Verdict", bool]:
    """Whether all processes of torchrun have the same config but for the run folder, and whether this one goes on."""
    from torch import distributed as dist

    from visiontasks.layers.distributed import collected, rank

    text = json.dumps(config, sort_keys=True, default=str).replace(str(folder), "")  # its name is the second it began
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return compared([digest]), True
    dist.init_process_group("gloo")
    digests, own = collected(digest), rank()
    dist.destroy_process_group()
    for name in _PROCESSES:
        os.environ.pop(name, None)  # Lightning would wait for the others
    return compared(digests), own == 0


def compared(digests: list[str]) -> "Verdict":
    """Whether all digests of the processes' configs, by rank, are the same."""
    from visiontasks.contracts import Verdict

    if len(digests) == 1:
        return Verdict("config", "ok", f"the resolved config is {digests[0]}; one process, so nothing to compare")
    other = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if other:
        told = f"ranks {', '.join(map(str, other))} of {len(digests)} have another config than rank 0: {digests}"
        return Verdict("config", "fault", f"{told}; give all the same arguments, and no sampler a seed of its own")
    return Verdict("config", "ok", f"all {len(digests)} processes have the config {digests[0]}")


def examined(composed: "DictConfig", config: "Config", folder: Path) -> Iterator["Verdict"]:
    """The verdicts, in the order in which the data, the task and its first steps are looked at."""
    from visiontasks.callbacks import examination as see
    from visiontasks.cli.build import begin_transfer, build_data, build_task, start_backbone
    from visiontasks.cli.train import monitoring, select
    from visiontasks.data import checks

    data = build_data(config)
    select(data, config)
    data.setup()
    looked = checks.look(data)
    yield checks.files(looked, max_bad_fraction=data.max_bad_fraction)
    yield checks.balance(looked, data.target_classes)
    yield checks.augmentation(data)
    yield checks.evaluated_once(data)
    config = monitoring(composed, config, labelled="label" in data.keys)
    if config["task"].get("class_weights") == "balanced":
        config["task"]["class_weights"] = data.class_weights()
    task = build_task(config, classes=data.target_classes)
    yield arrived(start_backbone(task, config))
    transferring, _ = begin_transfer(task, data, config)
    untouched = copy.deepcopy(task)
    batch = next(iter(data.train_dataloader()))
    yield checks.normalised(task.images(batch if "image" in batch else {"image": batch["views"][0]}))
    seen = see.Examination()
    trained(task, config, folder, callbacks=[*transferring, seen], data=data)
    yield see.first_loss(seen, task)
    yield see.unused_parameters(seen)
    yield see.frozen_parts(seen)
    yield see.learning_rates(seen)
    repeated = see.Examination()
    trained(untouched, config, folder, callbacks=[*transferring, repeated], loader=repeats(batch))
    yield see.overfits(repeated.losses)
    workers, gpu = data.train_dataloader().num_workers, task.device.type == "cuda"
    yield see.who_waits(loader_speed(data), seen.images_per_second(), workers=workers, gpu=gpu)


def arrived(receipt: Any) -> "Verdict":
    """What the backbone starts from."""
    from visiontasks.contracts import Verdict

    if receipt is None:
        return Verdict("weights", "ok", "the backbone starts from random weights")
    return Verdict("weights", "ok", str(receipt))


def trained(
    task: "Task",
    config: "Config",
    folder: Path,
    *,
    callbacks: list[Any],
    data: "DataModule | None" = None,
    loader: "DataLoader[Any] | None" = None,
) -> None:
    """A few steps on one device, without logs, checkpoints or evaluation."""
    from visiontasks.cli.build import build_trainer

    alone = {"devices": 1, "num_nodes": 1, "strategy": "auto", "max_epochs": 1, "max_steps": -1, "max_time": None}
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "accumulate_grad_batches": 1}
    steps = {"limit_train_batches": STEPS if loader is None else REPEATS, "limit_val_batches": 0}
    bare = {"trainer": config["trainer"] | alone | quiet | steps, "callbacks": {}, "logger": {}}
    trainer = build_trainer(config | bare, folder=folder, callbacks=callbacks)
    trainer.fit(task, datamodule=data, train_dataloaders=loader)


def repeats(batch: dict[str, Any]) -> "DataLoader[Any]":
    """The first images of a batch, again and again."""
    from torch.utils.data import DataLoader

    small: Any = {key: _first(value) for key, value in batch.items() if key != "bad"}
    batches: Any = [small] * REPEATS
    return DataLoader(batches, batch_size=None)


def _first(value: Any) -> Any:
    if isinstance(value, list) and value and value[0].ndim == 4:  # views, each of the whole batch
        return [view[:_SMALL] for view in value]
    return value[:_SMALL]


def loader_speed(data: "DataModule") -> float:
    """Images a second of the training loader alone, after its first batch."""
    images, begin = 0, 0.0
    clock: Callable[[], float] = time.perf_counter
    for batch in data.train_dataloader():
        if not begin:
            begin = clock()
            continue
        images += len(batch.get("index", ()))
        if clock() - begin > _SECONDS:
            break
    return images / max(clock() - begin, 1e-9)


if __name__ == "__main__":
    main()
