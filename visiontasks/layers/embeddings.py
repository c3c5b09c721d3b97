"""What losses and gauges of embeddings share: full precision, unit length, temperatures."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec

import torch
from torch import Tensor

from visiontasks.errors import UsageError

P = ParamSpec("P")


def in_full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """The same function computed outside autocast, with its half-precision tensors as float32."""

    @functools.wraps(function)
    def computed(*args: P.args, **options: P.kwargs) -> Tensor:
        device = next(value for value in (*args, *options.values()) if isinstance(value, Tensor)).device
        with torch.autocast(device.type, enabled=False):
            return function(
                *(_full(value) for value in args), **{name: _full(value) for name, value in options.items()}
            )

    return computed


def unit(rows: Tensor) -> Tensor:
    """Vectors scaled to length 1; a vector of zeros stays one, with zero gradient.

    Shapes: (..., D) to the same.
    """
    length: Tensor = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)  # (..., 1)
    return rows / length.where(length > 0, torch.inf)


def sharpen(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature.

    Raises UsageError where the temperature is not more than 0.
    """
    if not temperature > 0:
        raise UsageError(f"A temperature is {temperature} and must be more than 0: papers take 0.04 to 1, such as 0.1.")
    return logits / temperature


def _full(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.to(torch.promote_types(value.dtype, torch.float32))
    return value
