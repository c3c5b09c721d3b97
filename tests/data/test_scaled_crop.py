"""Scale and crop against the slow way: resize the whole image, pad it, cut the same window, all in plain numpy."""

import random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from visiontasks.contracts import IGNORE, Sample, UsageError
from visiontasks.data import augment
from visiontasks.data.colour import ColourMatrix
from visiontasks.data.randomness import draw
from visiontasks.data.scaled_crop import ScaledCrop

GREY = (124, 116, 104)
RNG = np.random.default_rng(0)
Pixels = NDArray[np.uint8]


def photograph(height: int, width: int) -> Pixels:
    """Smooth colours: red grows to the right, green downwards, blue in waves."""
    y, x = np.mgrid[:height, :width]
    waves = 127 + 100 * np.sin(x / 9) * np.cos(y / 7)
    return np.stack([255 * x / width, 255 * y / height, waves], axis=2).astype(np.uint8)


def quilt(height: int, width: int) -> Pixels:
    """A mask of patches of 16 pixels with 20 classes."""
    y, x = np.mgrid[:height, :width] // 16
    return ((7 * y + 3 * x) % 20).astype(np.uint8)


def bilinear(image: Pixels, shape: tuple[int, int]) -> NDArray[np.float64]:
    """Resize between pixel centres, one axis after the other."""
    result = image.astype(float)
    for axis, length in enumerate(shape):
        places = np.clip((np.arange(length) + 0.5) * image.shape[axis] / length - 0.5, 0, image.shape[axis] - 1)
        low = np.floor(places).astype(int)
        high = np.minimum(low + 1, image.shape[axis] - 1)
        share = (places - low).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        result = (1 - share) * result.take(low, axis) + share * result.take(high, axis)
    return result


def nearest(mask: Pixels, shape: tuple[int, int]) -> Pixels:
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(shape, mask.shape, strict=True))
    return mask[rows][:, columns]


def slowly(sample: Sample, size: tuple[int, int], scale: float, offsets: list[int]) -> tuple[Any, Pixels]:
    """The whole image at the scale, on a canvas as large as both, cut at the offsets."""
    image, mask = sample["image"], sample["mask"]
    shape = (round(mask.shape[0] * scale), round(mask.shape[1] * scale))
    margin = max(*size)
    canvas = np.full((shape[0] + 2 * margin, shape[1] + 2 * margin, 3), GREY, float)
    labels = np.full(canvas.shape[:2], IGNORE, np.uint8)
    inside = (slice(margin, margin + shape[0]), slice(margin, margin + shape[1]))
    canvas[inside], labels[inside] = bilinear(image, shape), nearest(mask, shape)
    cut = tuple(slice(margin + offset, margin + offset + side) for offset, side in zip(offsets, size, strict=True))
    return canvas[cut], labels[cut]


def drawn(seed: int, shape: tuple[int, int], size: tuple[int, int], scale: tuple[float, float]) -> tuple[float, Any]:
    """The scale and offsets that ScaledCrop draws from this seed."""
    generator = random.Random(seed)
    factor = generator.uniform(*scale)
    full = [round(side * factor) for side in shape]
    pairs = zip(full, size, strict=True)
    return factor, [generator.randint(min(0, a - b), max(0, a - b)) for a, b in pairs]


@pytest.mark.parametrize("shape", [(180, 240), (300, 100), (97, 251)])
@pytest.mark.parametrize("size", [(128, 128), (100, 160)])
def test_the_window_is_where_the_slow_way_finds_it(shape: tuple[int, int], size: tuple[int, int]) -> None:
    sample: Sample = {"image": photograph(*shape), "mask": quilt(*shape)}
    transform = ScaledCrop(size, (0.55, 2.0), fill=GREY)
    for seed in range(25):
        transform.py_random = random.Random(seed)
        found = transform(**sample)
        image, mask = slowly(sample, size, *drawn(seed, shape, size, (0.55, 2.0)))
        assert found["image"].shape == (*size, 3)
        assert found["image"].dtype == found["mask"].dtype == np.uint8
        np.testing.assert_array_equal(found["mask"] == IGNORE, mask == IGNORE)
        np.testing.assert_array_equal(
            found["image"][mask == IGNORE], np.broadcast_to(GREY, image.shape)[mask == IGNORE]
        )
        difference = np.abs(found["image"] - image)
        steps = 255 / np.array(shape[::-1])  # grey levels of red and green a pixel
        assert (difference[..., :2].max((0, 1)) <= steps + 1.5).all()
        assert difference.mean() < 3
        wrong = found["mask"] != mask
        assert wrong.mean() < 0.08  # a ring of at most a pixel about patches of 16
        assert not (wrong & _inner(mask)).any()


