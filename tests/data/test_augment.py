from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import albumentations as A
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray
from torch.nn import functional as F

from visiontasks.contracts import Sample, UsageError
from visiontasks.data import augment
from visiontasks.data.randomness import draw

CONF = Path(__file__).resolve().parents[2] / "conf"
FILES = {path.stem: path.read_text() for path in sorted((CONF / "augment").glob("[!_]*.yaml"))}
NAMES = [name for name, text in FILES.items() if "pretraining" not in text.splitlines()[0]]  # else: test_views.py
RNG = np.random.default_rng(0)
IMAGES = {
    "odd": RNG.integers(0, 256, (37, 51, 3), dtype=np.uint8),
    "one pixel": RNG.integers(0, 256, (1, 1, 3), dtype=np.uint8),
    "thin": RNG.integers(0, 256, (3, 200, 3), dtype=np.uint8),
    "grey": np.full((40, 40, 3), 128, dtype=np.uint8),
    "black": np.zeros((32, 32, 3), dtype=np.uint8),
    "large": RNG.integers(0, 256, (600, 900, 3), dtype=np.uint8),
}
Factory = Callable[..., A.Compose]


def _conf(name: str) -> dict[str, Factory]:
    with initialize_config_dir(str(CONF), version_base=None):
        group = compose(overrides=[f"+augment={name}"]).augment
    return {part: instantiate(group[part], _convert_="all") for part in ("train", "eval")}


def _draw(transform: A.Compose, sample: Sample, index: int) -> Sample:
    return draw(transform, sample, seed=0, epoch=1, index=index)


def test_conf_says_when_to_use_it() -> None:
    for name, text in FILES.items():
        assert text.startswith("# For "), name


@pytest.mark.parametrize("name", NAMES)
def test_every_conf_gives_images_of_the_size_whatever_comes_in(name: str) -> None:
    for part, factory in _conf(name).items():
        for size, shape in ((32, (32, 32, 3)), ((24, 40), (24, 40, 3))):
            transform = factory(size=size, mirror=True)
            for kind, image in IMAGES.items():
                out = [_draw(transform, {"image": image}, index)["image"] for index in range(4)]
                wanted = image.shape if part == "eval" and getattr(factory, "func", None) is augment.native else shape
                assert {(each.shape, each.dtype) for each in out} == {(wanted, np.dtype(np.uint8))}, (part, kind)


@pytest.mark.parametrize("name", NAMES)
def test_training_varies_and_evaluation_does_not(name: str) -> None:
    for part, factory in _conf(name).items():
        transform = factory(size=32, mirror=True)
        out = [_draw(transform, {"image": IMAGES["odd"]}, index)["image"] for index in range(8)]
        again = _draw(factory(size=32, mirror=True), {"image": IMAGES["odd"]}, 5)["image"]
        np.testing.assert_array_equal(out[5], again)
        distinct = len(np.unique(np.reshape(out, (8, -1)), axis=0))
        least = {"none": 1, "generation": 2}.get(name, 6)  # generation mirrors, and no more
        assert distinct == 1 if part == "eval" or least == 1 else distinct >= least


def _ramp(width: int = 50) -> Sample:
    """An image and a mask that grow brighter from left to right, so that a mirrored one grows darker."""
    mask = np.tile(np.arange(1, 1 + width, dtype=np.uint8) * 4, (40, 1))  # (40, width) below 255
    return {"image": np.repeat(mask[..., None], 3, axis=2), "mask": mask}


def _slope(grey: NDArray[np.uint8]) -> float:
    seen = grey != augment.IGNORE
    columns = np.broadcast_to(np.arange(grey.shape[1]), grey.shape)
    return float(np.corrcoef(columns[seen], grey[seen])[0, 1])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_mirrored_where_mirroring_changes_the_meaning(name: str) -> None:
    for factory in _conf(name).values():
        transform = factory(size=32, mirror=False)
        slopes = [_slope(_draw(transform, _ramp(), index)["mask"]) for index in range(60)]
        assert min(slopes) > 0.8


@pytest.mark.parametrize("make", [augment.crop_and_colour, augment.pad_and_crop, augment.rand_augment])
def test_half_is_mirrored_where_it_may_be_and_the_mask_with_it(make: Factory) -> None:
    drawn = [_draw(make(size=32, mirror=True), _ramp(), index) for index in range(100)]
    mirrored = [_slope(sample["mask"]) < 0 for sample in drawn]
    assert 35 <= sum(mirrored) <= 65
    if make is not augment.rand_augment:  # whose solarised images turn their ramp over
        assert [_slope(sample["image"][..., 0]) < 0 for sample in drawn] == mirrored


