"""visiontasks convert, and a training on what it wrote."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import TINY


def test_a_converted_set_trains_as_the_set_itself(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str], finished_run: Path
) -> None:
    data = [word for word in TINY if word.startswith("data.") and "batch_size" not in word]
    place = tmp_path / "chunks"
    call("convert", "data=classification", *data, f"output={place}", "chunk_mb=0.02", "progress=false")
    assert "train      64 samples: 0 files as they are, 64 as PNG, 0 bad" in capsys.readouterr().out
    kept = [word for word in TINY if not word.startswith("data.") or "size" in word.split("=")[0].split(".")[1][-4:]]
    words = [word for word in kept if not word.startswith(("data.train_", "data.val_", "data.test_"))]
    streamed = ["data=streaming", f"data.root={place}", "data.shuffle=full", f"hydra.run.dir={tmp_path / 'run'}"]
    call("train", *words, *streamed)
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (finished_run, tmp_path / "run"))
    for name in ("val/loss", "test/loss", "test/accuracy", "steps"):
        assert first[name] == second[name], name


def test_mistakes_are_one_sentence(
    call: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    for words, said in (
        (["data=classification", f"output={tmp_path}"], "is not empty"),
        (["data=classification", f"output={tmp_path / 'new'}", "keep=[depth]"], "needs depth"),
    ):
        with pytest.raises(SystemExit) as stop:
            call("convert", *words)
        assert stop.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert said in error
    with pytest.raises(SystemExit):
        call("train", "data=streaming", f"data.root={tmp_path / 'none'}", f"hydra.run.dir={tmp_path / 'run'}")
    assert "holds no visiontasks.json" in capsys.readouterr().err
