"""Images per CPU second of the default pipelines, against torchvision.transforms.v2 and plain albumentations.

    python benchmarks/loading.py [FOLDER_OF_JPEGS] [--images 48] [--rounds 9]

Classification, against torchvision: decode the file, cut a random window and resize it to 224, mirror, jitter the
colours (or not), collate. Segmentation, against albumentations: decode the file, scale image and mask by 0.5 to 2, pad
and crop to 512, mirror, jitter the colours; both sides decode alike and get the same masks from memory, and neither
collates.

One process, one thread, process time; all pipelines take turns, and what is printed are medians over the rounds, ratios
being taken within a round. The larger the files, the more of both sides is decoding: of ours four fifths at 640 x 480,
so that no transform, however fast, lifts the ratio there by more than a quarter. Decoding at half scale is no way out:
it takes 85 % of the time, and a window that stays larger than the crop is drawn for 18 % of those files. Without a
folder the files are crops of scikit-learn's two photographs, 500 x 375, JPEG quality 90, written to a temporary one.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.utils.data import default_collate
from torchvision.transforms import v2

from visiontasks.contracts import IGNORE, Sample
from visiontasks.data.augment import crop_and_colour, scale_and_crop
from visiontasks.data.colour import ColourMatrix
from visiontasks.data.image_folder import ImageFiles
from visiontasks.data.images import read_image
from visiontasks.data.module import Views, collate
from visiontasks.data.source import Cached, Source

SIZE = 224
CROP = 512  # of segmentation
SCALE = (0.5, 1.0)
JITTER: dict[str, Any] = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}
STILL: dict[str, Any] = dict.fromkeys(JITTER, 0.0)
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

Pipeline = Callable[[int], object]  # an epoch's number to its images, collated


class Patched(ImageFiles):
    """Image files, each with a mask of squares of 32 pixels that is kept in memory."""

    def __init__(self, paths: list[Path]) -> None:
        super().__init__(paths)
        self.masks = [patches(*read_image(path).shape[:2]) for path in paths]

    def __getitem__(self, index: int) -> Sample:
        sample = super().__getitem__(index)
        sample["mask"] = self.masks[index]
        return sample


def patches(height: int, width: int) -> NDArray[np.uint8]:
    return (np.add.outer(np.arange(height) // 32, np.arange(width) // 32) % 21).astype(np.uint8)


def ours(source: Source, epoch: int, *, transform: Any) -> torch.Tensor:
    views = Views(source, transform, split="train", keys=frozenset())
    images = collate([views[epoch, index] for index in range(len(views))])["image"]
    assert isinstance(images, torch.Tensor)  # (B, 3, H, W) uint8
    return images


def with_masks(source: Source, epoch: int, *, transform: Any) -> None:
    views = Views(source, transform, split="train", keys=frozenset({"mask"}))
    for index in range(len(views)):
        views[epoch, index]


def torchvisions(paths: list[Path], epoch: int, *, transform: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    torch.manual_seed(epoch)
    images: torch.Tensor = default_collate([transform(Image.open(path).convert("RGB")) for path in paths])
    return images


def peer(*, jitter: bool, tensors: bool = False, normalised: bool = False) -> v2.Compose:
    return v2.Compose(
        [
            *([v2.PILToTensor()] if tensors else []),
            v2.RandomResizedCrop(SIZE, scale=SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            *([v2.ColorJitter(**JITTER)] if jitter else []),
            *([] if tensors else [v2.PILToTensor()]),
            *([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)] if normalised else []),
        ]
    )


def pipelines(paths: list[Path]) -> dict[str, Pipeline]:
    files = ImageFiles(paths)
    whole, cached = Cached(files, "ram"), Cached(files, "ram", size=SIZE * 8 // 7)  # as the data module does
    table: dict[str, Pipeline] = {}
    for jitter in (True, False):
        words = "jitter" if jitter else "no jitter"
        mine = crop_and_colour(size=SIZE, mirror=True, scale=SCALE, **(JITTER if jitter else STILL))
        table[f"ours, {words}"] = partial(ours, files, transform=mine)
        table[f"ours, {words}, cache=ram at full size"] = partial(ours, whole, transform=mine)
        table[f"ours, {words}, cache=ram"] = partial(ours, cached, transform=mine)
        for name, options in (("PIL", {}), ("tensors", {"tensors": True}), ("PIL, normalised", {"normalised": True})):
            transform = peer(jitter=jitter, **options)
            table[f"torchvision v2, {words}, {name}"] = partial(torchvisions, paths, transform=transform)
    sequential = crop_and_colour(size=SIZE, mirror=True, scale=SCALE, colour="sequential", **JITTER)
    table["ours, jitter in sequence"] = partial(ours, files, transform=sequential)
    return table


def segmentation_pipelines(paths: list[Path]) -> dict[str, Pipeline]:
    steps = [
        A.RandomScale(scale_limit=(-0.5, 1.0), p=1.0),
        A.PadIfNeeded(CROP, CROP, border_mode=cv2.BORDER_CONSTANT, fill=(124, 116, 104), fill_mask=IGNORE),
        A.RandomCrop(CROP, CROP),
        A.HorizontalFlip(p=0.5),
    ]
    transforms = {
        "ours": scale_and_crop(size=CROP, mirror=True, **JITTER),
        "albumentations": A.Compose([*steps, A.ColorJitter(**JITTER, p=1.0)]),
        "albumentations, our colour matrix": A.Compose([*steps, ColourMatrix(**JITTER)]),
    }
    source = Patched(paths)
    return {name: partial(with_masks, source, transform=transform) for name, transform in transforms.items()}


def rates(table: dict[str, Pipeline], *, count: int, rounds: int) -> dict[str, list[float]]:
    """Images per CPU second of each pipeline in each round; a first round, not counted, warms up."""
    measured: dict[str, list[float]] = {name: [] for name in table}
    for epoch in range(rounds + 1):
        for name, pipeline in table.items():
            started = time.process_time()
            pipeline(epoch)
            measured[name].append(count / (time.process_time() - started))
    return {name: values[1:] for name, values in measured.items()}


def ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def collating(rounds: int) -> float:
    """How many times as long a batch of 64 takes to collate as normalised floats as it does in uint8."""
    images = [Sample(image=np.full((SIZE, SIZE, 3), number, np.uint8)) for number in range(64)]
    floats = [torch.full((3, SIZE, SIZE), number / 64) for number in range(64)]
    table: dict[str, Pipeline] = {"uint8": lambda _: collate([*images]), "float": lambda _: default_collate(floats)}
    measured = rates(table, count=64, rounds=rounds)
    return ratio(measured["uint8"], measured["float"])


def written(folder: Path, count: int) -> Iterator[Path]:
    """Crops of scikit-learn's photographs as JPEG files."""
    generator = np.random.default_rng(0)
    photographs = load_sample_images().images
    for number in range(count):
        photograph = photographs[number % len(photographs)]
        top, left = (generator.integers(0, side + 1) for side in np.subtract(photograph.shape[:2], (375, 500)))
        path = folder / f"{number:03d}.jpg"
        Image.fromarray(photograph[top : top + 375, left : left + 500]).save(path, quality=90)
        yield path


