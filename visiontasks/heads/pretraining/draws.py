"""Random numbers that belong to an image and an epoch, on any device and for any number of processes."""

from functools import lru_cache

import torch
from torch import Tensor

_STEP = -7046029254386353131  # 2**64 over the golden ratio, as a signed number
_MULTIPLIERS = ((30, -4658895280553007687), (27, -7723592293110705685))


def image_keys(index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """A key for each image, a function of (seed, epoch, index). Shapes: index (B,); returns (B,) int64."""
    return _mixed(_stem(seed, epoch) + _STEP * (index + 1))


@lru_cache(maxsize=64)
def _stem(seed: int, epoch: int) -> int:
    key = torch.zeros((), dtype=torch.int64)
    for number in (seed, epoch):
        key = _mixed(key + _STEP * (torch.tensor(number) + 1))
    return int(key)


def draws(keys: Tensor, count: int) -> Tensor:
    """Independent numbers from 0 to below 1, (B, count) float32, a function of each key alone.

    SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195). Shapes: keys (B,) int64.
    """
    places = torch.arange(1, count + 1, device=keys.device)  # (count,)
    return _shifted(_mixed(keys[:, None] + _STEP * places), 40).float() / 2**24


def _mixed(words: Tensor) -> Tensor:
    for shift, multiplier in _MULTIPLIERS:
        words = (words ^ _shifted(words, shift)) * multiplier
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift to the right, where torch's repeats the sign."""
    return (words >> by) & ((1 << (64 - by)) - 1)
