"""Images to pyramids: adapters over torchvision and timm, and what neither has, such as the CIFAR residual network."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontasks.backbones.cifar_resnet import CifarResNet
    from visiontasks.backbones.dcgan import DCGAN
    from visiontasks.backbones.pixelcnn import GatedPixelCNN
    from visiontasks.backbones.timm import TimmBackbone
    from visiontasks.backbones.torchvision import TorchvisionBackbone

__all__ = ["DCGAN", "CifarResNet", "GatedPixelCNN", "TimmBackbone", "TorchvisionBackbone"]

_MODULES = {
    "CifarResNet": "cifar_resnet",
    "DCGAN": "dcgan",
    "GatedPixelCNN": "pixelcnn",
    "TimmBackbone": "timm",
    "TorchvisionBackbone": "torchvision",
}


def __getattr__(name: str) -> Any:
    """Imports a backbone when it is asked for, so that nobody waits for a library that the run does not use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
