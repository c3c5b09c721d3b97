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
    from visiontasks.heads.generation.gan import GAN, ConditionalGAN
    from visiontasks.heads.generation.generators import ResidualGenerator, TransposedGenerator
    from visiontasks.heads.generation.pixelcnn import ConditionalPixelCNN, PixelCNN
    from visiontasks.heads.generation.vae import VAE
    from visiontasks.heads.lraspp import LRASPP
    from visiontasks.heads.pretraining.byol import BYOL, SimSiam
    from visiontasks.heads.pretraining.colorization import Colorization
    from visiontasks.heads.pretraining.dino import DINO
    from visiontasks.heads.pretraining.inpainting import Inpainting
    from visiontasks.heads.pretraining.jigsaw import Jigsaw
    from visiontasks.heads.pretraining.moco import MoCo, MoCoV3
    from visiontasks.heads.pretraining.redundancy import BarlowTwins, VICReg
    from visiontasks.heads.pretraining.rotation import Rotation
    from visiontasks.heads.pretraining.simclr import SimCLR
    from visiontasks.heads.pretraining.swav import SwAV
    from visiontasks.heads.segformer import SegFormerMLP
    from visiontasks.heads.unet import UNet

__all__ = [
    "BYOL",
    "DINO",
    "FCN",
    "FCOS",
    "FPN",
    "GAN",
    "LRASPP",
    "MLP",
    "SSD",
    "VAE",
    "VGG",
    "BarlowTwins",
    "Colorization",
    "ConditionalGAN",
    "ConditionalPixelCNN",
    "DeepLabV3",
    "DeepLabV3Plus",
    "FasterRCNN",
    "Inpainting",
    "Jigsaw",
    "Linear",
    "MaskRCNN",
    "MoCo",
    "MoCoV3",
    "PixelCNN",
    "ResidualGenerator",
    "RetinaNet",
    "Rotation",
    "SegFormerMLP",
    "SimCLR",
    "SimSiam",
    "SkipFCN",
    "SwAV",
    "TransposedGenerator",
    "UNet",
    "VICReg",
]

_MODULES = {
    "BYOL": "pretraining.byol",
    "BarlowTwins": "pretraining.redundancy",
    "Colorization": "pretraining.colorization",
    "ConditionalGAN": "generation.gan",
    "ConditionalPixelCNN": "generation.pixelcnn",
    "DINO": "pretraining.dino",
    "DeepLabV3": "deeplab",
    "DeepLabV3Plus": "deeplab",
    "FCN": "fcn",
    "FCOS": "detection.fcos",
    "FPN": "fpn",
    "FasterRCNN": "detection.faster_rcnn",
    "GAN": "generation.gan",
    "Inpainting": "pretraining.inpainting",
    "Jigsaw": "pretraining.jigsaw",
    "LRASPP": "lraspp",
    "MaskRCNN": "detection.mask_rcnn",
    "MoCo": "pretraining.moco",
    "MoCoV3": "pretraining.moco",
    "PixelCNN": "generation.pixelcnn",
    "ResidualGenerator": "generation.generators",
    "RetinaNet": "detection.retinanet",
    "Rotation": "pretraining.rotation",
    "SSD": "detection.ssd",
    "SegFormerMLP": "segformer",
    "SimCLR": "pretraining.simclr",
    "SimSiam": "pretraining.byol",
    "SkipFCN": "fcn",
    "SwAV": "pretraining.swav",
    "TransposedGenerator": "generation.generators",
    "UNet": "unet",
    "VAE": "generation.vae",
    "VICReg": "pretraining.redundancy",
}


def __getattr__(name: str) -> Any:
    """Imports any other head when it is asked for: classification does not wait for torchvision."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
