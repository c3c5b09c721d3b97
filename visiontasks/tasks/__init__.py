"""Learning problems, each a LightningModule."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visiontasks.tasks.classification import Classification
    from visiontasks.tasks.detection import Detection
    from visiontasks.tasks.generation import Generation
    from visiontasks.tasks.likelihood import Likelihood
    from visiontasks.tasks.pretraining import Pretraining
    from visiontasks.tasks.segmentation import Segmentation

__all__ = ["Classification", "Detection", "Generation", "Likelihood", "Pretraining", "Segmentation"]


def __getattr__(name: str) -> Any:
    """Imports a task when it is asked for: none waits for what only another one needs."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{name.lower()}"), name)
