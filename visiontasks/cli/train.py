"""python train.py: compose, build, fit, test."""

import json
import math
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontasks.cli.command_line import check_overrides, command, one_sentence, run
from visiontasks.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning import Trainer
    from omegaconf import DictConfig

    from visiontasks.cli.build import Config
    from visiontasks.data.module import DataModule
    from visiontasks.tasks.base import Task
    from visiontasks.weights import Receipt

USAGE = """
python train.py [group=choice ...] [key=value ...]

  python train.py                                              digits, in about two minutes
  python train.py backbone=mobilenet_v2 data=cifar10 optimizer=sgd trainer.max_epochs=20
  python train.py task=segmentation backbone=resnet50
  python train.py data=image_folder data.root=photos backbone.weights=imagenet
  python train.py init_from=runs/... transfer=gradual          starts the backbone from another run
  python train.py resume=runs/classification/...               goes on with a run
  python train.py -m backbone=resnet18,resnet34                one run for each
  python train.py --cfg job                                    prints the composed config, every key
"""
PROBED = ("val/knn", "val/knn_200", "val/linear")  # what callbacks.Probes measures


def main() -> None:
    given = sys.argv[1:]
    with one_sentence(debug="debug=true" in given, config="train", arguments=given):
        arguments = resumed(given)
    run(train, config="train", usage=USAGE, arguments=arguments)


def resumed(arguments: list[str]) -> list[str]:
    """The arguments, where resume names a run folder, after those that the run was started with.

    Raises UsageError where the folder's command.txt is none that train.py wrote.
    """
    given = next((argument.partition("=")[2] for argument in arguments if argument.startswith("resume=")), "auto")
    folder = Path(given)
    folder = folder.parent.parent if folder.suffix == ".ckpt" else folder
    started = folder / "command.txt"
    if given in {"auto", "null", ""} or not started.is_file():
        return arguments
    before = [word for word in words_of(started) if not word.startswith(("resume=", "hydra.run."))]
    own_folder = [] if any(word.startswith("hydra.run.dir=") for word in arguments) else [f"hydra.run.dir={folder}"]
    return [*before, *(word for word in arguments if word not in before), *own_folder]


def words_of(started: Path) -> list[str]:
    """The overrides in a command.txt; raises UsageError where it holds what train.py never writes."""
    try:
        words = shlex.split(started.read_text())[2:]
    except ValueError as error:
        raise UsageError(f"{started} is no command ({error}): type the whole command yourself.") from error
    check_overrides(words, of=started)
    return words


def train(composed: "DictConfig") -> float:
    """One run, a study of several, or a look at what would go wrong: returns the best value of the monitored figure."""
    if composed.doctor:
        from visiontasks.cli.doctor import doctor

        doctor(composed)
        return 0.0
    if composed.transfer_study:
        from visiontasks.cli.study import study

        return study(composed)
    return one_run(composed)


