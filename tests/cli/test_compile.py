"""compile=true through the real entry points: a compiled network trains, is stored, and answers without a compiler."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.cli import test_detection, test_segmentation
from tests.cli.conftest import TINY

TASKS = {"classification": TINY, "segmentation": test_segmentation.TINY, "detection": test_detection.TINY}


@pytest.mark.exhaustive
@pytest.mark.parametrize("task", TASKS)
def test_a_compiled_network_trains_and_answers(call: Callable[..., None], tmp_path: Path, task: str) -> None:
    run = tmp_path / "run"
    call("train", *TASKS[task], "compile=true", "trainer.precision=32", f"hydra.run.dir={run}")
    call("evaluate", f"run={run}", "trainer=cpu", "trainer.precision=32", f"hydra.run.dir={tmp_path / 'again'}")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path / "again"))
    figures = [name for name in first if name.startswith("test/")]
    assert figures
    assert {name: second[name] for name in figures} == pytest.approx({name: first[name] for name in figures}, abs=1e-3)
    Image.new("RGB", (70, 50), "orange").save(tmp_path / "photo.png")
    call("predict", f"run={run}", f"input={tmp_path / 'photo.png'}", f"output={tmp_path / 'out'}", "accelerator=cpu")
    (line,) = (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()
    assert "error" not in json.loads(line)
