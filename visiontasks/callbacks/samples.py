"""Pictures of what a generator makes: of the same noise in every epoch, between noises, of images, beside images."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Callback, Trainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from visiontasks.callbacks.embeddings import thumbnail
from visiontasks.contracts import UsageError
from visiontasks.layers.distributed import in_order
from visiontasks.layers.embeddings import unit
from visiontasks.tasks.extractors import Extractor
from visiontasks.tasks.fidelity import nearest

Pixels = NDArray[np.uint8]  # (H, W, 3)
BATCH = 64  # pictures that are made at once
GAP = 2  # pixels between the pictures of a sheet
SHOWN = 64  # pixels a side to which small pictures are enlarged, in whole steps
LINE = 16  # pixels of a line of text
FRAMES = 200  # of an animation at most
LAST = 8  # times as long as another frame, the last one is shown


class SampleSheets(Callback):
    """Draws samples/epoch_NNN.png after each validation, from noise that stays the same, and samples.gif of them all.

    The sheet of a conditional generator has a row for each class, spread over all where they are more than `rows`, and
    a column for each noise.
    """

    def __init__(self, *, rows: int = 8, columns: int = 8, seed: int = 0, milliseconds: int = 200) -> None:
        _check_sheet(rows, columns)
        self.rows = rows
        self.columns = columns
        self.seed = seed
        self.milliseconds = milliseconds  # a frame

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero and not trainer.sanity_checking:
            folder = Path(trainer.default_root_dir) / "samples"
            folder.mkdir(exist_ok=True)
            self.sheet(module).save(folder / f"epoch_{trainer.current_epoch:03d}.png")

    def on_train_end(self, trainer: Trainer, module: Any) -> None:  # noqa: ARG002
        folder = Path(trainer.default_root_dir)
        files = sorted((folder / "samples").glob("epoch_*.png"))  # those from before a resume, too
        if trainer.is_global_zero and files:
            animate(files, folder / "samples.gif", milliseconds=self.milliseconds)

    def sheet(self, module: Any) -> Image.Image:
        """What the generator makes of the noise as it is now."""
        if not module.conditional:
            return sheet_of(made(module, module.latents(self.rows * self.columns, seed=self.seed)), self.columns)
        classes = evenly(len(module.classes), self.rows)
        labels = torch.tensor(classes).repeat_interleave(self.columns)
        noise = module.latents(self.columns, seed=self.seed).repeat(len(classes), 1)
        return sheet_of(made(module, noise, labels), self.columns, names=[module.classes[k] for k in classes])


class Interpolations(Callback):
    """Draws interpolations.png when training ends: each row goes from one noise to another, along the sphere.

    White 2016, arXiv 1609.04468. A generator that knows a few pictures by heart jumps, others glide. Each row of a
    conditional generator is of one class.
    """

    def __init__(self, *, rows: int = 8, columns: int = 10, seed: int = 1) -> None:
        _check_sheet(rows, columns)
        self.rows = rows
        self.columns = columns
        self.seed = seed

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            self.sheet(module).save(Path(trainer.default_root_dir) / "interpolations.png")

    def sheet(self, module: Any) -> Image.Image:
        """What the generator makes on the way."""
        starts, ends = module.latents(2 * self.rows, seed=self.seed).chunk(2)  # (rows, D) each
        shares = torch.linspace(0, 1, self.columns).tolist()
        noise = torch.stack([between(starts, ends, share) for share in shares], dim=1)  # (rows, columns, D)
        classes = [row % max(1, len(module.classes)) for row in range(self.rows)]
        labels = torch.tensor(classes).repeat_interleave(self.columns) if module.conditional else None
        names = [module.classes[k] for k in classes] if module.conditional else None
        return sheet_of(made(module, noise.flatten(0, 1), labels), self.columns, names=names)


class Reconstructions(Callback):
    """Draws reconstructions.png when training ends: rows of validation images, and below each what comes back of them.

    A task that has no codes of images, as of a GAN or an autoregressive density, gets no such picture.
    """

    def __init__(self, *, rows: int = 3, columns: int = 8) -> None:
        _check_sheet(rows, columns)
        self.rows = rows
        self.columns = columns

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        data: Any = getattr(trainer, "datamodule")  # noqa: B009
        loader = data.probe_dataloader("val", images=self.rows * self.columns)
        images, _ = in_order([(batch["image"], batch["index"]) for batch in loader], torch.device("cpu"))
        if not trainer.is_global_zero:
            return
        back = module.reconstruct(images.to(module.device))
        if back is not None:
            self.sheet(images, back.cpu()).save(Path(trainer.default_root_dir) / "reconstructions.png")

    def sheet(self, images: Tensor, back: Tensor) -> Image.Image:
        """Whole rows of images, uint8 (B, 3, H, W), and below each what comes back of them, of the same shape."""
        columns = min(self.columns, len(images))
        rows = len(images) // columns
        parts = [torch.chunk(part[: rows * columns], rows) for part in (images, back)]
        pictures = torch.cat([row for pair in zip(*parts, strict=True) for row in pair])
        return sheet_of(pictures, columns, names=["image", "back"] * rows)


class NearestImages(Callback):
    """Draws nearest.png when training ends: samples, and the training images that are nearest to each.

    They are looked for among `data.probe_dataloader()`, in the features in which the task's figures are measured. A
    generator that repeats what it has seen comes nearer to training images than unseen images do: the title says how
    near `compared` samples come, and as many validation images.
    """

    def __init__(self, *, samples: int = 8, nearest: int = 8, compared: int = 256, seed: int = 2) -> None:
        _check_sheet(samples, nearest)
        self.samples = samples
        self.nearest = nearest
        self.compared = compared
        self.seed = seed

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        data: Any = getattr(trainer, "datamodule")  # noqa: B009
        loaders = data.probe_dataloader(), data.probe_dataloader("val", images=self.compared)
        extractor = module.metrics.prepare().to(module.device)
        (bank, index), (unseen, _) = (features_of(loader, extractor) for loader in loaders)
        if not trainer.is_global_zero:
            return
        pictures = self._pictures(module)
        features = torch.cat([extractor(part.to(module.device))[0].cpu() for part in torch.split(pictures, BATCH)])
        away, rows = nearest(features, bank, count=min(self.nearest, len(bank)))
        usual = nearest(unseen, bank)[0].median().item()
        title = (
            f"median distance to the nearest of {len(bank):,} training images: {away[:, 0].median().item():.3g} from "
            f"samples, {usual:.3g} from unseen images ({extractor.name} features)"
        )
        found = [
            [thumbnail(loaders[0].dataset, k, 2 * SHOWN) for k in index[row].tolist()] for row in rows[: self.samples]
        ]
        path = Path(trainer.default_root_dir) / "nearest.png"
        draw_nearest(pictures[: self.samples], found, away.tolist(), title, path)

    def _pictures(self, module: Any) -> Tensor:
        """Samples, of all classes alike where there are classes to ask for."""
        count = max(self.compared, self.samples)
        labels = torch.arange(count) % len(module.classes) if module.conditional else None
        return made(module, module.latents(count, seed=self.seed), labels)


def made(module: Any, latents: Tensor, labels: Tensor | None = None) -> Tensor:
    """What a generator makes of noise (B, D), in small batches, on the CPU: uint8 (B, 3, H, W)."""
    parts = torch.split(latents.to(module.device), BATCH)
    asked = [None] * len(parts) if labels is None else torch.split(labels.to(module.device), BATCH)
    return torch.cat([module.sample(part, label).cpu() for part, label in zip(parts, asked, strict=True)])


def features_of(loader: Any, extractor: Extractor) -> tuple[Tensor, Tensor]:
    """The features (N, D) of the images of all processes' loaders, and their positions (N,), on the CPU."""
    device = next(iter(extractor.state_dict().values())).device
    parts: list[tuple[Tensor, ...]] = [(extractor(batch["image"].to(device))[0], batch["index"]) for batch in loader]
    features, index = in_order(parts, torch.device("cpu"))
    return features, index


