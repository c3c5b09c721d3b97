"""Colour jitter as one matrix: brightness, contrast, saturation and hue in a single pass over the pixels."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]  # (4, 4) acts on (r, g, b, 1) with values 0..255

LUMA = np.array([0.299, 0.587, 0.114, 0.0])  # ITU-R BT.601, the grey of torchvision, PIL and OpenCV
_COLOURS = np.diag([1.0, 1.0, 1.0, 0.0])
_ONE = np.diag([0.0, 0.0, 0.0, 1.0])
_GREY = np.outer([1, 1, 1, 0], LUMA)  # every channel becomes the luma
_SUM = np.outer([1, 1, 1, 0], [1, 1, 1, 0])
_OFFSET = np.outer([1, 1, 1, 0], [0, 0, 0, 1])
_CROSS = np.array([[0.0, -1, 1, 0], [1, 0, -1, 0], [-1, 1, 0, 0], [0, 0, 0, 0]])  # with (1, 1, 1)


def brightness(factor: float) -> Matrix:
    """Scale every channel: 0 is black, 1 changes nothing."""
    return factor * _COLOURS + _ONE


def contrast(factor: float, *, grey: float) -> Matrix:
    """Blend with the image's mean luma `grey`, in 0..255: 0 is that grey everywhere, 1 changes nothing."""
    return factor * _COLOURS + (1 - factor) * grey * _OFFSET + _ONE


def saturation(factor: float) -> Matrix:
    """Blend each pixel with its luma: 0 is a grey picture, 1 changes nothing."""
    return factor * _COLOURS + (1 - factor) * _GREY + _ONE


def hue(turn: float) -> Matrix:
    """Rotate the colours about the grey axis of the RGB cube by `turn` of a full circle (0.5: opposite colours).

    Greys stay as they are, and the sum of the channels too. At thirds of a circle it permutes the channels, as the hue
    shift of HSV does; between them that shift is not linear, since it also moves the sum.
    """
    angle = 2 * math.pi * turn
    cosine, sine = math.cos(angle), math.sin(angle)
    return cosine * _COLOURS + (1 - cosine) / 3 * _SUM + sine / math.sqrt(3) * _CROSS + _ONE  # Rodrigues' formula


def composed(order: Sequence[str], factors: Mapping[str, float], *, mean: NDArray[np.float64]) -> Matrix:
    """Compose the adjustments named in `order`, first to last, for an image with mean colour `mean`: (4,) red, green,
    blue in 0..255 and 1.

    Equal to applying them one by one in exact arithmetic, without the rounding and clipping between them: the mean of
    an affinely transformed image is the transformed mean, so contrast finds the grey that it would have found.
    """
    total: Matrix = np.eye(4)
    for name in order:
        total = _step(name, factors[name], total @ mean) @ total
    return total


_STEPS = {"brightness": brightness, "saturation": saturation, "hue": hue}


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
        used = [name for name in (*_STEPS, "contrast") if getattr(self, name) > 0]
        self.orders = list(itertools.permutations(used))

    def get_params(self) -> dict[str, Any]:
        """Draw one factor for each adjustment and their order."""
        factors = {name: self._factor(name) for name in ("brightness", "contrast", "saturation")}
        factors["hue"] = self.py_random.uniform(-self.hue, self.hue)
        return {"order": self.py_random.choice(self.orders), "factors": factors}

    def apply(
        self, img: NDArray[np.uint8], order: Sequence[str], factors: dict[str, float], **_: Any
    ) -> NDArray[np.uint8]:
        """Return a new (H, W, 3) image."""
        matrix = composed(order, factors, mean=mean_colour(img))
        return cv2.transform(img, matrix[:3])  # type: ignore[no-any-return]

    def _factor(self, name: str) -> float:
        strength = getattr(self, name)
        return self.py_random.uniform(max(0.0, 1 - strength), 1 + strength)  # type: ignore[no-any-return]


def mean_colour(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Average an (H, W, 3) image, exactly: (4,) red, green, blue in 0..255 and 1, in a quarter of cv2.mean's time."""
    columns = cv2.reduce(image.reshape(len(image), -1), 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)  # (1, W * 3)
    red, green, blue = columns.reshape(-1, 3).sum(axis=0) / (len(image) * image.shape[1])
    return np.array([red, green, blue, 1.0])


def _step(name: str, factor: float, mean: NDArray[np.float64]) -> Matrix:
    if name == "contrast":
        return contrast(factor, grey=float(LUMA @ mean))
    return _STEPS[name](factor)
