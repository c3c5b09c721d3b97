"""Processes that train together agree on what they do before they begin."""

import json
from hashlib import sha256
from typing import Any

from lightning import Callback, LightningModule, Trainer

from visiontasks.contracts import UsageError
from visiontasks.layers.distributed import collected, rank, wait_at_most

_NAMED = 3  # differing keys in a sentence


class Agreement(Callback):
    """Compares the composed config over all processes before a run, and the number of batches before training.

    Raises UsageError, in every process, where they differ.
    """

    def __init__(self, config: dict[str, Any], *, timeout: float) -> None:
        self.flat = flat(config)
        self.timeout = timeout  # seconds that a process waits for the others

    def setup(self, trainer: Trainer, module: LightningModule, stage: str) -> None:  # noqa: ARG002
        """Compares the configs: a digest of each and, where it differs, all keys."""
        wait_at_most(self.timeout)
        digest = sha256(json.dumps(self.flat, sort_keys=True).encode()).hexdigest()
        if len(set(collected(digest))) > 1:
            raise UsageError(difference(collected(self.flat)))

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        """Compares the number of batches of an epoch: a process with fewer would leave the others waiting."""
        counts = collected(trainer.num_training_batches)
        if len(set(counts)) > 1:
            raise UsageError(
                f"The processes have {counts} training batches and need equally many: leave "
                "trainer.use_distributed_sampler=false, or give each process a data loader of the same length."
            )


def flat(config: Any, prefix: str = "") -> dict[str, str]:
    """Every value of nested dicts and lists in writing, by its dotted key."""
    if isinstance(config, dict) and config:
        parts = [flat(value, f"{prefix}.{key}") for key, value in config.items()]
    elif isinstance(config, list) and config:
        parts = [flat(value, f"{prefix}.{at}") for at, value in enumerate(config)]
    else:
        return {prefix.lstrip("."): repr(config)}
    return {key: value for part in parts for key, value in part.items()}


def difference(configs: list[dict[str, str]]) -> str:
    """The sentence that names the first keys in which the processes' configs differ, with two values of each."""
    first, keys = configs[0], sorted(set().union(*configs))
    other = next(at for at, config in enumerate(configs) if config != first)
    differing = [key for key in keys if configs[other].get(key) != first.get(key)]
    named = ", ".join(
        f"{key} ({first.get(key, 'absent')} on rank 0, {configs[other].get(key, 'absent')} on rank {other})"
        for key in differing[:_NAMED]
    )
    more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
    return (
        f"Rank {rank()} does not train: the processes' configs differ in {named}{more}. Give every process the same "
        "command; sweep with hydra/launcher=basic or submitit, not with -m under torchrun."
    )
