"""transfer_study=true: does pretraining help here? The same run from scratch and transferred, on ever more labels."""

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from visiontasks.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig

FRACTIONS = (0.01, 0.1, 1.0)
STARTS = ("scratch", "transferred")
_OWN = ("transfer_study=", "data.fraction=", "hydra.run.", "resume=")
_SOURCE = ("init_from=", "init_allow_missing=", "backbone.weights=", "transfer=", "transfer.")


class Row(NamedTuple):
    """What one of the runs reached."""

    fraction: float
    start: str
    score: float


def study(composed: "DictConfig") -> float:
    """Trains six runs in folders of their own; writes study.csv and study.png; returns the gain on the fewest labels.

    Every run takes the same steps, on fewer images more often. With resume=auto, finished runs are not done again.
    Raises UsageError where there is nothing to transfer, or several processes are asked for.
    """
    from hydra.core.hydra_config import HydraConfig

    from visiontasks.cli.train import as_typed, begin_folder

    _check(composed)
    folder, given = Path(HydraConfig.get().runtime.output_dir), as_typed(HydraConfig.get())
    begin_folder(folder, composed, given)
    rows = []
    for fraction in FRACTIONS:
        for start in STARTS:
            place = folder / f"{start}_{fraction:.0%}".replace("%", "_percent")
            print(f"\nstudy      {start}, {fraction:.0%} of the labels", flush=True)
            rows.append(Row(fraction, start, _score(composed, place, given, start=start, fraction=fraction)))
    name = _figure(composed)
    write(rows, name, folder / "study.csv")
    draw(rows, name, folder / "study.png")
    gains = [(rows[at].fraction, rows[at + 1].score - rows[at].score) for at in range(0, len(rows), 2)]
    said = ", ".join(f"{gain:+.4f} at {fraction:.0%}" for fraction, gain in gains)
    print(f"\nstudy      {name}, transferred minus scratch: {said} of the labels (one seed)\nrun folder: {folder}")
    return gains[0][1]


def _check(composed: "DictConfig") -> None:
    from torch import cuda

    devices = composed.trainer.devices
    if devices not in {1, "auto"} or (devices == "auto" and cuda.device_count() > 1):
        raise UsageError("transfer_study=true trains one run after the other in one process: type trainer.devices=1.")
    if composed.init_from is None and not composed.backbone.get("weights"):
        raise UsageError("transfer_study=true has nothing to transfer: type init_from=PATH, imagenet or timm:NAME.")


def _score(composed: "DictConfig", place: Path, given: list[str], *, start: str, fraction: float) -> float:
    """What one run reached in the monitored figure: on the test split or, with test=false, in its best validation."""
    from visiontasks.cli.train import train

    summary = place / "summary.json"
    if composed.resume is None or not summary.is_file():
        words = [word for word in given if not word.startswith(_OWN + (_SOURCE if start == "scratch" else ()))]
        with _as_job(place, [*words, f"data.fraction={fraction}", f"hydra.run.dir={place}"]):
            train(_variant(composed, start=start, fraction=fraction))
    return float(json.loads(summary.read_text())[_figure(composed)])


def _figure(composed: "DictConfig") -> str:
    monitor = str(composed.task.monitor)
    return monitor.replace("val/", "test/", 1) if composed.test else f"best/{monitor}"


def _variant(composed: "DictConfig", *, start: str, fraction: float) -> "DictConfig":
    from omegaconf import OmegaConf

    changes: dict[str, Any] = {"transfer_study": False, "data.fraction": fraction}
    changes["resume"] = None if composed.resume is None else "auto"
    if start == "scratch":
        changes |= {"init_from": None, "transfer": {"_target_": "visiontasks.transfer.Transfer"}}
        changes |= {"backbone.weights": None} if "weights" in composed.backbone else {}
    variant = composed.copy()
    for key, value in changes.items():
        OmegaConf.update(variant, key, value, merge=False, force_add=True)
    return variant


@contextmanager
def _as_job(folder: Path, words: list[str]) -> Iterator[None]:
    """Hydra's word for the run folder and the command line, while one of the runs is on."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict, read_write

    from visiontasks.cli.train import as_typed

    hydra = HydraConfig.get()
    before = (hydra.runtime.output_dir, as_typed(hydra))
    with read_write(hydra), open_dict(hydra):
        hydra.runtime.output_dir, hydra.overrides.task = str(folder), words
        yield
        hydra.runtime.output_dir, hydra.overrides.task = before


def write(rows: list[Row], name: str, path: Path) -> None:
    """Writes a line a run: the share of the labels, where it started, what it reached."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["labels", "start", name])
        writer.writerows([row.fraction, row.start, f"{row.score:.6f}"] for row in rows)


def draw(rows: list[Row], name: str, path: Path) -> None:
    """Draws what was reached over the share of the labels, a line for each start."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for start, style in zip(STARTS, ("o--", "o-"), strict=True):
        points = [(row.fraction, row.score) for row in rows if row.start == start]
        axes.plot(*zip(*points, strict=True), style, label=start)
        for fraction, score in points:
            axes.annotate(f"{score:.3f}", (fraction, score), textcoords="offset points", xytext=(0, 6), fontsize=8)
    axes.set(xscale="log", xlabel="share of the training labels", ylabel=name, title="one seed, the same steps each")
    axes.set_xticks(FRACTIONS, [f"{fraction:.0%}" for fraction in FRACTIONS])
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