def report(paths: list[Path], rounds: int) -> None:
    measured = rates(pipelines(paths), count=len(paths), rounds=rounds)
    print(f"{'pipeline':55} images per CPU second")
    for name, values in measured.items():
        print(f"{name:55} {statistics.median(values):8.0f}")
    print()
    for words, target in (("jitter", 2.5), ("no jitter", 1.3)):
        mine = measured[f"ours, {words}"]
        for name in ("PIL", "tensors", "PIL, normalised"):
            other = f"torchvision v2, {words}, {name}"
            print(f"ours / {other:48} {ratio(mine, measured[other]):6.2f}  (wanted: {target})")
        print(f"cache=ram / ours, {words:37} {ratio(measured[f'ours, {words}, cache=ram'], mine):6.2f}  (wanted: 5)")
    report_segmentation(paths, rounds)
    print(f"collating float / uint8, time {collating(rounds):31.1f}")


def report_segmentation(paths: list[Path], rounds: int) -> None:
    measured = rates(segmentation_pipelines(paths), count=len(paths), rounds=rounds)
    print(f"\n{'segmentation, crops of ' + str(CROP):55} images per CPU second")
    for name, values in measured.items():
        print(f"{name:55} {statistics.median(values):8.0f}")
    print()
    for name in ("albumentations", "albumentations, our colour matrix"):
        wanted = "  (wanted: 1.8)" if name == "albumentations" else ""
        print(f"ours / {name:48} {ratio(measured['ours'], measured[name]):6.2f}{wanted}")


def run(description: str | None, measure: Callable[[list[Path], int], None], *, rounds: int) -> None:
    """Read the command line, and measure with the files that it names, in one thread."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="JPEG files, searched with its subfolders")
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=rounds)
    options = parser.parse_args()
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        found = sorted(options.folder.rglob("*.jpg")) if options.folder else written(Path(temporary), options.images)
        measure(list(found)[: options.images], options.rounds)


if __name__ == "__main__":
    run(__doc__, report, rounds=9)
