"""Colour jitter as one matrix: brightness, contrast, saturation and hue in a single pass over the pixels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]  # (3, 4) acts on (r, g, b, 1) with values 0..255

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, the grey of torchvision, PIL and OpenCV
_GREY = np.tile(LUMA, (3, 1))  # (3, 3) every channel becomes the luma


def brightness(factor: float) -> Matrix:
    """Scale every channel: 0 is black, 1 changes nothing."""
    return _affine(factor * np.eye(3))


def contrast(factor: float, *, grey: float) -> Matrix:
    """Blend with the image's mean luma `grey`, in 0..255: 0 is that grey everywhere, 1 changes nothing."""
    return _affine(factor * np.eye(3), (1 - factor) * grey)


def saturation(factor: float) -> Matrix:
    """Blend each pixel with its luma: 0 is a grey picture, 1 changes nothing."""
    return _affine(factor * np.eye(3) + (1 - factor) * _GREY)


def hue(turn: float) -> Matrix:
    """Rotate the colours about the grey axis of the RGB cube by `turn` of a full circle (0.5: opposite colours).

    Greys stay as they are. At thirds of a circle it permutes the channels, as the hue shift of HSV does; between them
    the HSV shift is not linear and differs (by 1.2 grey levels on average for photographs and turns up to 0.1).
    """
    angle = 2 * math.pi * turn
    even, odd = (1 - math.cos(angle)) / 3, math.sin(angle) / math.sqrt(3)
    cross = np.array([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]])
    return _affine(math.cos(angle) * np.eye(3) + even * np.ones((3, 3)) + odd * cross)


def composed(order: Sequence[str], factors: Mapping[str, float], *, mean: NDArray[np.float64]) -> Matrix:
    """Compose the adjustments named in `order`, first to last, for an image with mean colour `mean` (3,) in 0..255.

    Equal to applying them one by one in exact arithmetic, without the rounding and clipping between them: the mean of
    an affinely transformed image is the transformed mean, so contrast finds the grey that it would have found.
    """
    total = _affine(np.eye(3))
    for name in order:
        total = _then(total, _step(name, factors[name], total[:, :3] @ mean + total[:, 3]))
    return total


class ColourMatrix(A.ImageOnlyTransform):  # type: ignore[misc]
    """Jitter brightness, contrast, saturation and hue, in random order, by one matrix and one rounding.

    Each factor is drawn from [1 - x, 1 + x], not below 0, the hue's turn from [-hue, hue]. Images are (H, W, 3) uint8
    RGB. It differs from the sequence only where an intermediate result would have been clipped or rounded, and in the
    hue between thirds of a circle (see `hue`); `albumentations.ColorJitter` has the exact sequence.
    """

    def __init__(
        self, brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.1, p: float = 1.0
    ) -> None:
        super().__init__(p=p)
        self.brightness, self.contrast, self.saturation, self.hue = brightness, contrast, saturation, hue

    def get_params(self) -> dict[str, Any]:
        """Draw one factor for each adjustment and their order."""
        factors = {name: self._factor(name) for name in ("brightness", "contrast", "saturation")}
        factors["hue"] = self.py_random.uniform(-self.hue, self.hue)
        order = [name for name in factors if getattr(self, name) > 0]
        self.py_random.shuffle(order)
        return {"order": order, "factors": factors}

    def apply(self, img: NDArray[np.uint8], order: list[str], factors: dict[str, float], **_: Any) -> NDArray[np.uint8]:
        """Return a new (H, W, 3) image."""
        matrix = composed(order, factors, mean=np.array(cv2.mean(img)[:3]))
        return cv2.transform(img, matrix)  # type: ignore[no-any-return]

    def _factor(self, name: str) -> float:
        strength = getattr(self, name)
        return self.py_random.uniform(max(0.0, 1 - strength), 1 + strength)  # type: ignore[no-any-return]


def _step(name: str, factor: float, mean: NDArray[np.float64]) -> Matrix:
    if name == "contrast":
        return contrast(factor, grey=float(LUMA @ mean))
    return {"brightness": brightness, "saturation": saturation, "hue": hue}[name](factor)


def _affine(linear: NDArray[np.float64], offset: float = 0.0) -> Matrix:
    return np.concatenate([linear, np.full((3, 1), offset)], axis=1)  # (3, 4)


def _then(first: Matrix, second: Matrix) -> Matrix:
    linear = second[:, :3]
    return np.concatenate([linear @ first[:, :3], linear @ first[:, 3:] + second[:, 3:]], axis=1)  # (3, 4)
