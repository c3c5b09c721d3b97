"""python generate.py run=PATH: pictures that a trained generator makes, as files and as a grid."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from visiontasks.cli.command_line import run
from visiontasks.cli.stored import offer_checkpoint
from visiontasks.errors import UsageError

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor

    from visiontasks.cli.build import Config
    from visiontasks.tasks.generative import Generative

USAGE = """
python generate.py run=PATH [n=64] [seed=0] [output=FOLDER] [key=value ...]

  python generate.py run=runs/generation/2026-11-21_10-00-00 n=64 seed=0
  python generate.py run=runs/... n=100 classes=[3,7] truncation=0.7    pictures of two classes, of a conditional head
"""


def main() -> None:
    run(generate, config="generate", usage=USAGE, arguments=sys.argv[1:], before=offer_checkpoint)


def generate(composed: "DictConfig") -> None:
    """Writes n pictures and grid.png; the same for the same seed. Each class has a folder and a row of its own."""
    from lightning import Fabric

    from visiontasks.cli.build import load_task, plain, resolved_accelerator
    from visiontasks.cli.evaluate import output_folder
    from visiontasks.cli.train import quieten
    from visiontasks.tasks.generative import Generative

    config, folder = plain(composed), output_folder()
    quieten()
    task = load_task(Path(config["checkpoint"]["path"]), config["task"])
    if not isinstance(task, Generative):
        raise UsageError(f"{config['run']} is a run of {type(task).__name__}: give one of task=generation.")
    names = asked_classes(config["classes"], task)
    task.to(Fabric(accelerator=resolved_accelerator(config["accelerator"]), devices=1).device)
    pictures = made(task, names, config)
    for index, picture in enumerate(pictures):
        place = folder / names[index % len(names)] if names else folder
        place.mkdir(parents=True, exist_ok=True)
        write(picture, place / f"{index:05d}.png")
    write(grid(pictures, rows=len(names)), folder / "grid.png")
    height, width = task.image_size
    print(f"{len(pictures)} pictures of {height} x {width} pixels, seed {config['seed']}: {folder}")


def made(task: "Generative", names: list[str], config: "Config") -> "Tensor":
    """The pictures, uint8 (n, 3, H, W), in turn of the named classes, if any."""
    import torch

    count, size = int(config["n"]), int(config["batch_size"])
    if count < 1 or size < 1:
        raise UsageError(f"n={count} batch_size={size} makes no picture: give 1 or more of both.")
    latents = torch.split(task.latents(count, seed=config["seed"]), size)
    turns = torch.tensor([task.classes.index(name) for name in names], device=task.device).repeat(count)[:count]
    labels = torch.split(turns, size) if names else [None] * len(latents)
    parts = zip(latents, labels, strict=True)
    return torch.cat([task.sample(*part, truncation=config["truncation"]).cpu() for part in parts])


def write(picture: "Tensor", path: Path) -> None:
    """Writes one picture, uint8 (3, H, W), to a file."""
    from PIL import Image

    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(path)


def asked_classes(asked: list[str | int] | None, task: "Generative") -> list[str]:
    """The names of the classes to make pictures of, all of them where none is asked for; [] where it is told none."""
    if not task.conditional:
        if asked:
            raise UsageError("This run's generator is told no class: leave classes=null, or train head=cgan.")
        return []
    names = list(task.classes) if not asked else [str(name) for name in asked]
    unknown = [name for name in names if name not in task.classes]
    if unknown:
        raise UsageError(f"classes={names} has {unknown[0]}, and the run knows {list(task.classes)[:20]}: give those.")
    return names


def grid(pictures: "Tensor", *, rows: int = 0) -> "Tensor":
    """Pictures uint8 (N, 3, H, W) side by side, with white between them.

    Where rows is given, picture k lies in row k % rows; else they fill a square from left to right.
    """
    import math

    import torch
    from torchvision.utils import make_grid

    count = len(pictures)
    columns = math.ceil(count / rows) if rows else math.ceil(math.sqrt(count))
    if rows:
        order = [k for row in range(rows) for k in range(row, rows * columns, rows)]
        blank = pictures.new_full((rows * columns - count, *pictures.shape[1:]), 255)
        pictures = torch.cat((pictures, blank))[order]
    return make_grid(pictures, nrow=columns, padding=2, pad_value=255)  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