def one_run(composed: "DictConfig") -> float:
    """Builds the parts, fits and tests; returns the best value of the monitored figure."""
    from hydra.core.hydra_config import HydraConfig
    from lightning import seed_everything
    from torch import cuda

    from visiontasks.cli.build import (
        PARTS,
        begin_transfer,
        build_data,
        build_task,
        build_trainer,
        one_column_wide,
        plain,
        read_checkpoint,
        start_backbone,
    )
    from visiontasks.cli.trusted import check_environment

    hydra = HydraConfig.get()
    config, folder = plain(composed), Path(hydra.runtime.output_dir)
    check_environment(composed, PARTS)
    checkpoint = resume_from(config["resume"], folder)
    if checkpoint is not None:
        read_checkpoint(checkpoint)  # which refuses what is no run's
    quieten()
    seed_everything(config["seed"], workers=True, verbose=False)
    data = build_data(config)
    select(data, config)
    data.setup()
    config = monitoring(composed, config, labelled="label" in data.keys)
    if config["task"].get("class_weights") == "balanced":
        config["task"]["class_weights"] = data.class_weights()
    task = build_task(config, classes=data.target_classes)
    receipt = None if checkpoint else start_backbone(task, config)
    transferring, why = begin_transfer(task, data, config)
    if config["compile"]:
        task.compile_parts()
    if config["trainer"]["precision"] == "auto" and not cuda.is_available() and one_column_wide(task, data):
        config["trainer"]["precision"] = "32-true"
    trainer = build_trainer(config, folder=folder, callbacks=transferring)
    if trainer.is_global_zero:
        begin_folder(folder, composed, as_typed(hydra))
        say_start(receipt, why, folder)
    if checkpoint is None:
        tune(trainer, task, data, config)
    trainer.fit(task, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return finish(trainer, task, test=config["test"])


def select(data: "DataModule", config: "Config") -> None:
    """Keeps of the data what the task needs, and what it takes where they have it."""
    from hydra.utils import get_class

    from visiontasks.cli.build import task_of

    task = task_of(config)
    data.select(task.required(get_class(config["head"]["_target_"])), task.wants, otherwise=task.otherwise)


def monitoring(composed: "DictConfig", config: "Config", *, labelled: bool) -> "Config":
    """The config, watching val/loss and saying so where it would watch what nobody is there to measure."""
    from visiontasks.cli.build import plain

    monitor = config["task"]["monitor"]
    if monitor not in PROBED or (labelled and (config.get("callbacks") or {}).get("probes")):
        return config
    print(f"monitor    val/loss: {monitor} is measured on labels, by watch=probes", flush=True)
    composed.task.monitor, composed.task.mode = "val/loss", "min"
    return plain(composed)


def resume_from(resume: str | None, folder: Path) -> Path | None:
    """The checkpoint to go on from; None starts anew. Raises UsageError rather than write over another run."""
    place = folder if resume in {None, "auto"} else Path(str(resume))
    kept = [place] if place.is_file() else [place / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt")]
    found = [file for file in kept if file.is_file()]
    if resume is None and found:
        raise UsageError(f"{folder} already holds a run: type resume=auto to go on with it, or another hydra.run.dir.")
    if not found and resume in {None, "auto"}:
        return None
    if not found:
        raise UsageError(f"resume={resume} holds no checkpoints/last.ckpt: give a run folder or a .ckpt file.")
    return good_checkpoint(found)


def good_checkpoint(files: "Sequence[Path]") -> Path:
    """The first that is not damaged, saying which are; raises UsageError where all are."""
    from visiontasks.durable import verify

    damages = []
    for file in files:
        try:
            verify(file)
        except UsageError as damage:
            damages.append(str(damage))
            continue
        if damages:
            print(f"resume     {' '.join(damages)} Going on from {file}", flush=True)
        return file
    raise UsageError(f"{' '.join(damages)} Nothing is left to go on from: type another hydra.run.dir to start anew.")


def begin_folder(folder: Path, composed: "DictConfig", overrides: list[str]) -> None:
    """Writes the composed config and the exact command to repeat the run."""
    from omegaconf import OmegaConf

    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(composed, folder / "config.yaml")
    (folder / "command.txt").write_text(command("train.py", overrides) + "\n")


def as_typed(hydra: Any) -> list[str]:
    """The overrides of Hydra's own config, with the interpolations in them as they were typed."""
    from omegaconf import OmegaConf

    words: Any = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    return list(words)


def say_start(receipt: "Receipt | None", why: str, folder: Path) -> None:
    """Prints what arrived in the backbone, with each name in receipt.json, and why transfer=auto chose what it did."""
    if receipt is not None:
        (folder / "receipt.json").write_text(json.dumps(asdict(receipt), indent=2) + "\n")
        print(f"weights    {receipt}", flush=True)
    if why:
        print(f"transfer   {why}", flush=True)


def tune(trainer: "Trainer", task: "Task", data: "DataModule", config: "Config") -> None:
    """Finds the batch size, then the learning rate, where asked, and says what it found."""
    from lightning.pytorch.tuner.tuning import Tuner

    if task.steps_itself and (config["find_lr"] or config["find_batch_size"]):
        name = type(task).__name__
        raise UsageError(
            f"{name} has several optimisers, for which nothing is found: type find_lr=false find_batch_size=false."
        )
    if config["find_batch_size"]:
        Tuner(trainer).scale_batch_size(task, datamodule=data, init_val=8, steps_per_trial=3)
        print(f"found      data.batch_size={data.batch_size}")
    if config["find_lr"]:
        Tuner(trainer).lr_find(task, datamodule=data, attr_name="lr")
        if task.lr is None:
            raise UsageError(
                "find_lr=true found no falling loss: give it more steps (trainer.max_epochs=) or find_lr=false."
            )
        print(f"found      optimizer.lr={task.lr:.2e}")


def finish(trainer: "Trainer", task: "Task", *, test: bool) -> float:
    """Tests the best weights, writes summary.json, prints the table and the run folder."""
    from visiontasks.callbacks.report import Report, table, write_summary

    found: list[Any] = [callback for callback in trainer.checkpoint_callbacks if callback.monitor]  # type: ignore[attr-defined]
    best = next((callback for callback in found if callback.best_model_score is not None), None)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items() if "/" in name}
    score = metrics.get(task.monitor, math.nan) if best is None else float(best.best_model_score)
    report = next(callback for callback in trainer.callbacks if isinstance(callback, Report))  # type: ignore[attr-defined]
    summary = report.summary(trainer, task, metrics)
    if test:
        path = None if best is None else best.best_model_path
        (tested,) = trainer.test(task, datamodule=trainer.datamodule, ckpt_path=path, verbose=False)  # type: ignore[attr-defined]
        metrics |= tested
        summary = summary | report.summary(trainer, task, metrics)
    if trainer.is_global_zero:
        folder = Path(trainer.default_root_dir)
        write_summary(folder, summary | {f"best/{task.monitor}": score})
        best_is_tested = test and best is not None
        chosen = [f"test/ is of the weights with the best {task.monitor}, {score:.4f}"] if best_is_tested else []
        if best is None and task.monitor not in metrics:
            chosen = [f"no validation ran, so there is no best {task.monitor}: the weights are the last ones"]
        print("\n".join(["", table(metrics), "", *chosen, f"run folder: {folder}"]))
    return score


def quieten() -> None:
    """Silences what Lightning says beside our own lines, and the warnings that our defaults answer."""
    import logging
    import warnings

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        r".*does not have many workers.*",  # on a CPU, workers would only compete with the training
        r".*recommended to use `.*sync_dist=True.*",  # our figures are already over all processes
        r".*Checkpoint directory .* exists and is not empty.*",
        r".*number of training batches .* is smaller than the logging interval.*",
        r".*module\(s\) in eval mode.*",  # which frozen parts are meant to be
        r".*isinstance\(treespec, LeafSpec\).*",  # Lightning's own
        r".*your dataloader is not resumable.*",  # it begins with the batch that is next
        r".*You defined a `validation_step` but have no `val_dataloader`.*",  # which the doctor leaves out
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    main()
