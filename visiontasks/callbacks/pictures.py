"""Pictures of a run: learning curves, predictions beside the truth, the confusion matrix, bars by class."""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from visiontasks.callbacks.metrics_file import read_columns
from visiontasks.layers.distributed import collected

LABELLED = 40  # classes whose names still fit the confusion matrix's axes
COUNTED = 20  # classes whose counts still fit its cells
BARS = 60  # classes that fit below each other
LARGE = 320  # pixels
EXPLAINED = 40  # classes whose colours still fit a legend
Mark = tuple[float, str]  # how wrong the prediction of an image is, and the image's name
NO_MARK: Mark = (0.0, "")


@dataclass(order=True)
class Tile:
    """One picture of a sheet, ordered by how wrong the prediction is."""

    error: float
    name: str
    image: Tensor = field(compare=False)  # uint8 (3, H, W)
    prediction: dict[str, Any] = field(compare=False)
    truth: dict[str, Any] | None = field(compare=False)


class ContactSheets(Callback):
    """Draws predictions.png, images spread evenly over the test set, and for each kind of error the worst, those first.

    Of a kind such as "misses" the pictures are misses.png, and misses.csv lists them by name. After each validation the
    same `validation_images` images, spread evenly over the validation set, go to validation/epoch_NNN.png. A task that
    draws n panels an image gets n times fewer images.
    """

    def __init__(self, *, images: int = 40, columns: int = 8, validation_images: int = 16) -> None:
        self.images = images
        self.columns = columns
        self.validation_images = validation_images
        self.sample: list[Tile] = []
        self.worst: dict[str, list[Tile]] = {}

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self.sample = []

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        wanted = _shared(self.validation_images, module)
        if len(self.sample) < wanted and not trainer.sanity_checking:
            rows = _spread(len(outputs), wanted, int(trainer.num_val_batches[0]), batch_idx)
            self.sample += _tiles(module, outputs, batch, dict.fromkeys(rows, NO_MARK))

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and self.sample:
            folder = Path(trainer.default_root_dir) / "validation"
            folder.mkdir(exist_ok=True)
            draw_sheet(module, self.sample, folder / f"epoch_{trainer.current_epoch:03d}.png", columns=self.columns)

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self.sample, self.worst = [], {}

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        data: Any = getattr(trainer, "datamodule")  # noqa: B009
        wanted = _shared(self.images, module)
        rows = _spread(len(outputs), wanted, int(trainer.num_test_batches[0]), batch_idx)
        self.sample += _tiles(module, outputs, batch, dict.fromkeys(rows, NO_MARK))
        names = [data.test_name(index) for index in batch["index"].tolist()]
        for kind, errors in module.errors(outputs, batch).items():
            known = self.worst.get(kind, [])
            worse = _worst(list(zip(errors.tolist(), names, strict=True)), known, wanted)
            self.worst[kind] = sorted([*known, *_tiles(module, outputs, batch, worse)], reverse=True)[:wanted]

    def on_test_end(self, trainer: Trainer, module: Any) -> None:
        parts = collected(self.worst)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        draw_sheet(module, self.sample, folder / "predictions.png", columns=self.columns)
        for kind in dict.fromkeys(kind for part in parts for kind in part):
            tiles = sorted((tile for part in parts for tile in part.get(kind, [])), reverse=True)
            self._draw_worst(module, kind, tiles[: _shared(self.images, module)], folder)

    def _draw_worst(self, module: Any, kind: str, tiles: list[Tile], folder: Path) -> None:
        if tiles:
            draw_sheet(module, tiles, folder / f"{kind}.png", columns=self.columns, named=True)
            _write_names(tiles, folder / f"{kind}.csv")


class ConfusionMatrix(Callback):
    """Draws confusion.png from the counts of the last test: a row is a true class, a column a predicted one."""

    def on_test_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and "confusion" in module.tables:
            path = Path(trainer.default_root_dir) / "confusion.png"
            draw_confusion(module.tables["confusion"].cpu(), module.confusion_classes, path, unit=module.unit)