def between(starts: Tensor, ends: Tensor, share: float) -> Tensor:
    """Points on the way from vectors to others that turns them evenly, and changes their lengths evenly.

    Shapes: both (B, D); returns the same.
    """
    directions = unit(starts), unit(ends)
    angle = (directions[0] * directions[1]).sum(dim=1, keepdim=True).clamp(-1, 1).arccos().clamp(1e-6, torch.pi - 1e-6)
    parts = [((1 - share) * angle).sin() / angle.sin(), (share * angle).sin() / angle.sin()]
    lengths = [torch.linalg.vector_norm(vectors, dim=1, keepdim=True) for vectors in (starts, ends)]
    turned = parts[0] * directions[0] + parts[1] * directions[1]  # (B, D)
    points: Tensor = unit(turned) * ((1 - share) * lengths[0] + share * lengths[1])
    return points


def evenly(total: int, wanted: int) -> list[int]:
    """At most so many numbers below `total`, spread evenly from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, total - 1, min(total, wanted)).tolist()})


def sheet_of(pictures: Tensor, columns: int, *, names: Sequence[str] | None = None) -> Image.Image:
    """Pictures, uint8 (B, 3, H, W), row by row, small ones enlarged in whole steps, the rows named where asked."""
    times = max(1, SHOWN // pictures.shape[-1])
    large = pictures.repeat_interleave(times, dim=2).repeat_interleave(times, dim=3).permute(0, 2, 3, 1).numpy()
    height, width = large.shape[1] + GAP, large.shape[2] + GAP
    rows = -(-len(large) // columns)
    sheet = np.full((rows * height - GAP, columns * width - GAP, 3), 255, np.uint8)
    for place, picture in enumerate(large):
        top, left = place // columns * height, place % columns * width
        sheet[top : top + height - GAP, left : left + width - GAP] = picture
    return _with_names(Image.fromarray(sheet), height, names) if names else Image.fromarray(sheet)


def _with_names(sheet: Image.Image, height: int, names: Sequence[str]) -> Image.Image:
    """A sheet with a name at the left of each row."""
    font = ImageFont.load_default(LINE - 4)
    margin = int(max(font.getlength(name) for name in names)) + 2 * GAP
    whole = Image.new("RGB", (margin + sheet.width, sheet.height), "white")
    whole.paste(sheet, (margin, 0))
    for row, name in enumerate(names):
        middle = row * height + (height - GAP) // 2
        ImageDraw.Draw(whole).text((margin - GAP, middle), name, fill="black", font=font, anchor="rm")
    return whole


def animate(files: Sequence[Path], path: Path, *, milliseconds: int) -> None:
    """Writes pictures named epoch_NNN as a GIF that names the epochs, at most FRAMES of them, spread evenly."""
    frames = [_titled(files[place]) for place in evenly(len(files), FRAMES)]
    times = [*[milliseconds] * (len(frames) - 1), LAST * milliseconds]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def _titled(file: Path) -> Image.Image:
    with Image.open(file) as sheet:
        whole = Image.new("RGB", (sheet.width, sheet.height + LINE), "white")
        whole.paste(sheet, (0, LINE))
    font = ImageFont.load_default(LINE - 4)
    ImageDraw.Draw(whole).text((GAP, LINE // 2), f"epoch {int(file.stem[6:])}", fill="black", font=font, anchor="lm")
    return whole


def draw_nearest(
    pictures: Tensor, found: list[list[Pixels]], distances: list[list[float]], title: str, path: Path
) -> None:
    """Draws a row for each picture, itself first and then what is nearest to it, with the distances."""
    columns = len(found[0])
    tight = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03, wspace=0.0, hspace=0.0)
    figure = Figure(figsize=(max(8.0, 1.1 * columns + 1.4), 1.25 * len(found) + 0.7), layout=tight)
    grid = figure.subplots(len(found), columns + 2, width_ratios=[1.0, 0.15, *[1.0] * columns], squeeze=False)
    for (first, gap, *rest), picture, images, away in zip(grid, pictures, found, distances, strict=False):
        gap.axis("off")
        first.imshow(picture.permute(1, 2, 0).numpy())
        for axes, image, distance in zip(rest, images, away, strict=True):
            axes.imshow(image)
            axes.set_xlabel(f"{distance:.3g}", fontsize=7.5, labelpad=2)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    grid[0, 0].set_title("sample", fontsize=9, fontweight="bold")
    grid[0, 2].set_title("nearest training images", fontsize=9, loc="left", fontweight="bold")
    figure.suptitle(title, fontsize=8.5)
    figure.savefig(path, dpi=110)


def _check_sheet(rows: int, columns: int) -> None:
    if min(rows, columns) < 1:
        raise UsageError(f"A sheet of {rows} x {columns} pictures shows nothing: give 1 or more of both.")
