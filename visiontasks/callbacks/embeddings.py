"""Two pictures of what a backbone finds alike: a map of embeddings, and the nearest neighbours of some images."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from lightning import Callback, Trainer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from visiontasks.callbacks.features import Features, Rows, annotations
from visiontasks.layers.embeddings import unit
from visiontasks.layers.modes import at_rest

Pixels = NDArray[np.uint8]  # (H, W, 3)
EXPLAINED = 40  # classes whose colours still fit a legend
INCHES, DPI = 11.0, 110  # of the map
GREY = (0.45, 0.45, 0.45)


class EmbeddingPictures(Callback):
    """Draws, when training ends, embedding_map.png and neighbours.png from the last weights.

    The map is a t-SNE (van der Maaten and Hinton 2008, JMLR 9) of at most `images` validation images, drawn by the
    seed. The other shows `queries` of them, spread over the classes, and the `nearest` images of the bank
    (`data.probe_dataloader()`) to each by cosine. Frames tell classes where the data have one label an image.
    """

    def __init__(self, *, images: int = 1000, queries: int = 10, nearest: int = 8, thumbnail: int = 40) -> None:
        self.images = images
        self.queries = queries
        self.nearest = nearest
        self.thumbnail = thumbnail  # least pixels a side in the map; few images get up to twice as many

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        data: Any = getattr(trainer, "datamodule")  # noqa: B009
        loaders = data.probe_dataloader("val", images=self.images), data.probe_dataloader()
        labelled = not getattr(annotations(loaders[1]).get("label", np.zeros(1)), "ndim", 0)
        with at_rest(module):
            features = Features(trainer, module)
            seen, bank = (features.rows(loader, labelled=labelled) for loader in loaders)
        if trainer.is_global_zero:
            folder, classes = Path(trainer.default_root_dir), tuple(data.classes)
            self._map(seen, loaders[0].dataset, classes, folder / "embedding_map.png")
            self._neighbours((seen, bank), [loader.dataset for loader in loaders], classes, folder / "neighbours.png")

    def _map(self, seen: Rows, data: Any, classes: tuple[str, ...], path: Path) -> None:
        places = flattened(seen.features)
        side = min(2 * self.thumbnail, max(self.thumbnail, int(0.8 * INCHES * DPI / len(places) ** 0.5)))
        shown = apart(places, side * 1.25 / (INCHES * DPI))
        pictures = {row: thumbnail(data, int(seen.index[row]), side) for row in shown}
        labels = None if seen.labels is None else seen.labels.tolist()
        draw_map(places, pictures, labels, classes, path)

    def _neighbours(self, rows: tuple[Rows, Rows], data: list[Any], classes: tuple[str, ...], path: Path) -> None:
        seen, bank = rows
        queries = spread(seen, self.queries)
        similar, nearest = (unit(seen.features[queries]) @ unit(bank.features).T).topk(
            min(self.nearest, len(bank.features)), dim=1
        )
        names = [None if part.labels is None else [classes[k] for k in part.labels.tolist()] for part in rows]
        tiles = [
            [_tile(data[0], seen, query, names[0])]
            + [_tile(data[1], bank, row, names[1], alike) for row, alike in zip(found, likeness, strict=True)]
            for query, found, likeness in zip(queries, nearest.tolist(), similar.tolist(), strict=True)
        ]
        draw_neighbours(tiles, path)


Tile = tuple[Pixels, str | None, float]  # an image, its class and its similarity


def _tile(data: Any, rows: Rows, row: int, names: list[str] | None, alike: float = 1.0) -> Tile:
    return thumbnail(data, int(rows.index[row]), 112), None if names is None else names[row], alike


def flattened(features: Tensor) -> NDArray[np.float64]:
    """Places (N, 2) in 0..1 where neighbours among the features (N, D), by direction, lie near each other."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    rows = unit(features.double()).cpu().numpy()
    if min(rows.shape) > 50:
        rows = PCA(50, random_state=0).fit_transform(rows)
    perplexity = min(30.0, (len(rows) - 1) / 3)
    places = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(rows).astype(np.float64)
    low, high = places.min(axis=0), places.max(axis=0)
    flat: NDArray[np.float64] = (places - low) / np.maximum(high - low, 1e-12)
    return flat


def apart(places: NDArray[np.float64], distance: float) -> list[int]:
    """The places (N, 2), first come first served, that lie apart by `distance` in x or in y."""
    chosen: list[int] = []
    for row, place in enumerate(places):
        if not chosen or (np.abs(places[chosen] - place).max(axis=1) >= distance).all():
            chosen.append(row)
    return chosen


