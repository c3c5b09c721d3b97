"""Samples and data modules; each name is imported when it is first asked for (PEP 562), with what it needs."""

import os
from importlib import import_module
from typing import TYPE_CHECKING

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # albumentations would ask the network on import

if TYPE_CHECKING:
    from visiontasks.data.camvid import Camvid
    from visiontasks.data.coco_json import CocoJson
    from visiontasks.data.digit_scenes import DigitScenes
    from visiontasks.data.image_folder import ImageFiles, ImageFolder
    from visiontasks.data.images import BadFile
    from visiontasks.data.mask_folder import MaskFolder
    from visiontasks.data.module import DataModule
    from visiontasks.data.penn_fudan import PennFudan
    from visiontasks.data.semantic_sets import ADE20K, Cityscapes, OxfordPet, VocSegmentation
    from visiontasks.data.source import Source
    from visiontasks.data.streaming import Streaming
    from visiontasks.data.torchvision_sets import CIFAR10, CIFAR100, MNIST, FashionMNIST
    from visiontasks.data.voc_xml import VocXml
    from visiontasks.data.yolo_txt import YoloTxt

__all__ = [
    "ADE20K",
    "CIFAR10",
    "CIFAR100",
    "MNIST",
    "BadFile",
    "Camvid",
    "Cityscapes",
    "CocoJson",
    "DataModule",
    "DigitScenes",
    "FashionMNIST",
    "ImageFiles",
    "ImageFolder",
    "MaskFolder",
    "OxfordPet",
    "PennFudan",
    "Source",
    "Streaming",
    "VocSegmentation",
    "VocXml",
    "YoloTxt",
]

_HOMES = {
    "ADE20K": "semantic_sets",
    "BadFile": "images",
    "CIFAR10": "torchvision_sets",
    "CIFAR100": "torchvision_sets",
    "Camvid": "camvid",
    "Cityscapes": "semantic_sets",
    "CocoJson": "coco_json",
    "DataModule": "module",
    "DigitScenes": "digit_scenes",
    "FashionMNIST": "torchvision_sets",
    "ImageFiles": "image_folder",
    "ImageFolder": "image_folder",
    "MNIST": "torchvision_sets",
    "MaskFolder": "mask_folder",
    "OxfordPet": "semantic_sets",
    "PennFudan": "penn_fudan",
    "Source": "source",
    "Streaming": "streaming",
    "VocSegmentation": "semantic_sets",
    "VocXml": "voc_xml",
    "YoloTxt": "yolo_txt",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"visiontasks.data.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
