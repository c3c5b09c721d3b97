"""python predict.py run=PATH input=...: what a trained task says of images, as lines of JSON and pictures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontasks.cli.command_line import run
from visiontasks.cli.stored import offer_checkpoint

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from torch import Tensor
    from torch.utils.data import DataLoader

    from visiontasks.tasks.base import Prediction, Task

USAGE = """
python predict.py run=PATH input=FILE_OR_FOLDER_OR_GLOB [output=FOLDER] [key=value ...]

  python predict.py run=runs/classification/2026-11-21_10-00-00 input=photos
  python predict.py run=runs/... input='photos/*.jpg' output=predictions pictures=false
"""
SHOWN = ("image", "scale", "size")  # what a task may see of a batch
SHEET = 40  # pictures on the contact sheet


def main() -> None:
    run(predict, config="predict", usage=USAGE, arguments=sys.argv[1:], before=offer_checkpoint)


def predict(composed: "DictConfig") -> None:
    """Writes predictions.jsonl, a picture of each image and a contact sheet; a file that cannot be read is named."""
    from lightning import Fabric
    from tqdm import tqdm

    from visiontasks.callbacks.pictures import Tile, draw_one, draw_sheet
    from visiontasks.cli.build import (
        build_data,
        load_task,
        plain,
        read_checkpoint,
        resolved_accelerator,
        resolved_precision,
    )
    from visiontasks.cli.evaluate import output_folder
    from visiontasks.cli.train import quieten
    from visiontasks.data.image_folder import ImageFiles, find_images
    from visiontasks.data.images import printable

    config, folder = plain(composed), output_folder()
    quieten()
    checkpoint = Path(config["checkpoint"]["path"])
    task = load_task(checkpoint, config["task"])
    data = build_data(read_checkpoint(checkpoint)["config"])
    data.batch_size, data.num_workers = config["batch_size"], config["num_workers"]
    files = ImageFiles(find_images(config["input"]))
    accelerator, precision = resolved_accelerator(config["accelerator"]), resolved_precision(config["precision"])
    fabric = Fabric(accelerator=accelerator, devices=1, precision=precision)
    task.to(fabric.device)
    folder.mkdir(parents=True, exist_ok=True)
    tiles: list[Tile] = []
    answers: list[Prediction] = []
    done = 0
    with (folder / "predictions.jsonl").open("w") as lines, fabric.autocast():
        for index, image, prediction in tqdm(predicted(task, data.loader(files)), total=len(files), unit="image"):
            name = files.name(index)
            stem = f"{index:05d}_{Path(name).stem}"  # the position tells apart files of one name
            line = prediction if image is None else task.save(prediction, folder, stem)
            answers.append({"file": name, **line})
            lines.write(json.dumps(answers[-1]) + "\n")
            if image is None:
                continue
            done += 1
            tile = Tile(0.0, printable(name), image, prediction, None)
            tiles += [tile] if len(tiles) * task.panels < SHEET else []
            if config["pictures"]:
                (folder / "pictures").mkdir(exist_ok=True)
                draw_one(task, tile, folder / "pictures" / f"{stem}.png")
    task.finish(answers, folder)
    if tiles:
        draw_sheet(task, tiles, folder / "predictions.png", named=True)
    print(f"{len(files)} files, {done} predicted: {folder}")


def predicted(task: "Task", loader: "DataLoader[Any]") -> Iterator[tuple[int, "Tensor | None", "Prediction"]]:
    """Each file's position, its image, uint8 (3, H, W), and prediction; without an image, the error instead."""
    import torch
    from lightning.fabric.utilities import move_data_to_device

    seen = 0
    for batch in loader:
        rows: dict[int, tuple[Tensor | None, Prediction]] = {}
        if "image" in batch:
            with torch.inference_mode():
                raw = task.predict_step(
                    move_data_to_device({key: batch[key] for key in SHOWN if key in batch}, task.device), 0
                )
            images = zip(batch["image"], task.predictions(raw), strict=True)
            rows = dict(zip(batch["index"].tolist(), images, strict=True))
        bad = iter(batch.get("bad", []))
        for index in range(seen, seen + len(rows) + len(batch.get("bad", []))):
            image, prediction = rows[index] if index in rows else (None, {"error": next(bad)[-1]})
            yield index, image, prediction
            seen = index + 1


if __name__ == "__main__":
    main()
