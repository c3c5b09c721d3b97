"""What watches a run."""

from visiontasks.callbacks.checkpoints import LastCheckpoint, best_checkpoint, last_checkpoint
from visiontasks.callbacks.collapse import CollapseWarning, ModeCollapseWarning
from visiontasks.callbacks.divergence import DivergenceWarning
from visiontasks.callbacks.embeddings import EmbeddingPictures
from visiontasks.callbacks.metrics_file import MetricsFile
from visiontasks.callbacks.non_finite import NonFinite
from visiontasks.callbacks.optional import early_stopping, ema, progress_bar, swa
from visiontasks.callbacks.pictures import ClassBars, ConfusionMatrix, ContactSheets, LearningCurves, PrecisionRecall
from visiontasks.callbacks.probes import Probes
from visiontasks.callbacks.report import Report
from visiontasks.callbacks.samples import Interpolations, NearestImages, Reconstructions, SampleSheets

__all__ = [
    "ClassBars",
    "CollapseWarning",
    "ConfusionMatrix",
    "ContactSheets",
    "DivergenceWarning",
    "EmbeddingPictures",
    "Interpolations",
    "LastCheckpoint",
    "LearningCurves",
    "MetricsFile",
    "ModeCollapseWarning",
    "NearestImages",
    "NonFinite",
    "PrecisionRecall",
    "Probes",
    "Reconstructions",
    "Report",
    "SampleSheets",
    "best_checkpoint",
    "early_stopping",
    "ema",
    "last_checkpoint",
    "progress_bar",
    "swa",
]
