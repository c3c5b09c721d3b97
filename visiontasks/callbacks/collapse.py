"""Says so when features collapse, or what a generator makes."""

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


class ModeCollapseWarning(Callback):
    """Warns, once and again in summary.json, when samples stay too much alike for `patience` validations in a row.

    One in which they are less alike than ever does not count: at the beginning all are alike, and a generator learns.
    The gauge is their Vendi score over that of the data (visiontasks.tasks.generation_metrics.vendi): on Fashion-MNIST
    0.6 for one of ten classes and 0.4 for eight images again and again.
    """

    def __init__(self, *, vendi: float = 0.5, patience: int = 3) -> None:
        self.limit = vendi
        self.patience = patience
        self.below = 0  # validations in a row
        self.most = 0.0  # of the gauge until now
        self.warnings: dict[str, str] = {}

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        name = f"val/vendi_{module.metrics.prepare().name}"
        value = trainer.callback_metrics.get(name)
        if value is None or trainer.sanity_checking:
            return
        alike = bool(value < self.limit) and float(value) <= self.most
        self.below = self.below + 1 if alike else 0
        self.most = max(self.most, float(value))
        if self.below == self.patience and name not in self.warnings:
            self.warnings[name] = (
                f"Mode collapse in epoch {trainer.current_epoch}: samples are much alike ({name} is {value:.3g}, below "
                f"{self.limit} {self.patience} times in a row); look at samples/, and try a lower optimizer.lr, "
                "head.r1=1 or another head=."
            )
            if trainer.is_global_zero:
                print(f"warning    {self.warnings[name]}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"warnings": self.warnings, "below": self.below, "most": self.most}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warnings = dict(state_dict["warnings"])
        self.below, self.most = int(state_dict["below"]), float(state_dict["most"])