TURNING: dict[str, Factory] = {
    "crop_and_colour": partial(augment.crop_and_colour, rotation=30, shear=10),
    "pad_and_crop": augment.pad_and_crop,
    "light_geometry": partial(augment.light_geometry, scale=(0.5, 0.6)),
    "scale_and_crop": partial(augment.scale_and_crop, rotation=20),
    "rand_augment": partial(augment.rand_augment, strength=1.0),
}


@pytest.mark.parametrize("name", TURNING)
def test_masks_hold_their_own_values_or_ignore(name: str) -> None:
    values = np.array([0, 7, 19], dtype=np.uint8)
    sample: Sample = {"image": IMAGES["odd"], "mask": RNG.choice(values, (37, 51))}
    transform = TURNING[name](size=32, mirror=True)
    masks = np.array([_draw(transform, sample, index)["mask"] for index in range(40)])
    assert set(np.unique(masks)) == {0, 7, 19, augment.IGNORE}
    assert masks.dtype == np.uint8


def _objects() -> Sample:
    """Nine coloured squares, each with its mask, its box and its number as label."""
    corners = [(x, y) for y in (4, 40, 76) for x in (4, 40, 76)]
    masks = np.zeros((9, 100, 100), dtype=np.uint8)
    for mask, (x, y) in zip(masks, corners, strict=True):
        mask[y : y + 20, x : x + 16] = 1
    image = np.repeat((masks.sum(0, dtype=np.uint8) * 200)[..., None], 3, axis=2)
    bboxes = np.array([(x, y, x + 16, y + 20) for x, y in corners], dtype=np.float32)
    return {"image": image, "masks": masks, "bboxes": bboxes, "labels": np.arange(9)}


def _extent(mask: NDArray[np.uint8]) -> list[int]:
    rows, columns = np.nonzero(mask)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


STRAIGHT: dict[str, Factory] = {
    "crop_and_colour": augment.crop_and_colour,
    "pad_and_crop": partial(augment.pad_and_crop, pad=20),
    "light_geometry": partial(augment.light_geometry, rotation=0, shear=0, shift=0.3),
    "resize_and_crop": partial(augment.resize_and_crop, fraction=0.5),
    "scale_and_crop": augment.scale_and_crop,
}


@pytest.mark.parametrize("name", STRAIGHT)
def test_boxes_and_masks_follow_the_image_and_leave_together(name: str) -> None:
    transform = STRAIGHT[name](size=64, mirror=True, boxes=True)
    counts = set()
    for index in range(30):
        sample = _draw(transform, _objects(), index)
        counts.add(len(sample["bboxes"]))
        assert len(sample["bboxes"]) == len(sample["masks"]) == len(sample["labels"])
        seen = [(box, mask) for box, mask in zip(sample["bboxes"], sample["masks"], strict=True) if mask.any()]
        assert len(seen) >= len(sample["masks"]) - 3  # a sliver of a box may round to no pixel
        for box, mask in seen:
            np.testing.assert_allclose(_extent(mask), box, atol=1.5)
    assert min(counts) < 9


def test_labels_stay_with_their_boxes() -> None:
    sample = _draw(augment.resize_and_crop(size=100, boxes=True, fraction=0.5), _objects(), 0)
    assert sample["labels"].tolist() == [4]  # the one square in the middle half
    assert (sample["labels"].dtype, sample["bboxes"].dtype) == (np.dtype(np.int64), np.dtype(np.float32))
    np.testing.assert_allclose(sample["bboxes"], [[30, 30, 62, 70]], atol=1e-3)


def test_an_image_without_objects_passes() -> None:
    empty: Sample = {
        "image": IMAGES["odd"],
        "masks": np.zeros((0, 37, 51), dtype=np.uint8),
        "bboxes": np.zeros((0, 4), dtype=np.float32),
        "labels": np.zeros(0, dtype=np.int64),
    }
    sample = _draw(augment.crop_and_colour(size=32, mirror=True, boxes=True), empty, 0)
    assert sample["bboxes"].shape == (0, 4)
    assert sample["masks"].shape[0] == 0
    assert (sample["labels"].shape, sample["labels"].dtype) == ((0,), np.dtype(np.int64))


