import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from visiontasks.cli import convert, doctor, evaluate, generate, predict, train

TINY = (
    "backbone=resnet20",
    "data.image_size=32",
    "data.train_size=64",
    "data.val_size=24",
    "data.test_size=21",
    "data.batch_size=16",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
)
MAINS = {
    "convert": convert.main,
    "doctor": doctor.main,
    "train": train.main,
    "evaluate": evaluate.main,
    "generate": generate.main,
    "predict": predict.main,
}


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Calls an entry point in this process with command-line arguments."""

    def run(script: str, *arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
        MAINS[script]()

    return run


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run, trained for one epoch through the entry point."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *TINY, f"hydra.run.dir={folder}"])
        train.main()
    return folder
