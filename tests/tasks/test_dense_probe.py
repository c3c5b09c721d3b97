import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as vision

from visiontasks.contracts import IGNORE
from visiontasks.tasks.dense_probe import draw_pixels, pixel_features, pixel_logits
from visiontasks.tasks.probes import Linear

SIZE = (16, 24)


def pyramid() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3 * 2**k, 8 >> k, 12 >> k, generator=generator) for k in range(3)]


def enlarged() -> Tensor:
    """All levels at the images' size, by torchvision."""
    bilinear = vision.InterpolationMode.BILINEAR
    return torch.cat([vision.resize(level, list(SIZE), bilinear, antialias=False) for level in pyramid()], dim=1)


def test_features_of_pixels_are_those_of_the_enlarged_levels() -> None:
    rows, columns = torch.meshgrid(torch.arange(SIZE[0]), torch.arange(SIZE[1]), indexing="ij")
    pixels = torch.stack((rows.flatten(), columns.flatten()), dim=1).expand(2, -1, -1)
    found = pixel_features(pyramid(), pixels, SIZE)  # (B, H * W, C)
    np.testing.assert_allclose(found.transpose(1, 2).unflatten(2, SIZE), enlarged(), atol=1e-5)


def test_logits_are_those_of_the_enlarged_levels() -> None:
    weight, bias = torch.randn(5, 21, generator=torch.Generator().manual_seed(1)), torch.arange(5.0)
    expected = torch.einsum("kc,bchw->bkhw", weight, enlarged()) + bias[:, None, None]
    np.testing.assert_allclose(pixel_logits(pyramid(), Linear(weight, bias), SIZE), expected, atol=1e-4)


def test_pixels_are_drawn_where_the_mask_counts_by_seed_and_index_alone() -> None:
    mask = torch.full((6, 9), IGNORE, dtype=torch.uint8)
    mask[2:5, 3:] = 1
    rows, columns = draw_pixels(mask, 400, seed=0, index=3).T
    assert (mask[rows, columns] == 1).all()
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == 18
    again = [draw_pixels(mask, 400, seed=seed, index=index) for seed, index in ((0, 3), (1, 3), (0, 4))]
    assert [torch.equal(each.T, torch.stack((rows, columns))) for each in again] == [True, False, False]


@pytest.mark.parametrize("value", [0, IGNORE])
def test_a_mask_without_a_counted_pixel_gives_pixels_all_the_same(value: int) -> None:
    pixels = draw_pixels(torch.full((4, 5), value, dtype=torch.uint8), 50, seed=0, index=0)
    assert pixels.shape == (50, 2)
    assert (pixels >= 0).all()
    assert (pixels < torch.tensor([4, 5])).all()