def test_an_image_that_has_the_size_is_evaluated_untouched() -> None:
    image = IMAGES["odd"]
    np.testing.assert_array_equal(_draw(augment.resize_and_crop(size=(37, 51)), {"image": image}, 0)["image"], image)


def _photograph() -> NDArray[np.uint8]:
    noise = torch.from_numpy(RNG.random((1, 3, 9, 12)))
    smooth = F.interpolate(noise, (300, 400), mode="bicubic").clamp(0, 1)
    return (smooth[0].permute(1, 2, 0) * 255).numpy().astype(np.uint8)


@pytest.mark.parametrize(("fraction", "window"), [(1.0, 300), (0.8, 240)])
def test_evaluation_sees_the_centre_as_a_reference_resize_does(fraction: float, window: int) -> None:
    image = _photograph()
    top, left = (300 - window) // 2, (400 - window) // 2
    centre = torch.from_numpy(image[top : top + window, left : left + window]).permute(2, 0, 1)[None].double()
    expected = F.interpolate(centre, (64, 64), mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    out = _draw(augment.resize_and_crop(size=64, fraction=fraction), {"image": image}, 0)["image"]
    assert np.abs(out - expected).mean() < 1.0


def test_fine_stripes_do_not_alias_when_an_image_shrinks_a_lot() -> None:
    stripes = np.tile(np.array([0, 0, 255], dtype=np.uint8), (320, 107))[:, :320, None].repeat(3, axis=2)
    for make in (augment.resize_and_crop, partial(augment.crop_and_colour, brightness=0, contrast=0)):
        out = _draw(make(size=32, mirror=False), {"image": stripes}, 0)["image"]
        assert out.std() < 25  # linear interpolation that skips pixels gives 80 to 120


def _window(sample: Sample) -> tuple[float, float]:
    """Width and height, in shares, of the window that was cut from a picture of coordinates."""
    x, y, _ = np.moveaxis(sample["image"].astype(float), 2, 0)
    return float(np.ptp(x)) / 199, float(np.ptp(y)) / 199


def test_windows_keep_to_their_share_of_the_area_and_go_everywhere() -> None:
    y, x = np.mgrid[:200, :200].astype(np.uint8)
    coordinates: Sample = {"image": np.stack([x, y, x], axis=2)}
    still: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    transform = augment.crop_and_colour(size=64, mirror=False, scale=(0.25, 0.5), **still)
    drawn = [_draw(transform, coordinates, index) for index in range(150)]
    areas = np.array([np.prod(_window(sample)) for sample in drawn])
    assert 0.22 < areas.min() < 0.29
    assert 0.46 < areas.max() < 0.52
    lefts = np.array([sample["image"][..., 0].min() for sample in drawn])
    assert lefts.min() < 5
    assert lefts.max() > 70


@pytest.mark.parametrize("strength", [0.0, 1.0])
def test_rand_augment_runs_from_nothing_to_everything(strength: float) -> None:
    transform = augment.rand_augment(size=37, mirror=False, strength=strength, operations=3)
    for index in range(40):
        assert _draw(transform, {"image": IMAGES["odd"]}, index)["image"].shape == (37, 37, 3)


def _change(strength: float) -> float:
    transform = augment.rand_augment(size=64, mirror=False, strength=strength, scale=(1.0, 1.0))
    plain = augment.resize_and_crop(size=64)
    image = _photograph()[:300, :300].copy()
    still = _draw(plain, {"image": image}, 0)["image"].astype(float)
    return float(np.mean([np.abs(_draw(transform, {"image": image}, i)["image"] - still).mean() for i in range(60)]))


def test_more_strength_changes_more() -> None:
    assert _change(0.1) < _change(0.5) < _change(1.0)


def test_a_strength_out_of_range_is_named() -> None:
    with pytest.raises(UsageError, match=r"strength=9.*0 and 1"):
        augment.rand_augment(size=32, mirror=True, strength=9)


def test_a_mistyped_colour_is_named() -> None:
    with pytest.raises(UsageError, match="colour=matrx"):
        augment.crop_and_colour(size=32, mirror=True, colour="matrx")  # type: ignore[arg-type]


def test_a_mistyped_option_is_refused() -> None:
    options: dict[str, Any] = {"brigthness": 0.3}
    with pytest.raises(TypeError, match="brigthness"):
        augment.crop_and_colour(size=32, mirror=True, **options)
