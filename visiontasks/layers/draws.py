"""Random numbers that belong to an image and an epoch, on any device and for any number of processes."""

import torch
from torch import Tensor

_STEP = -7046029254386353131  # 2**64 over the golden ratio, as a signed number
_WORD = (1 << 64) - 1
_MULTIPLIERS = ((30, -4658895280553007687), (27, -7723592293110705685))


def image_keys(index: Tensor, *, seed: int, epoch: int) -> Tensor:
    """A key for each image, a function of (seed, epoch, index). Shapes: index (B,); returns (B,) int64."""
    return _mixed(key_of(seed, epoch) + _STEP * (index + 1))


def key_of(*numbers: int) -> int:
    """A key for whole numbers, in 64 bits with a sign: what `image_keys` would make of them one after the other."""
    key = 0
    for number in numbers:
        key = (key + _STEP * (number + 1)) & _WORD
        for shift, multiplier in _MULTIPLIERS:
            key = (key ^ key >> shift) * multiplier & _WORD
        key ^= key >> 31
    return key - (1 << 64) if key >> 63 else key


def draws(keys: Tensor, count: int) -> Tensor:
    """Independent numbers from 0 to below 1, (B, count) float32, a function of each key alone.

    SplitMix64 (Steele, Lea and Flood 2014, doi 10.1145/2660193.2660195). Shapes: keys (B,) int64.
    """
    places = torch.arange(1, count + 1, device=keys.device)  # (count,)
    return _shifted(_mixed(keys[:, None] + _STEP * places), 40).float().div_(2**24)


def _mixed(words: Tensor) -> Tensor:
    """The words, changed in place."""
    for shift, multiplier in _MULTIPLIERS:
        words.bitwise_xor_(_shifted(words, shift)).mul_(multiplier)
    return words.bitwise_xor_(_shifted(words, 31))


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift to the right, where torch's repeats the sign."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)
