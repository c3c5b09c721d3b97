import itertools

import pytest
import torch
from torch import Tensor, nn

from visiontasks.layers.blocks import resized
from visiontasks.tasks.inference import augmented, padded, starts, windowed


@pytest.mark.parametrize(
    ("length", "window", "overlap"), [(10, 10, 0.5), (11, 10, 0.5), (64, 16, 0.0), (65, 16, 0.25), (9, 4, 0.9)]
)
def test_windows_cover_a_length_and_share_what_was_asked(length: int, window: int, overlap: float) -> None:
    found = starts(length, window, overlap)
    assert found[0] == 0
    assert found[-1] + window == length
    steps = [right - left for left, right in itertools.pairwise(found)]
    assert all(0 < step <= max(1, int(window * (1 - overlap))) + 1 for step in steps)


def test_windows_of_a_pixelwise_network_give_what_the_whole_image_gives() -> None:
    network, images = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 37, 50)
    whole = network(images).softmax(dim=1)
    assert torch.allclose(windowed(network, images, window=(16, 24), overlap=0.3), whole, atol=1e-6)
    assert torch.allclose(windowed(network, images, window=(64, 24), overlap=0.0), whole, atol=1e-6)


def test_a_window_sees_nothing_beyond_itself() -> None:
    seen: list[tuple[int, ...]] = []

    def scores(images: Tensor) -> Tensor:
        seen.append(tuple(images.shape[-2:]))
        return images

    windowed(scores, torch.randn(1, 3, 20, 30), window=(10, 10), overlap=0.0)
    assert seen == [(10, 10)] * 6


def test_mirror_images_and_scales_of_a_pixelwise_network_change_nothing_where_the_image_is_flat() -> None:
    network, images = nn.Conv2d(3, 5, 1), torch.randn(2, 3, 1, 1).expand(2, 3, 16, 24)
    answer = augmented(network, images, scales=(0.5, 1.0, 1.5), flips=True)
    assert torch.allclose(answer, network(images).softmax(dim=1), atol=1e-6)


def test_mirrored_answers_are_mirrored_back_and_averaged() -> None:
    images = torch.randn(1, 2, 4, 6)
    ramp = torch.linspace(0, 1, 6)

    def scores(given: Tensor) -> Tensor:
        return given * ramp

    expected = ((images * ramp).softmax(1) + (images * ramp.flip(0)).softmax(1)) / 2
    assert torch.allclose(augmented(scores, images, scales=(1.0,), flips=True), expected, atol=1e-6)


def test_padding_repeats_the_edge_to_a_multiple() -> None:
    images = torch.randn(1, 3, 33, 64)
    wide = padded(images, 32)
    assert wide.shape == (1, 3, 64, 64)
    assert torch.equal(wide[..., 33:, :], images[..., 32:33, :].expand(1, 3, 31, 64))
    assert padded(images[..., :32, :], 32).shape == (1, 3, 32, 64)


def test_maps_of_the_size_are_passed_on() -> None:
    maps = torch.randn(1, 2, 8, 8)
    assert resized(maps, (8, 8)) is maps
    assert resized(maps, (16, 12)).shape == (1, 2, 16, 12)
