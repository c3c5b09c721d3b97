"""What watches a run."""

from visiontasks.callbacks.checkpoints import best_checkpoint, last_checkpoint
from visiontasks.callbacks.metrics_file import MetricsFile
from visiontasks.callbacks.optional import batch_size_finder, early_stopping, ema, learning_rate_finder, swa
from visiontasks.callbacks.pictures import ConfusionMatrix, ContactSheets, LearningCurves
from visiontasks.callbacks.report import Report

__all__ = [
    "ConfusionMatrix",
    "ContactSheets",
    "LearningCurves",
    "MetricsFile",
    "Report",
    "batch_size_finder",
    "best_checkpoint",
    "early_stopping",
    "ema",
    "last_checkpoint",
    "learning_rate_finder",
    "swa",
]
