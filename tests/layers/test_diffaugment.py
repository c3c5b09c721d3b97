"""Differentiable augmentation: what each part does, and that numbers and gradients belong to their images."""

import pytest
import torch

from visiontasks.errors import UsageError
from visiontasks.layers.diffaugment import DRAWS, check_policy, diffaugment

PARTS = ("colour", "translation", "cutout")


def given(count: int = 6, height: int = 16, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, height, width, generator=random) * 2 - 1, torch.rand(count, DRAWS, generator=random)


def test_no_policy_changes_nothing() -> None:
    images, numbers = given()
    assert diffaugment(images, numbers, ()) is images


def test_an_image_is_altered_by_its_own_numbers_alone() -> None:
    images, numbers = given()
    together = diffaugment(images, numbers, PARTS)
    alone = torch.cat([diffaugment(images[k : k + 1], numbers[k : k + 1], PARTS) for k in range(len(images))])
    assert torch.allclose(together, alone, atol=1e-6)


def test_translation_moves_whole_pixels_by_an_eighth_at_most() -> None:
    images, numbers = given(width=16)
    images = images + 3  # so that black tells what came into view
    numbers[:, 3:5] = torch.tensor([[0.0, 0.0], [0.999, 0.999], [0.5, 0.5], [0.0, 0.5], [0.5, 0.999], [0.3, 0.3]])
    moved = diffaugment(images, numbers, ("translation",))
    assert torch.equal(moved[2], images[2])  # the middle of five shifts
    assert torch.equal(moved[0][:, 2:, 2:], images[0][:, :-2, :-2])
    assert torch.equal(moved[1][:, :-2, :-2], images[1][:, 2:, 2:])
    assert moved[0][:, :2].eq(0).all()


def test_cutout_blackens_half_of_each_side_at_most() -> None:
    images, numbers = given(width=16)
    holes = diffaugment(images + 3, numbers, ("cutout",)).eq(0).all(dim=1)  # (B, H, W)
    numbers[:, 5:7] = 0.5
    middle = diffaugment(images + 3, numbers, ("cutout",)).eq(0).all(dim=1)
    assert middle.sum(dim=(1, 2)).eq(64).all()
    assert holes.sum(dim=(1, 2)).le(64).all()
    assert holes.any(dim=2).sum(dim=1).ge(4).all()


def test_colour_keeps_the_mean_but_for_brightness() -> None:
    images, numbers = given()
    altered = diffaugment(images, numbers, ("colour",))
    difference = altered.mean(dim=(1, 2, 3)) - images.mean(dim=(1, 2, 3))
    assert torch.allclose(difference, numbers[:, 0] - 0.5, atol=1e-5)


@pytest.mark.parametrize("part", PARTS)
def test_gradients_reach_the_images(part: str) -> None:
    images, numbers = given(count=2, height=8, width=8)
    images = images.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: diffaugment(x, numbers.double(), (part,)), (images,))


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(UsageError, match=r"has no color: give any of colour, translation, cutout"):
        check_policy(["color"])
