"""Learning problems, each a LightningModule."""

from visiontasks.tasks.classification import Classification
from visiontasks.tasks.segmentation import Segmentation

__all__ = ["Classification", "Segmentation"]
