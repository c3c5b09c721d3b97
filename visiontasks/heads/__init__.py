"""Pyramids to raw predictions."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from visiontasks.heads.classification import MLP, VGG, Linear

if TYPE_CHECKING:
    from visiontasks.heads.deeplab import DeepLabV3, DeepLabV3Plus
    from visiontasks.heads.detection.faster_rcnn import FasterRCNN
    from visiontasks.heads.detection.fcos import FCOS
    from visiontasks.heads.detection.mask_rcnn import MaskRCNN
    from visiontasks.heads.detection.retinanet import RetinaNet
    from visiontasks.heads.detection.ssd import SSD
    from visiontasks.heads.fcn import FCN, SkipFCN
    from visiontasks.heads.fpn import FPN
    from visiontasks.heads.lraspp import LRASPP
    from visiontasks.heads.pretraining.simclr import SimCLR
    from visiontasks.heads.segformer import SegFormerMLP
    from visiontasks.heads.unet import UNet

__all__ = [
    "FCN",
    "FCOS",
    "FPN",
    "LRASPP",
    "MLP",
    "SSD",
    "VGG",
    "DeepLabV3",
    "DeepLabV3Plus",
    "FasterRCNN",
    "Linear",
    "MaskRCNN",
    "RetinaNet",
    "SegFormerMLP",
    "SimCLR",
    "SkipFCN",
    "UNet",
]

_MODULES = {
    "DeepLabV3": "deeplab",
    "DeepLabV3Plus": "deeplab",
    "FCN": "fcn",
    "FCOS": "detection.fcos",
    "FPN": "fpn",
    "FasterRCNN": "detection.faster_rcnn",
    "LRASPP": "lraspp",
    "MaskRCNN": "detection.mask_rcnn",
    "RetinaNet": "detection.retinanet",
    "SSD": "detection.ssd",
    "SegFormerMLP": "segformer",
    "SimCLR": "pretraining.simclr",
    "SkipFCN": "fcn",
    "UNet": "unet",
}


def __getattr__(name: str) -> Any:
    """Imports any other head when it is asked for: classification does not wait for torchvision."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
