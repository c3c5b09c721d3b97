"""Says so when features collapse."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

FIGURES = {
    "val/feature_std": "the features of different images are nearly the same",
    "val/effective_rank": "the features lie in hardly any directions",
}


class CollapseWarning(Callback):
    """Warns, once for each gauge and again in summary.json, when a validation finds the features collapsed.

    The gauges are those of the backbone's pooled features (visiontasks.tasks.collapse). feature_std is 1 for features
    in all directions and 0 for a point; behind a ReLU features are never negative and stay below 1. Batch norms keep a
    backbone's features apart where embeddings have long become one point: a ResNet-20 on digits then stood at 0.115,
    under SimCLR at 0.27, so that the limit lies between. effective_rank counts directions: 1 is a line, and fewer
    than 2 tell no classes apart; it fell by a quarter only, from 14 to 11, in the same collapse.
    """

    def __init__(self, *, feature_std: float = 0.15, effective_rank: float = 2.0) -> None:
        self.limits = {"val/feature_std": feature_std, "val/effective_rank": effective_rank}
        self.warnings: dict[str, str] = {}  # the sentence for each gauge

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        for name, limit in self.limits.items():
            value = trainer.callback_metrics.get(name)
            if value is None or bool(value >= limit) or name in self.warnings or trainer.sanity_checking:
                continue
            self.warnings[name] = (
                f"Collapse in epoch {trainer.current_epoch}: {FIGURES[name]} ({name} is {value:.3g}, below {limit}); "
                "try a lower optimizer.lr, a larger data.batch_size or another head=."
            )
            if trainer.is_global_zero:
                print(f"warning    {self.warnings[name]}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"warnings": self.warnings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warnings = dict(state_dict["warnings"])
