"""python predict.py run=PATH input=...: what a trained task says of images, as lines of JSON and pictures."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visiontasks.cli.command_line import run
from visiontasks.cli.stored import offer_checkpoint

if TYPE_CHECKING:
    from omegaconf import DictConfig

USAGE = """
python predict.py run=PATH input=FILE_OR_FOLDER_OR_GLOB [output=FOLDER] [key=value ...]

  python predict.py run=runs/classification/2026-11-21_10-00-00 input=photos
  python predict.py run=runs/... input='photos/*.jpg' output=predictions pictures=false
"""
SHEET = 40  # pictures on the contact sheet


def main() -> None:
    run(predict, config="predict", usage=USAGE, arguments=sys.argv[1:], before=offer_checkpoint)


def predict(composed: "DictConfig") -> None:
    """Writes predictions.jsonl, a picture of each image and a contact sheet; files that cannot be read are named."""
    from visiontasks.callbacks.pictures import draw_sheet
    from visiontasks.cli.build import build_data, build_trainer, load_task, plain, read_checkpoint
    from visiontasks.cli.evaluate import output_folder
    from visiontasks.cli.train import quieten
    from visiontasks.data.files import ImageFiles, find_images

    config, folder = plain(composed), output_folder()
    quieten()
    checkpoint = Path(config["checkpoint"]["path"])
    task = load_task(checkpoint)
    data = build_data(read_checkpoint(checkpoint)["config"])
    files = ImageFiles(find_images(config["input"]))
    loader = data.prediction_loader(files, batch_size=config["batch_size"], num_workers=config["num_workers"])
    trainer = build_trainer(config, folder=folder)
    print(trainer, loader, json, draw_sheet, SHEET, Any, task)


if __name__ == "__main__":
    main()
