"""metrics.csv, which goes on where it ended when a run is resumed."""

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.utilities import rank_zero_only


class _GrowingFile(ExperimentWriter):
    """Lightning's writer, which would delete the rows of a run that is resumed, or killed as a new column comes."""

    def _check_log_dir_exists(self) -> None:
        file = Path(self.metrics_file_path)
        if file.is_file():
            self.metrics_keys = read_header(file)

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        write_rows(Path(self.metrics_file_path), fieldnames, _read(Path(self.metrics_file_path)))


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

    def rows(self) -> int:
        """The number of rows in the file."""
        file = Path(self.experiment.metrics_file_path)
        return sum(1 for _ in _read(file)) if file.is_file() else 0

    @rank_zero_only
    def keep(self, rows: int) -> None:
        """Leaves only the first rows: those of steps that a resumed run will take again are gone."""
        file = Path(self.experiment.metrics_file_path)
        if not file.is_file():
            return
        write_rows(file, read_header(file), _read(file)[:rows])

    def log_hyperparams(self, params: Any = None) -> None:
        """Does nothing: the run folder's config.yaml says it all."""


def _read(file: Path) -> list[dict[str, str]]:
    """The whole rows of a metrics.csv: a process that is killed may leave a part of one."""
    with file.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if None not in row.values() and None not in row]


def write_rows(file: Path, names: list[str], rows: list[dict[str, str]]) -> None:
    """Puts a metrics.csv of these rows in the place of the file."""
    part = file.with_name(f"{file.name}.part")
    with part.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, names)
        writer.writeheader()
        writer.writerows(rows)
    part.replace(file)


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
