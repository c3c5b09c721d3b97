"""Pictures of a run: learning curves, predictions beside the truth, the confusion matrix."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from visiontasks.callbacks.metrics_file import read_columns
from visiontasks.layers.distributed import world_size

LABELLED = 40  # classes whose names still fit the confusion matrix's axes
COUNTED = 20  # classes whose counts still fit its cells


@dataclass(order=True)
class Tile:
    """One picture of a sheet, ordered by how wrong the prediction is."""

    error: float
    name: str
    image: Tensor = field(compare=False)  # uint8 (3, H, W)
    prediction: dict[str, Any] = field(compare=False)
    truth: dict[str, Any] | None = field(compare=False)


class ContactSheets(Callback):
    """Draws predictions.png, images spread evenly over the test set, and mistakes.png, the worst, most wrong first."""

    def __init__(self, *, images: int = 40, columns: int = 8) -> None:
        self.images = images
        self.columns = columns
        self.sample: list[Tile] = []
        self.worst: list[Tile] = []

    def on_test_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self.sample, self.worst = [], []

    def on_test_batch_end(
        self,
        trainer: Trainer,
        module: Any,
        outputs: Any,
        batch: dict[str, Any],
        batch_idx: int,  # noqa: ARG002
        dataloader_idx: int = 0,  # noqa: ARG002
    ) -> None:
        data: Any = getattr(trainer, "datamodule")  # noqa: B009
        tiles = _tiles(module, outputs, batch, [data.test_name(index) for index in batch["index"].tolist()])
        share = math.ceil(self.images / int(trainer.num_test_batches[0]))
        stride = max(1, len(tiles) // share)
        self.sample += tiles[::stride][:share]
        wrong = [tile for tile in tiles if tile.error > 0]
        self.worst = sorted([*self.worst, *wrong], reverse=True)[: self.images]

    def on_test_end(self, trainer: Trainer, module: LightningModule) -> None:
        worst = sorted(_gathered(self.worst), reverse=True)[: self.images]
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        draw_sheet(module, self.sample[: self.images], folder / "predictions.png", columns=self.columns)
        if worst:
            draw_sheet(module, worst, folder / "mistakes.png", columns=self.columns, named=True)


class ConfusionMatrix(Callback):
    """Draws confusion.png from the counts of the last test: a row is a true class, a column a predicted one."""

    def on_test_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and "confusion" in module.tables:
            path = Path(trainer.default_root_dir) / "confusion.png"
            draw_confusion(module.tables["confusion"].cpu(), module.classes, path)


class LearningCurves(Callback):
    """Draws curves.png from metrics.csv: the losses, the monitored figure and the learning rate."""

    def on_fit_end(self, trainer: Trainer, module: Any) -> None:
        file = Path(trainer.default_root_dir) / "metrics.csv"
        if trainer.is_global_zero and file.is_file():
            draw_curves(read_columns(file), module.monitor, file.with_name("curves.png"))


def draw_sheet(module: Any, tiles: list[Tile], path: Path, *, columns: int = 8, named: bool = False) -> None:
    """Draws images with their predictions and truths on a grid, with file names underneath where asked."""
    columns = min(columns, len(tiles))
    rows = math.ceil(len(tiles) / columns)
    figure = Figure(figsize=(1.7 * columns, 2.1 * rows), layout="constrained")
    for axes, tile in zip(figure.subplots(rows, columns, squeeze=False).flat, tiles, strict=False):
        module.draw(axes, tile.image, tile.prediction, tile.truth)
        if named:
            axes.set_xlabel(Path(tile.name).name[-24:], fontsize=7)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[], frame_on=axes.has_data())
        axes.title.set_fontsize(9)
    figure.savefig(path, dpi=110)


def draw_confusion(counts: Tensor, classes: tuple[str, ...], path: Path) -> None:
    """Draws counts (K, K), coloured by the share of each row."""
    shares = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)  # (K, K)
    side = min(14.0, 3.5 + 0.32 * len(classes))
    figure = Figure(figsize=(side + 0.6, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(drawn, ax=axes, label="share of the true class", shrink=0.8)
    axes.set(xlabel="predicted", ylabel="truth", title=f"{int(counts.sum())} images")
    if len(classes) <= LABELLED:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
    if len(classes) <= COUNTED:
        for i, j in counts.nonzero().tolist():
            colour = "white" if shares[i, j] > 0.5 else "black"
            axes.text(j, i, str(int(counts[i, j])), ha="center", va="center", color=colour, fontsize=7)
    figure.savefig(path, dpi=110)


def draw_curves(columns: dict[str, list[tuple[int, float]]], monitor: str, path: Path) -> None:
    """Draws the losses, the monitored figure and the learning rate over the steps."""
    panels = (("loss", ("train/loss", "val/loss")), (monitor, (monitor,)), ("learning rate", ("train/lr",)))
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    for axes, (title, names) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for name in names:
            axes.plot(*zip(*columns.get(name, [(0, math.nan)]), strict=True), label=name, marker=".", markersize=3)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)


def _tiles(module: Any, raw: Any, batch: dict[str, Any], names: list[str]) -> list[Tile]:
    images = batch["image"].cpu()
    columns = (module.errors(raw, batch).tolist(), names, images, module.predictions(raw), module.truths(batch))
    return [Tile(*row) for row in zip(*columns, strict=True)]


def _gathered(tiles: list[Tile]) -> list[Tile]:
    if world_size() == 1:
        return tiles
    parts: list[list[Tile]] = [[] for _ in range(world_size())]
    dist.all_gather_object(parts, tiles)
    return [tile for part in parts for tile in part]
