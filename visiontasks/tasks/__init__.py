"""Learning problems, each a LightningModule."""

from visiontasks.tasks.classification import Classification

__all__ = ["Classification"]
