"""What gated layers see of an image: all that precedes a pixel and colour, and nothing else."""

import pytest
import torch
from torch import Tensor

from visiontasks.backbones import GatedPixelCNN
from visiontasks.contracts import UsageError
from visiontasks.layers.causal import GatedLayer, MaskedConv2d, colour_of

SIDE = 6
PLACES = SIDE * SIDE


def seen(maps: Tensor, images: Tensor, *, colour: int | None = None) -> Tensor:
    """At which places maps (1, C, H, W) of a colour depend on images, (H * W of maps, 3, H * W) bool."""
    chosen = maps if colour is None else maps[:, colour_of(maps.shape[1], 3) == colour]
    rows = [torch.autograd.grad(place.sum(), images, retain_graph=True)[0] for place in chosen[0].flatten(1).T]
    return torch.stack(rows)[:, 0].flatten(2) != 0


@pytest.fixture(scope="module")
def pyramid() -> tuple[Tensor, Tensor]:
    """Random images, and both stacks' maps of them."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, SIDE, SIDE, dtype=torch.float64, requires_grad=True)
    backbone = GatedPixelCNN(depth=SIDE, width=6).double()
    return images, backbone(images)[0]


def test_the_vertical_stack_sees_all_rows_above(pyramid: tuple[Tensor, Tensor]) -> None:
    images, maps = pyramid
    row = torch.arange(PLACES) // SIDE
    above = row[None] < row[:, None]
    assert torch.equal(seen(maps[:, :6], images), above[:, None].expand(-1, 3, -1))


@pytest.mark.parametrize("colour", range(3))
def test_the_horizontal_stack_sees_all_that_precedes_a_colour_of_a_pixel(
    pyramid: tuple[Tensor, Tensor], colour: int
) -> None:
    images, maps = pyramid
    place = torch.arange(PLACES)
    earlier = (place[None] < place[:, None])[:, None].expand(-1, 3, -1)
    itself = torch.eye(PLACES, dtype=torch.bool)[:, None] & (torch.arange(3) < colour)[None, :, None]
    assert torch.equal(seen(maps[:, 6:], images, colour=colour), earlier | itself)


def test_later_layers_may_see_a_colour_itself() -> None:
    layer = MaskedConv2d(6, 6, 2, colours=3)
    maps = torch.randn(1, 6, 1, 3, requires_grad=True)
    layer(maps)[0, :2, 0, 2].sum().backward()  # the first colour's
    assert maps.grad is not None
    assert (maps.grad[0, :, 0] != 0).tolist() == [[False, True, True]] * 2 + [[False, True, False]] * 4


def test_a_class_is_told_to_both_stacks() -> None:
    layer = GatedLayer(4, 4, colours=1, num_classes=3)
    maps = torch.randn(1, 4, 5, 5)
    first, second = (layer(maps, maps, torch.tensor([label])) for label in (0, 2))
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("options", [{"depth": 0}, {"width": 2}])
def test_layers_that_see_nothing_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="sees no pixel"):
        GatedPixelCNN(**options)
