"""Pyramids to raw predictions."""

from visiontasks.heads.classification import MLP, VGG, Linear

__all__ = ["MLP", "VGG", "Linear"]