class ClassBars(Callback):
    """Draws per_class_*.png, a bar for each class, of every figure that the last test measured by class."""

    def on_test_end(self, trainer: Trainer, module: Any) -> None:
        for name, values in module.tables.items():
            if trainer.is_global_zero and name.startswith("per_class_"):
                draw_bars(values.tolist(), module.classes, name, Path(trainer.default_root_dir) / f"{name}.png")


class LearningCurves(Callback):
    """Draws curves.png from metrics.csv: the losses, the monitored figure and the learning rate."""

    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        for logger in trainer.loggers:
            logger.save()  # else the last epoch's training figures are still to come
        file = Path(trainer.default_root_dir) / "metrics.csv"
        if trainer.is_global_zero and file.is_file():
            draw_curves(read_columns(file), module.monitor, file.with_name("curves.png"))


class PrecisionRecall(Callback):
    """Draws precision_recall.png: precision over recall at an IoU of 0.5, a curve for each class and their mean."""

    def on_test_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and "precision_recall" in module.tables:
            path = Path(trainer.default_root_dir) / "precision_recall.png"
            draw_precision_recall(module.tables["precision_recall"].cpu(), module.classes, path)


def draw_sheet(module: Any, tiles: list[Tile], path: Path, *, columns: int = 8, named: bool = False) -> None:
    """Draws images with their predictions and truths on a grid, with file names underneath where asked."""
    columns = min(_shared(columns, module), len(tiles))
    rows = math.ceil(len(tiles) / columns)
    tall = max(tile.image.shape[-2] / tile.image.shape[-1] for tile in tiles)
    width = 1.7 if module.panels == 1 else 2.2 * module.panels
    height = width / module.panels * min(tall, 2.0) + 0.4
    figure = Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    for axes, tile in zip(figure.subplots(rows, columns, squeeze=False).flat, tiles, strict=False):
        module.draw(axes, tile.image, tile.prediction, tile.truth)
        if named:
            axes.set_xlabel(_ending(Path(tile.name).name), fontsize=7)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[], frame_on=axes.has_data())
        axes.title.set_fontsize(9)
    _explain(figure, module.legend())
    figure.savefig(path, dpi=110)


def draw_one(module: Any, tile: Tile, path: Path) -> None:
    """Draws one image with its prediction, pixel for pixel where it is at least LARGE wide, with a legend."""
    height, width = tile.image.shape[-2:]
    panels = 1 if module.panels == 1 else 2  # without a truth
    scale = max(1.0, LARGE / width)
    figure = Figure(figsize=(width * scale * panels / 100, height * scale / 100 + 0.8), layout="constrained")
    axes = figure.subplots()
    module.draw(axes, tile.image, tile.prediction, tile.truth)
    axes.set(xticks=[], yticks=[], frame_on=False)
    _explain(figure, module.legend())
    figure.savefig(path, dpi=100, bbox_inches="tight")


def _ending(name: str, longest: int = 24) -> str:
    return name if len(name) <= longest else f"…{name[1 - longest :]}"


def _explain(figure: Figure, colours: dict[str, tuple[float, ...]]) -> None:
    if not 0 < len(colours) <= EXPLAINED:
        return
    patches = [Patch(facecolor=colour, edgecolor="black", label=name) for name, colour in colours.items()]
    fitting = max(1, int(figure.get_figwidth() / 1.1))
    figure.legend(handles=patches, loc="outside lower center", ncols=min(len(patches), fitting), fontsize=8)


def draw_bars(values: list[float], classes: tuple[str, ...], title: str, path: Path) -> None:
    """Draws one bar a class, the best on top, of many classes the lowest; a class without a value is named so."""
    order = sorted(range(len(values)), key=lambda k: (not math.isnan(values[k]), values[k]))[:BARS]
    figure = Figure(figsize=(7, 1.2 + 0.24 * len(order)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(range(len(order)), [0.0 if math.isnan(values[k]) else values[k] for k in order], color="steelblue")
    axes.bar_label(
        bars, ["not there" if math.isnan(values[k]) else f"{values[k]:.3f}" for k in order], padding=3, fontsize=8
    )
    axes.set_yticks(range(len(order)), [classes[k] for k in order], fontsize=8)
    axes.set(xlim=(0, 1.1), title=title.replace("_", " "))
    figure.savefig(path, dpi=110)


def draw_precision_recall(curves: Tensor, classes: tuple[str, ...], path: Path) -> None:
    """Draws curves (R, K) of precision at evenly spaced recalls; classes without objects are left out."""
    recalls = torch.linspace(0, 1, len(curves))
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    for name, curve in zip(classes, curves.T, strict=True):
        if not curve.isnan().all():
            axes.plot(recalls, curve, linewidth=0.8, label=name if len(classes) <= EXPLAINED else None)
    axes.plot(recalls, curves.nanmean(dim=1), color="black", linewidth=2, label="mean")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02), title="IoU 0.5")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=1 + len(classes) // 20)
    figure.savefig(path, dpi=110)