def _inner(mask: Pixels) -> NDArray[np.bool_]:
    """Pixels whose neighbours up to two away, as far as a pixel of the original can reach, are of their own class."""
    same = np.ones(mask.shape, bool)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            moved = np.roll(mask, step, axis)
            same &= moved == mask
    both = same.copy()
    both[:2], both[-2:], both[:, :2], both[:, -2:] = False, False, False, False
    return both


def test_scale_one_without_borders_copies_pixels() -> None:
    sample: Sample = {"image": photograph(90, 120), "mask": quilt(90, 120)}
    for seed in range(10):
        transform = ScaledCrop((64, 64), (1.0, 1.0))
        transform.py_random = random.Random(seed)
        found = transform(**sample)
        _, (top, left) = drawn(seed, (90, 120), (64, 64), (1.0, 1.0))
        np.testing.assert_array_equal(found["image"], sample["image"][top : top + 64, left : left + 64])
        np.testing.assert_array_equal(found["mask"], sample["mask"][top : top + 64, left : left + 64])


def test_short_side_sets_the_scale_that_factors_act_on() -> None:
    image = photograph(300, 600)
    transform = augment.scale_and_crop(size=200, mirror=False, scale=(1.0, 1.0), short_side=100, **STILL)
    mask = draw(transform, {"image": image, "mask": np.zeros((300, 600), np.uint8)}, seed=0, epoch=0, index=0)["mask"]
    assert (mask == 0).sum() == 100 * 200  # 300 x 600 at a third
    with_range = augment.scale_and_crop(size=64, mirror=False, short_side=100, **STILL)
    assert draw(with_range, {"image": image}, seed=0, epoch=0, index=0)["image"].shape == (64, 64, 3)


STILL: dict[str, Any] = {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}


def test_scales_and_places_are_spread_evenly() -> None:
    transform = augment.scale_and_crop(size=64, mirror=False, scale=(0.5, 2.0), **STILL)
    sample: Sample = {"image": photograph(64, 64), "mask": np.zeros((64, 64), np.uint8)}
    out = [draw(transform, sample, seed=0, epoch=0, index=index) for index in range(600)]
    shown = np.array([(each["mask"] == 0).mean() for each in out])
    assert abs((shown == 1).mean() - 2 / 3) < 0.07  # factors from 1 to 2 are two thirds of the range
    small = [np.argwhere(each["mask"] == 0) for each, share in zip(out, shown, strict=True) if share < 0.4]
    tops = np.array([places[0] for places in small])
    rooms = np.array([64 - (places[-1] - places[0] + 1) for places in small])
    assert np.abs((tops / rooms).mean(0) - 0.5).max() < 0.1
    assert (tops.min(0) <= 2).all()


def test_half_are_mirrored_image_mask_and_boxes_together() -> None:
    image = photograph(80, 80)
    sample: Sample = {
        "image": image,
        "mask": np.tile(np.arange(80, dtype=np.uint8), (80, 1)),
        "bboxes": np.array([[0, 0, 20, 80]], np.float32),
        "labels": np.array([3]),
    }
    transform = augment.scale_and_crop(size=80, mirror=True, boxes=True, scale=(1.0, 1.0), **STILL)
    out = [draw(transform, sample, seed=0, epoch=0, index=index) for index in range(200)]
    mirrored = [bool(each["mask"][0, 0] == 79) for each in out]
    assert 75 <= sum(mirrored) <= 125
    for each, turned in zip(out, mirrored, strict=True):
        np.testing.assert_array_equal(each["image"], image[:, ::-1] if turned else image)
        np.testing.assert_allclose(each["bboxes"], [[60, 0, 80, 80] if turned else [0, 0, 20, 80]], atol=1e-3)


def test_boxes_and_instance_masks_follow_and_a_lost_object_leaves() -> None:
    corners = [(x, y) for y in (4, 40, 76) for x in (4, 40, 76)]
    masks = np.zeros((9, 100, 100), np.uint8)
    for each, (x, y) in zip(masks, corners, strict=True):
        each[y : y + 20, x : x + 16] = 1
    boxes = np.array([(x, y, x + 16, y + 20) for x, y in corners], np.float32)
    sample: Sample = {"image": photograph(100, 100), "masks": masks, "bboxes": boxes, "labels": np.arange(9)}
    transform = augment.scale_and_crop(size=96, mirror=True, boxes=True)
    counts = set()
    for index in range(40):
        out = draw(transform, sample, seed=0, epoch=0, index=index)
        counts.add(len(out["labels"]))
        assert len(out["bboxes"]) == len(out["masks"]) == len(out["labels"])
        assert set(np.unique(out["masks"])) <= {0, 1}
        for box, mask in zip(out["bboxes"], out["masks"], strict=True):
            rows, columns = np.nonzero(mask)
            if len(rows):
                extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                np.testing.assert_allclose(extent, box, atol=1.5)
    assert max(counts) == 9
    assert min(counts) < 6


