"""python convert.py data=... output=FOLDER: any data set into chunks that data=streaming reads."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from visiontasks.cli.command_line import run

if TYPE_CHECKING:
    from omegaconf import DictConfig

USAGE = """
python convert.py data=CHOICE [data.root=...] output=FOLDER [key=value ...]

  python convert.py data=image_folder data.root=photos output=photos_chunks
  python convert.py data=coco_json data.root=coco output=coco_chunks keep=[bboxes,labels] chunk_mb=128
  python train.py data=streaming data.root=photos_chunks
"""


def main() -> None:
    run(convert, config="convert", usage=USAGE, arguments=sys.argv[1:])


def convert(composed: "DictConfig") -> None:
    """Writes the chunks of every split, and says what became of the images."""
    from visiontasks.cli.build import build_data, plain
    from visiontasks.data.conversion import convert as write

    config = plain(composed)
    folder = Path(composed.output)  # which says so where it is missing
    data = build_data(config)
    if config["keep"] is not None:
        data.select(frozenset(config["keep"]))
    data.setup()
    done = write(data, folder, chunk_mb=config["chunk_mb"], progress=config["progress"])
    for split, each in done.items():
        made = each.size - each.copied - len(each.bad)
        became = f"{each.copied:,} files as they are, {made:,} as PNG, {len(each.bad)} bad"
        print(f"{split:<10} {each.size:,} samples: {became}")
        for error in each.bad:
            print(f"bad file   {error}")
    print(f"written to {folder}: type python train.py data=streaming data.root={folder}")


if __name__ == "__main__":
    main()
