"""What a run says of itself: a few lines before it starts, summary.json and a table when it ends."""

import json
import math
import platform
import resource
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from visiontasks.layers.distributed import collected, world_size

PACKAGES = ("visiontasks", "torch", "torchvision", "lightning", "hydra-core", "albumentations", "torchmetrics", "timm")
HEADLINES = 12  # rows of the table of results


class Report(Callback):
    """Introduces the run, times it, and keeps what summary.json holds."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.first_step: float | None = None
        self.training_seconds = 0.0
        self.images = 0
        self._resumed_at = 0.0
        self._named: set[str] = set()

    def state_dict(self) -> dict[str, Any]:
        seconds = time.perf_counter() - self.started
        return {"seconds": seconds, "training_seconds": self.training_seconds, "images": self.images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.started = time.perf_counter() - state_dict["seconds"]
        self.training_seconds, self.images = state_dict["training_seconds"], state_dict["images"]

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            lines = [*introduction(trainer, module), *(f"repaired   {line}" for line in repaired(trainer))]
            print("\n".join(lines), flush=True)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self._resumed_at = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self._resumed_at = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: Trainer,  # noqa: ARG002
        module: LightningModule,  # noqa: ARG002
        outputs: Any,  # noqa: ARG002
        batch: dict[str, Any],
        batch_idx: int,  # noqa: ARG002
    ) -> None:
        self.images += len(batch["index"])
        if self.first_step is None:
            self.first_step = time.time()

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self.training_seconds += time.perf_counter() - self._resumed_at

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self._resumed_at = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:  # noqa: ARG002
        self._name_bad_files(trainer)

    def teardown(self, trainer: Trainer, module: LightningModule, stage: str) -> None:  # noqa: ARG002
        self._name_bad_files(trainer)

    def _name_bad_files(self, trainer: Trainer) -> None:
        """Names the files that turned out bad since the last time."""
        bad = bad_files(trainer)
        for name in sorted(bad.keys() - self._named):
            if trainer.is_global_zero:
                print(f"bad file   {name}: {bad[name]}", flush=True)
        self._named |= bad.keys()

    def summary(self, trainer: Trainer, module: Any, metrics: dict[str, float]) -> dict[str, Any]:
        """The figures by name, and what the run cost: seconds, images a second over all processes, gigabytes."""
        return metrics | {
            **per_class(module),
            **module.metrics.facts(),
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
            "seconds": round(time.perf_counter() - self.started, 1),
            **(self._training(trainer) if trainer.global_step else {}),
            "peak_memory_gb": peak_memory(),
            "device": device_name(trainer),
            "precision": str(trainer.precision),
            "processes": world_size(),
            "bad_files": bad_files(trainer),
            "repaired": repaired(trainer),
            "warnings": warnings(trainer),
            "versions": {name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        }

    def _training(self, trainer: Trainer) -> dict[str, Any]:
        return {
            "epochs": trainer.current_epoch,
            "steps": trainer.global_step,
            "first_step_at": self.first_step,
            "images_per_second": round(self.images * world_size() / max(self.training_seconds, 1e-9), 1),
        }


def per_class(module: Any) -> dict[str, dict[str, float | None]]:
    """The last evaluation's figures by class name; null where a class does not occur."""
    tables = {name: values.tolist() for name, values in module.tables.items() if name.startswith("per_class_")}
    return {name: dict(zip(module.classes, map(_plain, row), strict=True)) for name, row in tables.items()}


def bad_files(trainer: Trainer) -> dict[str, str]:
    """The files that could not be read so far, with the reason, of all processes."""
    own: dict[str, str] = getattr(trainer, "datamodule").bad_files  # noqa: B009
    return {name: reason for part in collected(own) for name, reason in part.items()}


def repaired(trainer: Trainer) -> list[str]:
    """What the data module mended in the annotations before training, one line each."""
    return list(getattr(getattr(trainer, "datamodule"), "repaired", ()))  # noqa: B009


def warnings(trainer: Trainer) -> list[str]:
    """The sentences of the callbacks that warn, such as of a collapse."""
    callbacks: list[Any] = getattr(trainer, "callbacks")  # noqa: B009
    return [line for callback in callbacks for line in getattr(callback, "warnings", {}).values()]


def introduction(trainer: Trainer, module: Any) -> list[str]:
    """The lines that matter before training: data, classes, network, batch, device."""
    data: Any = getattr(trainer, "datamodule")  # noqa: B009
    sizes = ", ".join(f"{size:,} {split}" for split, size in data.sizes().items())
    share = getattr(data, "fraction", 1.0)
    repeated = f"; {share:.0%} of the training images, repeated" if share < 1 else ""
    classes = ", ".join(module.classes[:10]) + (", ..." if len(module.classes) > 10 else "")
    parameters = sum(parameter.numel() for parameter in module.parameters())
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    accumulated = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
    batch = f"{data.batch_size * world_size() * accumulated}"
    parts = f"{data.batch_size} x {world_size()} processes x {accumulated} accumulated"
    return [
        f"data       {type(data).__name__}: {sizes}{repeated}",
        *(f"           from {line}" for line in data.origins()),
        f"classes    {len(module.classes)}: {classes}",
        f"network    {network_name(module)}, {parameters / 1e6:.2f} M parameters, {trained / 1e6:.2f} M trained",
        f"batch      {batch} ({parts})",
        f"device     {device_name(trainer)}, precision {trainer.precision}",
        f"run        {trainer.default_root_dir}",
    ]


def network_name(module: Any) -> str:
    """The backbone, by its own name where it has one, and the head."""
    backbone = getattr(module.backbone, "name", type(module.backbone).__name__)
    return f"{backbone} + {type(module.head).__name__}" if hasattr(module, "head") else str(backbone)


def device_name(trainer: Trainer) -> str:
    """The kind and number of devices, such as 'cpu' or '2 x NVIDIA H200'."""
    if trainer.strategy.root_device.type == "cuda":
        name = torch.cuda.get_device_name(trainer.strategy.root_device)
        return f"{world_size()} x {name}" if world_size() > 1 else name
    return trainer.strategy.root_device.type


def peak_memory() -> float:
    """The most memory, in gigabytes, that this process has held, on the host or, where there is one, on its GPU."""
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return round(max(host, device) / 1e9, 3)


def table(metrics: dict[str, float]) -> str:
    """The figures, named split/figure, as aligned lines with a column for each split, test first."""
    splits = sorted({name.partition("/")[0] for name in metrics})
    names = sorted({name.partition("/")[2] for name in metrics})
    rows = [[name, *(_cell(metrics.get(f"{split}/{name}")) for split in splits)] for name in names]
    width = max(map(len, names))
    lines = [["", *(f"{split}/" for split in splits)], *rows]
    column = max(10, *(len(cell) + 2 for _, *cells in lines for cell in cells))
    return "\n".join(f"  {name:<{width}}" + "".join(f"{cell:>{column}}" for cell in cells) for name, *cells in lines)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def write_summary(folder: Path, summary: dict[str, Any]) -> None:
    """Writes summary.json; figures that are not finite become null."""
    plain = {key: _plain(value) if isinstance(value, float) else value for key, value in summary.items()}
    (folder / "summary.json").write_text(json.dumps(plain, indent=2) + "\n")


def _plain(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None
