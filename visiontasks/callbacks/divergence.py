"""Says so when adversarial training goes wrong."""

from typing import Any

from lightning import Callback, Trainer

REMEDY = "try a lower optimizer.lr, head.r1=1, head.diffaugment=[colour,translation] or another head="


class DivergenceWarning(Callback):
    """Warns, once of each kind and again in summary.json, of a generator that makes always the same, and of lost steps.

    diversity is how much generated images vary over how much real ones do, and is looked at from the second validation
    on: in the first epochs pictures are still grey. `trainer.callback_metrics` holds it as val/diversity. left_out is
    the share of steps that were left out because their losses or gradients were not finite.
    """

    def __init__(self, *, diversity: float = 0.3, left_out: float = 0.01) -> None:
        self.diversity = diversity
        self.left_out = left_out
        self.validations = 0
        self.warnings: dict[str, str] = {}  # the sentence of each kind

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        if trainer.sanity_checking:
            return
        self.validations += 1
        value = trainer.callback_metrics.get("val/diversity")
        if value is not None and self.validations > 1 and not bool(value >= self.diversity):
            self._warn(
                trainer,
                "collapse",
                f"the generator's pictures are nearly the same (val/diversity is {value:.3g}, below {self.diversity})",
            )
        lost = module.left_out / max(1, trainer.global_step)
        if lost > self.left_out:
            found = f"{module.left_out} of {trainer.global_step} steps were not finite and were left out"
            self._warn(trainer, "left_out", found)

    def _warn(self, trainer: Trainer, kind: str, found: str) -> None:
        if kind in self.warnings:
            return
        self.warnings[kind] = f"Divergence in epoch {trainer.current_epoch}: {found}; {REMEDY}."
        if trainer.is_global_zero:
            print(f"warning    {self.warnings[kind]}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        return {"warnings": self.warnings, "validations": self.validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.warnings, self.validations = dict(state_dict["warnings"]), state_dict["validations"]