def draw_confusion(counts: Tensor, classes: tuple[str, ...], path: Path, *, unit: str = "images") -> None:
    """Draws counts (K, K), coloured by the share of each row."""
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)  # (K, K)
    side = min(14.0, 3.5 + 0.32 * len(classes))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="truth", title=f"{int(counts.sum()):,} {unit}")
    if len(classes) <= LABELLED:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= COUNTED:
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, _count(int(counts[i, j])), ha="center", va="center", color=colour, fontsize=7)
    figure.savefig(path, dpi=110)


def draw_curves(columns: dict[str, list[tuple[int, float]]], monitor: str, path: Path) -> None:
    """Draws the losses, the monitored figure and the learning rate over the steps."""
    panels = (("loss", _losses(columns)), (monitor, (monitor,)), ("learning rate", ("train/lr",)))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            axes.plot(*zip(*columns.get(name, [(0, math.nan)]), strict=True), label=name, marker=".", markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def _losses(columns: Iterable[str]) -> tuple[str, ...]:
    """The names of the whole loss, or, of a task that learns by several, those of each."""
    whole = tuple(name for name in ("train/loss", "val/loss") if name in columns)
    each = tuple(name for name in columns if name.startswith("train/") and name.endswith("_loss"))
    return whole or each or ("train/loss",)


def _shared(pictures: int, module: Any) -> int:
    """How many images make about so many pictures."""
    return math.ceil(pictures / int(module.panels))


def _spread(images: int, wanted: int, batches: int, batch: int) -> list[int]:
    """The rows of the share of the wanted images that falls to one batch of many, spread evenly over it."""
    share = (batch + 1) * wanted // batches - batch * wanted // batches
    return list(range(0, images, max(1, images // max(1, share))))[:share]


def _count(number: int) -> str:
    """A count that fits its cell: 9999, 12k, 56M."""
    if number < 10_000:
        return str(number)
    return f"{number / 1e3:.0f}k" if number < 1e6 else f"{number / 1e6:.3g}M"


def _write_names(tiles: list[Tile], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "error"])
        writer.writerows([tile.name, f"{tile.error:.4f}"] for tile in tiles)


def _tiles(module: Any, raw: Any, batch: dict[str, Any], marks: dict[int, Mark]) -> list[Tile]:
    """The tiles of the rows of a batch that have marks; nothing is worked out for the others."""
    rows = list(marks)
    own = {key: _chosen(values, rows) for key, values in batch.items() if key != "views"}
    own |= {"views": [_chosen(view, rows) for view in batch["views"]]} if "views" in batch else {}
    images = [image.cpu() for image in own["image"]]
    columns = (marks.values(), images, module.predictions(_chosen(raw, rows)), module.truths(own))
    return [Tile(*mark, *seen) for mark, *seen in zip(*columns, strict=True)]


def _chosen(values: Any, rows: list[int]) -> Any:
    return values[rows] if isinstance(values, Tensor) else [values[row] for row in rows]


def _worst(marks: list[Mark], known: list[Tile], wanted: int) -> dict[int, Mark]:
    """The rows of a batch, at most as many as wanted, that are worse than the last of the `known`, the worst so far."""
    least = (known[-1].error, known[-1].name) if len(known) == wanted else NO_MARK
    worse = [row for row, mark in enumerate(marks) if mark[0] > 0 and mark > least]
    return {row: marks[row] for row in sorted(worse, key=marks.__getitem__)[-wanted:]}
