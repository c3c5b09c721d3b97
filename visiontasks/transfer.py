"""Start a backbone from what another run, or somebody else, has learnt."""

from visiontasks.contracts import Backbone
from visiontasks.weights import Receipt, load_backbone


def init_backbone(backbone: Backbone, source: str) -> Receipt:
    """Loads the backbone of a run folder, a checkpoint or a weights file into this one, strictly.

    Raises:
        UsageError: if the source cannot be read, or does not fit the backbone tensor by tensor.
    """
    return load_backbone(backbone, source)
