"""A backbone goes on from what another run, or somebody else, has learnt: which stages learn, when and how fast."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from visiontasks.contracts import Backbone, UsageError
from visiontasks.layers.freezing import stage_parameters


class Stage(NamedTuple):
    """How one stage of a backbone learns."""

    parameters: tuple[str, ...]  # their names in the backbone
    start: int | None  # the epoch from which they learn; None: never
    rate: float  # their learning rate, that of the head being 1


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """Which stages of a backbone learn, from which epoch on and how fast; the head always learns, at the full rate.

    Stages are the levels of the pyramid, counted from 1, fine to coarse; the stem belongs to the first. A length of
    time is a number of epochs or, below 1, a share of the training.

    Args:
        keep: how many stages remain, the first ones, see layers.freezing.cut_stages; None for all.
        train_from: the first stage that learns; None where none does.
        wait: how long the head learns alone (Kumar et al. 2022, arXiv 2202.10054, where it is the first half).
        every: how long until one stage more learns, from the coarse end (Howard and Ruder 2018, arXiv 1801.06146,
            section 3.3); 0 for all at once.
        decay: the learning rate of a stage over that of the next coarser one, that of the coarsest over the head's
            (section 3.2 there; Clark et al. 2020, arXiv 2003.10555).
    """

    keep: int | None = None
    train_from: int | None = 1
    wait: float = 0
    every: float = 0
    decay: float = 1.0

    @property
    def needs_source(self) -> bool:
        """Whether some stage stays as it was for a while."""
        return self.train_from != 1 or self.wait > 0 or self.every > 0

    def stages(self, backbone: Backbone, *, epochs: int) -> list[Stage]:
        """The stages, fine to coarse; what is frozen already belongs to none.

        Raises:
            UsageError: if train_from is no stage, or a stage would start after the end of the training.
        """
        learning = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
        named = [tuple(name for name in names if name in learning) for names in stage_parameters(backbone)]
        first = len(named) + 1 if self.train_from is None else self.train_from
        if not 1 <= first <= len(named) + (self.train_from is None):
            raise UsageError(f"transfer.train_from={first}, but this backbone has stages 1 to {len(named)}: give one.")
        waits = [_epochs(self.wait, epochs) + _epochs(self.every, epochs) * turn for turn in range(len(named))][::-1]
        if epochs >= 0 and max(waits[first - 1 :], default=0) >= epochs:
            raise UsageError(
                f"Stage {first} would learn from epoch {waits[first - 1] + 1} on and there are {epochs}: type more "
                "trainer.max_epochs, or shares of them, such as transfer.wait=0.2 transfer.every=0.1."
            )
        return [
            Stage(names, waits[index] if index + 1 >= first else None, self.decay ** (len(named) - index))
            for index, names in enumerate(named)
        ]


def freeze_for_good(backbone: Backbone, stages: Sequence[Stage]) -> None:
    """Freezes what will never learn: where a stage never does, also what reaches no stage."""
    if all(stage.start is not None for stage in stages):
        return
    learning = {name for stage in stages if stage.start is not None for name in stage.parameters}
    for name, parameter in backbone.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and name in learning)
    backbone.train(backbone.training)


@dataclass(frozen=True, kw_only=True)
class Auto:
    """Chooses by how much data there is and how like the source's it is, after Karpathy's table (CS231n, Stanford).

    Args:
        similar: whether the images look like those that the source has learnt from; None: unless a run is known to have
            learnt from another data set.
        small: fewer training images than this are little data.
    """

    similar: bool | None = None
    small: int = 5000

    def choose(self, *, images: int, stages: int, other_data: bool) -> tuple[Transfer, str]:
        """The transfer for a number of training images and of stages, and why, in one sentence."""
        little, similar = images < self.small, not other_data if self.similar is None else self.similar
        chosen, what = {
            (True, True): (Transfer(train_from=None), "the backbone stays frozen: it would only overfit"),
            (True, False): (
                Transfer(train_from=stages // 2 + 1),
                f"stages from {stages // 2 + 1} on learn: what the finer ones see is general, the rest is not",
            ),
            (False, True): (Transfer(decay=0.5), "all stages learn, finer ones more slowly: little must change"),
            (False, False): (Transfer(), "all stages learn: there is enough to learn from"),
        }[little, similar]
        size = f"{images:,} training images ({'fewer' if little else 'not fewer'} than {self.small:,})"
        stated = "" if self.similar is not None else ", unless transfer.similar says otherwise"
        return chosen, f"{size}, {'similar to' if similar else 'unlike'} the source's{stated}: {what}"


def _epochs(length: float, epochs: int) -> int:
    if not 0 < length < 1:
        return int(length)
    if epochs < 0:
        raise UsageError(f"{length} is a share of trainer.max_epochs, which is {epochs}: give whole epochs.")
    return max(1, round(length * epochs))