def spread(rows: Rows, count: int) -> list[int]:
    """At most `count` rows, one of each class before a second of any, or evenly over images without labels."""
    pool = list(range(len(rows.index)))
    if rows.labels is not None:
        labels = rows.labels.tolist()
        rounds = [labels[:row].count(label) for row, label in enumerate(labels)]
        pool = sorted(pool, key=lambda row: (rounds[row], labels[row]))[: max(count, rounds.count(0))]
    steps = np.linspace(0, len(pool) - 1, min(count, len(pool))).round()
    return [pool[int(step)] for step in steps]


def thumbnail(data: Any, index: int, side: int) -> Pixels:
    """The middle square of an image of a dataset as its file has it, at another size."""
    image = torch.from_numpy(np.array(data.given(index)["image"])).permute(2, 0, 1)  # (3, H, W)
    short = min(image.shape[-2:])
    top, left = ((length - short) // 2 for length in image.shape[-2:])
    square = image[None, :, top : top + short, left : left + short].float()
    small = F.interpolate(square, size=(side, side), mode="bilinear", antialias=True)[0]
    return small.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def palette(classes: int) -> list[tuple[float, ...]]:
    """A colour for each class, as unlike as so many can be."""
    name, number = ("tab10", 10) if classes <= 10 else ("tab20", 20)
    if classes <= number:
        return [matplotlib.colormaps[name](k)[:3] for k in range(classes)]
    return [matplotlib.colormaps["gist_rainbow"](k / classes)[:3] for k in range(classes)]


def draw_map(
    places: NDArray[np.float64],
    pictures: dict[int, Pixels],
    labels: list[int] | None,
    classes: tuple[str, ...],
    path: Path,
) -> None:
    """Draws images at their places (N, 2) in 0..1, those without a picture as dots, in the colours of their classes."""
    colours = [GREY] * len(places) if labels is None else [palette(len(classes))[k] for k in labels]
    figure = Figure(figsize=(INCHES, INCHES + 0.6), layout="constrained")
    axes = figure.subplots()
    dots = [row for row in range(len(places)) if row not in pictures]
    axes.scatter(places[dots, 0], places[dots, 1], c=[colours[row] for row in dots], s=14, alpha=0.55, linewidths=0)
    for row, picture in pictures.items():
        frame = {"edgecolor": colours[row], "linewidth": 2.4, "boxstyle": "square,pad=0"}
        image = OffsetImage(picture, zoom=72 / DPI)
        axes.add_artist(AnnotationBbox(image, tuple(places[row]), pad=0, bboxprops=frame))
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[], yticks=[], aspect="equal", frame_on=False)
    axes.set_title(f"{len(places):,} validation images: near each other where their features are alike (t-SNE)")
    if labels is not None and len(classes) <= EXPLAINED:
        patches = [Patch(color=colour, label=name) for colour, name in zip(palette(len(classes)), classes, strict=True)]
        fitting = max(1, int(INCHES / (0.65 + 0.1 * max(map(len, classes)))))
        figure.legend(handles=patches, loc="outside lower center", ncols=min(fitting, len(patches)), frameon=False)
    figure.savefig(path, dpi=DPI)


def draw_neighbours(tiles: list[list[Tile]], path: Path) -> None:
    """Draws a row for each query, its image first and then the bank's, those of another class in red frames."""
    columns = len(tiles[0])
    widths = [1.0, 0.12, *[1.0] * (columns - 1)]
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(1.15 * columns + 0.3, 1.38 * len(tiles) + 0.6), layout=tight)
    grid = figure.subplots(len(tiles), len(widths), width_ratios=widths, squeeze=False)
    for row, ((query, *found), (first, gap, *rest)) in enumerate(zip(tiles, grid, strict=True)):
        gap.axis("off")
        _draw_tile(first, query, wrong=False, text=query[1] or "")
        for axes, tile in zip(rest, found, strict=True):
            text = f"{tile[2]:.2f}" if tile[1] is None else f"{tile[1]} {tile[2]:.2f}"
            _draw_tile(axes, tile, wrong=tile[1] != query[1], text=text)
        if row == 0:
            first.set_title("image", fontsize=9, fontweight="bold")
            rest[0].set_title("nearest training images, cosine", fontsize=9, loc="left", fontweight="bold")
    wrong = sum(tile[1] != query[1] for query, *found in tiles for tile in found)
    if tiles[0][0][1] is not None:
        figure.suptitle(f"{wrong} of {len(tiles) * (columns - 1)} neighbours are of another class (red)", fontsize=10)
    figure.savefig(path, dpi=DPI)


def _draw_tile(axes: Axes, tile: Tile, *, wrong: bool, text: str) -> None:
    axes.imshow(tile[0])
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(text, fontsize=7.5, color="crimson" if wrong else "black", labelpad=2)
    for spine in axes.spines.values():
        spine.set(edgecolor="crimson" if wrong else "0.8", linewidth=3 if wrong else 0.8)
