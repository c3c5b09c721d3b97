"""Pyramids to raw predictions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visiontasks.heads.classification import MLP, VGG, Linear

if TYPE_CHECKING:
    from visiontasks.heads.deeplab import DeepLabV3, DeepLabV3Plus
    from visiontasks.heads.fcn import FCN, SkipFCN
    from visiontasks.heads.fpn import FPN
    from visiontasks.heads.lraspp import LRASPP
    from visiontasks.heads.segformer import SegFormerMLP
    from visiontasks.heads.unet import UNet

__all__ = [
    "FCN",
    "FPN",
    "LRASPP",
    "MLP",
    "VGG",
    "DeepLabV3",
    "DeepLabV3Plus",
    "Linear",
    "SegFormerMLP",
    "SkipFCN",
    "UNet",
]

_MODULES = {
    "DeepLabV3": "deeplab",
    "DeepLabV3Plus": "deeplab",
    "FCN": "fcn",
    "FPN": "fpn",
    "LRASPP": "lraspp",
    "SegFormerMLP": "segformer",
    "SkipFCN": "fcn",
    "UNet": "unet",
}


def __getattr__(name: str) -> Any:
    """Imports a dense head when it is asked for, so that classification does not wait for torchvision."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
