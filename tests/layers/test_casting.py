from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from visiontasks.layers.casting import cast_once


class Casts(TorchDispatchMode):
    """Counts the casts of matrices to another type."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._to_copy.default and args[0].shape == (4, 4)
        return func(*args, **(kwargs or {}))


@contextmanager
def as_lightning() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        yield


def trained(layer: nn.Linear, images: Tensor) -> tuple[int, Tensor]:
    """The casts of a forward that uses a layer thrice, and the gradient."""
    layer.zero_grad()
    with Casts() as casts:
        total = sum(layer(images * factor).float().sum() for factor in (1, 2, 3))
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    assert layer.weight.grad is not None
    return casts.count, layer.weight.grad.clone()


def test_a_weight_that_is_used_several_times_is_cast_once_and_learns_the_same() -> None:
    layer, images = nn.Linear(4, 4), torch.randn(2, 4)
    with as_lightning():
        each, wanted = trained(layer, images)
        with cast_once("cpu"):
            once, found = trained(layer, images)
        again, _ = trained(layer, images)
    assert (each, once, again) == (3, 1, 3)
    torch.testing.assert_close(found, wanted, rtol=0.02, atol=0.02)  # bfloat16 adds up in another order


def test_what_is_cast_is_forgotten_even_after_an_error() -> None:
    layer, images = nn.Linear(4, 4), torch.randn(2, 4)
    with as_lightning():
        with torch.no_grad(), suppress(InterruptedError), cast_once("cpu"):
            layer(images)
            raise InterruptedError
        assert not torch.is_autocast_cache_enabled()
        _, gradient = trained(layer, images)
    assert gradient.any()


def test_without_autocast_and_where_torch_casts_once_it_changes_nothing() -> None:
    with cast_once("cpu"):
        assert nn.Linear(4, 4)(torch.randn(2, 4)).dtype == torch.float32
    layer, images = nn.Linear(4, 4), torch.randn(2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        layer(images)
        with cast_once("cpu"):
            casts, _ = trained(layer, images)
        assert torch.is_autocast_cache_enabled()
    assert casts == 0