def test_draws_belong_to_seed_epoch_and_index() -> None:
    transform = augment.scale_and_crop(size=48, mirror=True)
    sample: Sample = {"image": photograph(60, 80), "mask": quilt(60, 80)}

    def at(**key: int) -> bytes:
        out = draw(transform, sample, **{"seed": 0, "epoch": 0, "index": 0, **key})
        return out["image"].tobytes() + out["mask"].tobytes()

    first = at()
    others = [at(seed=1), at(epoch=1), at(index=1), at(index=2)]
    assert at() == first
    assert len({first, *others}) == 5


def test_colours_change_the_image_alone_and_not_the_padding() -> None:
    sample: Sample = {"image": photograph(64, 64), "mask": quilt(64, 64)}
    for scale in (0.7, 1.6):
        changes = []
        for index in range(20):
            transform = augment.scale_and_crop(size=80, mirror=False, scale=(scale, scale))
            out = draw(transform, sample, seed=0, epoch=0, index=index)
            outside = out["mask"] == IGNORE
            assert (out["image"][outside] == GREY).all()
            assert set(np.unique(out["mask"])) <= {*range(20), IGNORE}
            still = augment.scale_and_crop(size=80, mirror=False, scale=(scale, scale), **STILL)
            changes.append(
                np.abs(
                    out["image"][~outside].mean(0)
                    - draw(still, sample, seed=0, epoch=0, index=index)["image"][~outside].mean(0)
                ).max()
            )
        assert np.mean(changes) > 10


def test_colours_before_and_after_enlarging_agree() -> None:
    image = (photograph(64, 64) // 2 + 60).astype(np.uint8)
    jitter = ColourMatrix(0.2, 0.2, 0.2, 0.05)
    transform = ScaledCrop((96, 96), (1.5, 1.5), jitter=jitter)
    transform.py_random = random.Random(3)
    found = transform(image=image)["image"]
    plain = ScaledCrop((96, 96), (1.5, 1.5))
    plain.py_random = random.Random(3)
    generator = random.Random(3)
    generator.uniform(1.5, 1.5)
    generator.randint(0, 0)
    generator.randint(0, 0)
    jitter.py_random = generator
    expected = jitter.apply(plain(image=image)["image"], **jitter.get_params()).astype(int)
    assert np.abs(found - expected).max() <= 3  # the mean, for contrast, and the rounding differ a little


def test_rotation_turns_masks_without_new_classes_and_fills_with_ignore() -> None:
    sample: Sample = {"image": photograph(96, 96), "mask": np.full((96, 96), 5, np.uint8)}
    transform = augment.scale_and_crop(size=64, mirror=False, scale=(1.0, 1.0), rotation=30, **STILL)
    out = [draw(transform, sample, seed=0, epoch=0, index=index) for index in range(20)]
    assert set(np.unique([each["mask"] for each in out])) == {5, IGNORE}
    corners = [each["image"][0, 0].tolist() for each in out if each["mask"][0, 0] == IGNORE]
    assert [*GREY] in corners


def test_native_leaves_everything_and_short_side_resizes_both() -> None:
    sample: Sample = {"image": photograph(90, 150), "mask": quilt(90, 150)}
    out = draw(augment.native(size=64), sample, seed=0, epoch=0, index=0)
    np.testing.assert_array_equal(out["image"], sample["image"])
    np.testing.assert_array_equal(out["mask"], sample["mask"])
    small = draw(augment.native(size=64, short_side=60), sample, seed=0, epoch=0, index=0)
    assert small["image"].shape == (60, 100, 3)
    assert np.abs(small["image"] - bilinear(sample["image"], (60, 100))).max() <= 1
    np.testing.assert_array_equal(small["mask"], nearest(sample["mask"], (60, 100)))


def test_a_scale_that_is_no_range_is_named() -> None:
    for scale in ((0.0, 1.0), (2.0, 0.5)):
        with pytest.raises(UsageError, match=r"scale=.*no range"):
            augment.scale_and_crop(size=32, mirror=True, scale=scale)
