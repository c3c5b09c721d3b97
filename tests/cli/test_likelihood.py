"""Densities through the real entry points."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from visiontasks.cli import train
from visiontasks.cli.build import load_task
from visiontasks.tasks import Likelihood

TINY = (
    *("task=generation", "data.image_size=16", "data.train_size=32", "data.val_size=12", "data.test_size=8"),
    *("data.batch_size=8", "task.measured=8", "trainer=cpu", "trainer.max_epochs=1"),
    *("trainer.enable_progress_bar=false", "callbacks.nearest.compared=4", "callbacks.nearest.samples=2"),
)
HEADS = {
    "vae": ("backbone=resnet20", "backbone.depth=8", "head.generator.width=4", "head.generator.latent_dim=8"),
    "conditional_pixelcnn": (
        *("head.values=8", "head.hidden=12", "head.depth=1", "backbone.width=6", "backbone.depth=1"),
        "callbacks.samples.columns=1",
    ),
}


@pytest.fixture(scope="module", params=HEADS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A head, and the folder of a tiny run of it."""
    folder = tmp_path_factory.mktemp("runs") / request.param
    with pytest.MonkeyPatch.context() as patch:
        words = [f"head={request.param}", *HEADS[request.param], f"hydra.run.dir={folder}"]
        patch.setattr("sys.argv", ["train.py", *TINY, *words])
        train.main()
    return request.param, folder


def test_a_run_leaves_its_figures_and_pictures(run: tuple[str, Path]) -> None:
    head, folder = run
    summary = json.loads((folder / "summary.json").read_text())
    assert 0 < summary["test/bits_per_dim"] < 20
    assert ("test/elbo" in summary) == (head == "vae")
    assert summary["likelihood"].startswith("lower bound" if head == "vae" else "exact")
    assert (folder / "reconstructions.png").exists() == (head == "vae")
    assert (folder / "samples" / "epoch_000.png").exists()
    assert isinstance(load_task(folder / "checkpoints" / "best.ckpt"), Likelihood)


def test_pictures_are_made_from_a_run(run: tuple[str, Path], call: Callable[..., None], tmp_path: Path) -> None:
    call("generate", f"run={run[1]}", "n=3", f"output={tmp_path}")
    files = sorted(tmp_path.rglob("*.png"))
    assert len(files) == 4  # and the grid
    with Image.open(files[0]) as picture:
        assert picture.size == (16, 16)


def test_evaluation_rebuilds_the_run(run: tuple[str, Path], call: Callable[..., None], tmp_path: Path) -> None:
    call("evaluate", f"run={run[1]}", "trainer=cpu", f"hydra.run.dir={tmp_path}")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run[1], tmp_path))
    assert second["test/bits_per_dim"] == pytest.approx(first["test/bits_per_dim"], rel=1e-2)


def test_an_encoder_starts_a_classifier(run: tuple[str, Path], call: Callable[..., None], tmp_path: Path) -> None:
    if run[0] != "vae":
        pytest.skip("a PixelCNN's layers are its own")
    words = [word for word in TINY if not word.startswith(("task", "callbacks.nearest"))]
    call("train", *words, *HEADS["vae"][:2], f"init_from={run[1]}", "test=false", f"hydra.run.dir={tmp_path}")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["share"], receipt["missing"]) == (1.0, [])
