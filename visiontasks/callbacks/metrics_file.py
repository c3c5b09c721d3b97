"""metrics.csv, which goes on where it ended when a run is resumed."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter


class _GrowingFile(ExperimentWriter):
    """Lightning's writer, which would delete the rows of the run that is resumed."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.is_file():
            self.metrics_keys = read_header(file)


class MetricsFile(CSVLogger):
    """Logs every figure as a row of folder/metrics.csv."""

    def __init__(self, *, folder: str) -> None:
        super().__init__(save_dir=folder, name="", version="")

    @property
    def experiment(self) -> Any:
        if self._experiment is None:
            Path(self.log_dir).mkdir(parents=True, exist_ok=True)
            self._experiment = _GrowingFile(log_dir=self.log_dir)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Does nothing: the run folder's config.yaml says it all."""


def read_header(file: Path) -> list[str]:
    """The names of the figures in a metrics.csv."""
    with file.open(newline="") as lines:
        return next(csv.reader(lines), [])


def read_columns(file: Path) -> dict[str, list[tuple[int, float]]]:
    """Each figure of a metrics.csv as (step, value) pairs."""
    columns: dict[str, list[tuple[int, float]]] = {}
    with file.open(newline="") as lines:
        for row in csv.DictReader(lines):
            for name, value in row.items():
                if value and name != "step":
                    columns.setdefault(name, []).append((int(row["step"]), float(value)))
    return columns
