"""Several views of one image, as learning without labels wants them: recipes, and the object that draws them."""

from collections.abc import Mapping, Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray

from visiontasks.contracts import UsageError
from visiontasks.data.augment import Colour, RandomWindow, Range, coloured, mirrored
from visiontasks.data.randomness import draw
from visiontasks.data.scaled_crop import Size, sides

Options = Mapping[str, Any]  # of `view`
Pixels = NDArray[np.uint8]

_LEAST_BLURRED = 96  # pixels of the shorter side


class MultiView:
    """Draws views of an image, each by a transform of its own and by a draw of its own."""

    def __init__(self, transforms: Sequence[A.Compose]) -> None:
        self.transforms = tuple(transforms)

    def views(self, image: Pixels, *, seed: int, epoch: int, index: int, first: int = 0) -> list[Pixels]:
        """One new (h, w, 3) image a transform; view number i is a function of (seed, epoch, index, first + i)."""
        keys = {"seed": seed, "epoch": epoch, "index": index}
        made = enumerate(self.transforms, start=first)
        return [draw(transform, {"image": image}, view=number, **keys)["image"] for number, transform in made]


def two_views(
    *,
    size: Size,
    mirror: bool,
    boxes: bool = False,  # noqa: ARG001
    first: Options,
    second: Options | None = None,
) -> MultiView:
    """Make two views of an image, with the options of `view` for each; without `second` both are made as the first.

    `boxes` is taken, and not used, so that all factories are called alike: views come without annotations.
    """
    return MultiView([view(size=size, mirror=mirror, **options) for options in (first, second or first)])


def multi_crop(
    *,
    size: Size,
    mirror: bool,
    boxes: bool = False,
    first: Options,
    second: Options | None = None,
    local: Options,
    local_views: int = 6,
    local_side: float = 3 / 7,
) -> MultiView:
    """Make two views of the size and then `local_views` small ones, whose sides are `local_side` times as long.

    After Caron et al. 2020 (arXiv 2006.09882, section 3.3), who have 2 of 224 pixels and 6 of 96. `first`, `second` and
    `local` are options of `view`. Raises UsageError where local_side is not between 0 and 1.
    """
    if not 0 < local_side <= 1:
        raise UsageError(f"local_side={local_side} is no share of a side: type augment.train.local_side=0.4286")
    pair = two_views(size=size, mirror=mirror, boxes=boxes, first=first, second=second)
    small = tuple(max(1, round(side * local_side)) for side in sides(size))
    return MultiView([*pair.transforms, *[view(size=small, mirror=mirror, **local)] * local_views])


def one_view(*, size: Size, mirror: bool, boxes: bool = False, **options: Any) -> MultiView:  # noqa: ARG001
    """Make one view of an image, with the options of `view`, for tasks that alter it themselves."""
    return MultiView([view(size=size, mirror=mirror, **options)])


def view(
    *,
    size: Size,
    mirror: bool,
    scale: Range = (0.08, 1.0),
    ratio: Range = (3 / 4, 4 / 3),
    jitter: float = 0.8,
    brightness: float = 0.8,
    contrast: float = 0.8,
    saturation: float = 0.8,
    hue: float = 0.2,
    colour: Colour = "matrix",
    grey: float = 0.2,
    blur: float = 0.5,
    sigma: Range = (0.1, 2.0),
    solarise: float = 0.0,
) -> A.Compose:
    """Cut a random window, mirror it half the time where `mirror`, jitter, grey, blur and solarise it, in that order.

    The steps of SimCLR (Chen et al. 2020, arXiv 2002.05709, appendix A), whose numbers are the defaults, and BYOL
    (Grill et al. 2020, arXiv 2006.07733, appendix B). `jitter`, `grey`, `blur` and `solarise` are probabilities,
    `scale`, `ratio`, `colour` and the strengths are as in `crop_and_colour`, and `sigma` is the range of the blur's
    standard deviation in pixels. A view whose shorter side is below 96 pixels is never blurred, as in SimCLR's
    experiments on CIFAR-10 (appendix B.9).
    Raises UsageError where `colour` is another word.
    """
    strengths = {"brightness": brightness, "contrast": contrast, "saturation": saturation, "hue": hue}
    blurred = blur if min(sides(size)) >= _LEAST_BLURRED else 0.0
    steps = [
        RandomWindow(size=sides(size), scale=tuple(scale), ratio=tuple(ratio)),
        *mirrored(mirror),
        *coloured(colour, p=jitter, **strengths),
        A.ToGray(p=grey),
        Blur(sigma=(sigma[0], sigma[1]), p=blurred),
        A.Solarize(threshold_range=(0.5, 0.5), p=solarise),
    ]
    return A.Compose([step for step in steps if step.p > 0])


class Blur(A.ImageOnlyTransform):  # type: ignore[misc]
    """Blur an image with a Gaussian whose standard deviation is drawn from `sigma`, cut off at three of them."""

    def __init__(self, sigma: tuple[float, float] = (0.1, 2.0), p: float = 0.5) -> None:
        super().__init__(p=p)
        self.sigma = sigma

    def get_params(self) -> dict[str, Any]:
        """Draw the standard deviation, in pixels."""
        return {"sigma": self.py_random.uniform(*self.sigma)}

    def apply(self, img: Pixels, sigma: float, **_: Any) -> Pixels:
        """Return a new (H, W, C) image; twice as fast as cv2.GaussianBlur, and within one grey level of it."""
        kernel = cv2.getGaussianKernel(2 * int(np.ceil(3 * sigma)) + 1, sigma, cv2.CV_32F)
        return cv2.sepFilter2D(img, -1, kernel, kernel)  # type: ignore[no-any-return]
