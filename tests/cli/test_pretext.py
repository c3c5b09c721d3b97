"""The classic pretexts through the real entry points."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cli.test_pretraining import TINY

HEADS = {
    "rotation": ["head.every=false", "trainer.accumulate_grad_batches=2"],
    "jigsaw": ["head.permutations=9", "head.hidden=32", "task.checkpointing=true"],
    "colorization": ["head.width=16", "head.prior_images=16"],
    "inpainting": ["head.width=16", "head.blocks=centre", "head.side=0.5"],
}


def test_a_run_learns_by_a_pretext_and_shows_it(call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, "head=rotation", f"hydra.run.dir={tmp_path / 'run'}")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test/pretext_accuracy"] * 4 * 9 == pytest.approx(round(summary["test/pretext_accuracy"] * 4 * 9))
    assert Image.open(tmp_path / "run" / "predictions.png").size[0] > 300
    words = [word for word in TINY if word != "task=pretraining"]
    call("train", *words, f"init_from={tmp_path / 'run'}", "test=false", f"hydra.run.dir={tmp_path / 'next'}")
    receipt = json.loads((tmp_path / "next" / "receipt.json").read_text())
    assert (receipt["share"], receipt["missing"]) == (1.0, [])


def test_images_that_are_too_small_for_a_puzzle(call: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        call("train", *TINY, "head=jigsaw", "head.permutations=9", "head.hidden=32", "backbone=resnet18", "watch=none")
    assert "data.image_size=128 or more" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", HEADS)
def test_every_pretext_runs_resumes_and_is_evaluated(head: str, call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, f"head={head}", *HEADS[head], f"hydra.run.dir={tmp_path}", "data.test_size=12")
    call("train", f"resume={tmp_path}", "trainer.max_epochs=2")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["epochs"] == 2
    assert np.isfinite(summary["test/loss"])
    assert summary["test/feature_std"] > 0
    assert ("test/pretext_accuracy" in summary) == (head in {"rotation", "jigsaw"})
    call("evaluate", f"run={tmp_path}", "trainer=cpu", f"hydra.run.dir={tmp_path / 'again'}")
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert again["test/loss"] == pytest.approx(summary["test/loss"], rel=1e-3)
    if head == "colorization":
        stored = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        assert stored["head.seen"] == 16
        assert stored["head.prior"].sum() > 0
