import itertools

import albumentations as A
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation  # type: ignore[import-untyped]
from torchvision.transforms.v2 import functional as F

from visiontasks.data import colour
from visiontasks.data.augment import crop_and_colour
from visiontasks.data.colour import ColourMatrix, composed
from visiontasks.data.randomness import draw

Floats = NDArray[np.float64]
RNG = np.random.default_rng(3)
MILD = RNG.integers(90, 150, (15, 21, 3), dtype=np.uint8)  # no adjustment below takes it out of range
FACTORS = {"brightness": 1.13, "contrast": 0.7, "saturation": 1.3, "hue": 0.06}


def _turned(image: Floats, turn: float) -> Floats:
    axis = np.full(3, 2 * np.pi * turn / np.sqrt(3))
    turned: Floats = Rotation.from_rotvec(axis).apply(image.reshape(-1, 3)).reshape(image.shape)
    return turned


def _adjusted(image: Floats, name: str) -> Floats:
    """One step of torchvision's jitter in float64, which neither rounds nor, on this image, clips."""
    if name == "hue":
        return _turned(image, FACTORS["hue"])
    adjust = {"brightness": F.adjust_brightness, "contrast": F.adjust_contrast, "saturation": F.adjust_saturation}[name]
    pixels = torch.from_numpy(image / 255).permute(2, 0, 1)
    adjusted: Floats = adjust(pixels, FACTORS[name]).permute(1, 2, 0).numpy() * 255
    return adjusted


def _applied(matrix: colour.Matrix, image: NDArray[np.uint8]) -> Floats:
    return image @ matrix[:3, :3].T + matrix[:3, 3]


@pytest.mark.parametrize("order", itertools.permutations(FACTORS))
def test_one_matrix_equals_the_steps_in_their_order(order: tuple[str, ...]) -> None:
    expected = MILD.astype(np.float64)
    for name in order:
        expected = _adjusted(expected, name)
    matrix = composed(order, FACTORS, mean=colour.mean_colour(MILD))
    assert expected.min() > 0
    assert expected.max() < 255
    np.testing.assert_allclose(_applied(matrix, MILD), expected, atol=0.01)  # torchvision's grey weights have 4 digits


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (301, 500)])
def test_the_mean_is_exact(shape: tuple[int, int]) -> None:
    image = RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)
    np.testing.assert_allclose(colour.mean_colour(image), [*image.mean(axis=(0, 1)), 1], rtol=1e-12)


def test_a_third_of_a_circle_is_the_hue_shift_of_hsv() -> None:
    image = RNG.integers(0, 256, (15, 21, 3), dtype=np.uint8)
    for turn in (1 / 3, -1 / 3):
        shifted = F.adjust_hue(torch.from_numpy(image).permute(2, 0, 1), turn).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(_applied(colour.hue(turn), image), shifted, atol=1.01)


def test_greys_keep_their_hue_and_saturation() -> None:
    grey = np.repeat(RNG.integers(0, 256, (9, 9, 1), dtype=np.uint8), 3, axis=2)
    for matrix in (colour.hue(0.23), colour.saturation(1.7)):
        np.testing.assert_allclose(_applied(matrix, grey), grey, atol=1e-9)


def _jittered(image: NDArray[np.uint8], index: int, **strengths: float) -> NDArray[np.uint8]:
    jitter = A.Compose([ColourMatrix(**{"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0} | strengths)])
    return draw(jitter, {"image": image}, seed=0, epoch=0, index=index)["image"]


def test_pixels_are_rounded_to_the_nearest_and_clipped() -> None:
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)  # (1, 256, 3)
    for index in range(20):
        out = _jittered(ramp, index, brightness=0.9)
        factor = out[0, 100, 0] / 100  # good to half a level in a hundred
        np.testing.assert_allclose(out, np.clip(ramp * factor, 0, 255), atol=0.5 + 0.005 * 256)
    assert out.dtype == np.uint8


def test_no_strength_changes_nothing() -> None:
    np.testing.assert_array_equal(_jittered(MILD, 0), MILD)


def _seeded(**strengths: float) -> ColourMatrix:
    jitter = ColourMatrix(**strengths)
    jitter.set_random_seed(0)
    return jitter


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_factors_fill_their_range_and_stay_inside(name: str) -> None:
    jitter, strength = _seeded(**{name: 0.3}), 0.3
    drawn = [jitter.get_params()["factors"][name] for _ in range(400)]
    centre = 0.0 if name == "hue" else 1.0
    assert centre - strength <= min(drawn) < centre - 0.9 * strength
    assert centre + 0.9 * strength < max(drawn) <= centre + strength


def test_strength_above_one_never_inverts() -> None:
    jitter = _seeded(brightness=3.0)
    assert min(jitter.get_params()["factors"]["brightness"] for _ in range(200)) >= 0


def test_all_orders_occur() -> None:
    jitter = _seeded()
    assert len({tuple(jitter.get_params()["order"]) for _ in range(400)}) == 24


def test_the_exact_sequence_stays_available() -> None:
    steps = crop_and_colour(size=8, mirror=True, colour="sequential").transforms
    assert any(isinstance(step, A.ColorJitter) for step in steps)
    assert not any(isinstance(step, ColourMatrix) for step in steps)


def test_the_image_itself_is_left_alone() -> None:
    before = MILD.copy()
    _jittered(MILD, 1, brightness=0.4, hue=0.1)
    np.testing.assert_array_equal(MILD, before)
