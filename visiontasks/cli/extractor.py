"""From a word to the network in whose features generated images are compared with real ones."""

import re
from pathlib import Path

from hydra.utils import get_class

from visiontasks.cli.build import LIBRARIES, find_checkpoint, load_task
from visiontasks.contracts import UsageError
from visiontasks.data.module import conf_name
from visiontasks.tasks.extractors import Extractor, Inception, RandomFeatures, TaskFeatures, published_features


def extractor(named: str) -> Extractor:
    """The network in whose features images are compared: random, inception[:FILE], torchvision:NAME[:FILE] or a run.

    A library's NAME without a FILE has its published weights. Raises UsageError where it cannot be had.
    """
    kind, _, rest = named.partition(":")
    if named == RandomFeatures.name:
        return RandomFeatures()
    if kind == Inception.name:
        return Inception(rest or None)
    if kind not in LIBRARIES and not Path(named).expanduser().exists():
        raise UsageError(
            f"task.extractor={named} is no run of ours and no network: type the folder of a run, random, inception, "
            "torchvision:NAME or timm:NAME."
        )
    if kind not in LIBRARIES:
        return _run_features(named)
    name, _, file = rest.partition(":")
    backbone = get_class(LIBRARIES[kind])(name=name, weights=file or "imagenet")
    learnt = Path(file).stem if file else "imagenet"
    return published_features(backbone, name=f"{_word(name)}_{_word(learnt)}", source=named)


def _run_features(path: str) -> Extractor:
    """The backbone of a run, and its classifier where it has one, named after the backbone and its data."""
    checkpoint = find_checkpoint(path)
    task = load_task(checkpoint)
    data = task.config["data"]
    size = data["image_size"]
    backbone = getattr(task.backbone, "name", type(task.backbone).__name__)
    name = f"{_word(backbone)}_{conf_name(data['_target_'].rpartition('.')[2])}"
    return TaskFeatures(task, name=name, source=path, size=(size, size) if isinstance(size, int) else tuple(size))


def _word(name: str) -> str:
    """A name without what has a meaning in the names of figures and files."""
    return re.sub(r"\W+", "_", name).lower()
