"""python evaluate.py run=PATH: rebuilds a task from its checkpoint and measures it on any split of any data."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from visiontasks.cli.command_line import run
from visiontasks.cli.stored import offer_checkpoint
from visiontasks.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig

USAGE = """
python evaluate.py run=PATH [split=train|val|test] [data=...] [key=value ...]

  python evaluate.py run=runs/classification/2026-11-21_10-00-00
  python evaluate.py run=runs/... data=image_folder data.root=photos split=val data.batch_size=64
"""


def main() -> None:
    run(evaluate, config="evaluate", usage=USAGE, arguments=sys.argv[1:], before=offer_checkpoint)


def evaluate(composed: "DictConfig") -> None:
    """Writes summary.json and pictures beside the run, and prints the figures."""
    from visiontasks.callbacks.report import Report, table, write_summary
    from visiontasks.cli.build import build_data, build_trainer, load_task, plain
    from visiontasks.cli.train import quieten

    config, folder = plain(composed), output_folder()
    if config["split"] not in ("train", "val", "test"):
        raise UsageError(f"split={config['split']} is not a split: type split=train, split=val or split=test.")
    quieten()
    task = load_task(Path(config["checkpoint"]["path"]), config["task"])
    data = build_data(config)
    data.select(task.needs, task.wants)
    data.setup()
    if task.needs:
        check_classes(task.classes, data.target_classes)
    data.test_split = config["split"]
    trainer = build_trainer(config, folder=folder)
    if trainer.is_global_zero:
        print(f"run        {config['checkpoint']['path']}")
        print(f"data       {type(data).__name__}: {data.sizes()[config['split']]:,} {config['split']}", flush=True)
    (measured,) = trainer.test(task, datamodule=data, verbose=False)
    metrics = {name.replace("test/", f"{config['split']}/"): value for name, value in measured.items()}
    report = next(callback for callback in trainer.callbacks if isinstance(callback, Report))  # type: ignore[attr-defined]
    summary = report.summary(trainer, task, metrics)  # of all processes
    if trainer.is_global_zero:
        write_summary(folder, summary | {"run": config["checkpoint"]["path"]})
        print(f"\n{table(metrics)}\n\nevaluation folder: {folder}")


def output_folder() -> Path:
    """The folder that Hydra made for this job."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def check_classes(learnt: tuple[str, ...], found: tuple[str, ...]) -> None:
    """Raises UsageError where the data's classes are not those that the task has learnt, in the same order."""
    if learnt == found:
        return
    missing, extra = set(learnt) - set(found), set(found) - set(learnt)
    raise UsageError(
        f"The run has learnt {len(learnt)} classes and the data has {len(found)}: "
        f"missing {sorted(missing)[:5]}, unknown {sorted(extra)[:5]}; give data with the classes {list(learnt)[:20]}."
    )


if __name__ == "__main__":
    main()
