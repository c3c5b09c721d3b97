"""Two views an image as SimCLR makes them, beside lightly's: python benchmarks/views.py [FOLDER_OF_JPEGS]

Images (not views) per CPU second: decode the file once, then twice cut a random window and resize it to 224, mirror,
jitter the colours, grey, blur, and collate. Lightly decodes with Pillow and normalises to float, as its transform does;
"uint8" is the same transform without that last step. "no decoding" takes both sides' decoded images from memory.

One process, one thread, process time; all take turns, and what is printed are medians over the rounds, ratios being
taken within a round. Without a folder the files are those of benchmarks/loading.py.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightly.transforms import SimCLRTransform
from loading import Pipeline, rates, ratio, run
from PIL import Image
from torch.utils.data import default_collate
from torchvision.transforms import v2

from visiontasks.data.image_folder import ImageFiles
from visiontasks.data.module import Views, collate
from visiontasks.data.source import Cached, Source
from visiontasks.data.views import multi_crop, two_views

SIZE = 224
WANTED = 4.0
COLOUR = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1}
BYOL: tuple[dict[str, Any], dict[str, Any]] = (COLOUR | {"blur": 1.0}, COLOUR | {"blur": 0.1, "solarise": 0.2})


def ours(source: Source, epoch: int, *, made: Any) -> list[torch.Tensor]:
    samples = Views(source, None, split="train", keys=frozenset(), multi_view=made)
    views: list[torch.Tensor] = collate([samples[epoch, index] for index in range(len(samples))])["views"]
    return views  # (B, 3, 224, 224) uint8 each


def lightlys(paths: list[Path], epoch: int, *, transform: Any) -> Any:
    torch.manual_seed(epoch)
    return default_collate([transform(Image.open(path).convert("RGB")) for path in paths])


def lightlys_decoded(images: list[Image.Image], epoch: int, *, transform: Any) -> Any:
    torch.manual_seed(epoch)
    return default_collate([transform(image) for image in images])


def in_uint8(transform: SimCLRTransform) -> SimCLRTransform:
    """The transform without its conversion to normalised floats."""
    for view in transform.transforms:
        *kept, _, _ = view.transform.transforms  # the last two are ToTensor and Normalize
        view.transform.transforms = [*kept, v2.PILToTensor()]
    return transform


def pipelines(paths: list[Path]) -> dict[str, Pipeline]:
    files = ImageFiles(paths)
    memory = Cached(files, "ram")
    images = [Image.open(path).convert("RGB") for path in paths]
    simclr = two_views(size=SIZE, mirror=True, first={})
    byol = two_views(size=SIZE, mirror=True, first=BYOL[0], second=BYOL[1])
    first, second = ({**options, "scale": (0.4, 1.0)} for options in BYOL)
    local = COLOUR | {"scale": (0.05, 0.4)}
    dino = multi_crop(size=SIZE, mirror=True, first=first, second=second, local=local, local_views=8)
    return {
        "ours": partial(ours, files, made=simclr),
        "lightly": partial(lightlys, paths, transform=SimCLRTransform()),
        "lightly, uint8": partial(lightlys, paths, transform=in_uint8(SimCLRTransform())),
        "ours, no decoding": partial(ours, memory, made=simclr),
        "lightly, no decoding": partial(lightlys_decoded, images, transform=SimCLRTransform()),
        "ours, BYOL": partial(ours, files, made=byol),
        "ours, DINO's ten": partial(ours, files, made=dino),
    }


def report(paths: list[Path], rounds: int) -> None:
    measured = rates(pipelines(paths), count=len(paths), rounds=rounds)
    print(f"{'two views, ' + str(SIZE):30} images per CPU second")
    for name, values in measured.items():
        print(f"{name:30} {statistics.median(values):8.0f}")
    print()
    print(f"{'ours / lightly':45} {ratio(measured['ours'], measured['lightly']):6.2f}  (wanted: {WANTED})")
    for mine, other in (("ours", "lightly, uint8"), ("ours, no decoding", "lightly, no decoding")):
        print(f"{mine + ' / ' + other:45} {ratio(measured[mine], measured[other]):6.2f}")


if __name__ == "__main__":
    run(__doc__, report, rounds=7)
