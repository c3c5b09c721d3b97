"""Draw docs/augmentation.png: the original of each row at the left, then what training sees of it in eight epochs.

python docs/draw_augmentations.py
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image

from visiontasks.data import augment
from visiontasks.data.randomness import draw

Picture = NDArray[np.uint8]
SIZE, GAP, EPOCHS = 72, 3, 8

ROWS: tuple[tuple[str, str, Callable[..., A.Compose]], ...] = (
    ("crop_and_colour", "photograph", augment.crop_and_colour),
    ("scale=(0.08, 1.0)", "photograph", partial(augment.crop_and_colour, scale=(0.08, 1.0))),
    ("rotation=20, shear=10", "photograph", partial(augment.crop_and_colour, rotation=20, shear=10)),
    ("rand_augment", "photograph", augment.rand_augment),
    ("rand_augment strength=1", "photograph", partial(augment.rand_augment, strength=1.0)),
    ("pad_and_crop", "small photograph", augment.pad_and_crop),
    ("light_geometry", "digit", augment.light_geometry),
    ("scale_and_crop", "photograph", partial(augment.scale_and_crop, short_side=SIZE)),
)


def originals() -> dict[str, Picture]:
    photograph = np.ascontiguousarray(load_sample_image("flower.jpg")[20:420, 120:520])  # (400, 400, 3)
    digit = (load_digits().images[2] * 15.9).astype(np.uint8)  # (8, 8)
    large = cv2.resize(np.pad(digit, 1), (SIZE, SIZE), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(photograph, (32, 32), interpolation=cv2.INTER_AREA)
    return {"photograph": photograph, "small photograph": small, "digit": np.repeat(large[..., None], 3, axis=2)}


def row(image: Picture, factory: Callable[..., A.Compose], *, mirror: bool) -> Picture:
    size = min(SIZE, len(image))
    evaluation = augment.resize_and_crop(size=size)(image=image)["image"]
    transform = factory(size=size, mirror=mirror)
    drawn = [draw(transform, {"image": image}, seed=0, epoch=epoch, index=0)["image"] for epoch in range(EPOCHS)]
    shown = [cv2.resize(each, (SIZE, SIZE), interpolation=cv2.INTER_NEAREST) for each in (evaluation, *drawn)]
    return np.concatenate([cv2.copyMakeBorder(each, GAP, 0, GAP, 0, 0, value=(255,) * 3) for each in shown], axis=1)


def main() -> None:
    images = originals()
    rows = [row(images[kind], factory, mirror=kind != "digit") for _, kind, factory in ROWS]
    sheet = Image.fromarray(np.concatenate(rows)).quantize(200, dither=Image.Dither.NONE)
    path = Path(__file__).with_name("augmentation.png")
    sheet.save(path, optimize=True)
    print(f"{path}: {sheet.size}, {path.stat().st_size} bytes; rows: {', '.join(name for name, _, _ in ROWS)}")


if __name__ == "__main__":
    main()
