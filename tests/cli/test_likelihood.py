"""Densities through the real entry points."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from visiontasks.cli import train
from visiontasks.cli.build import load_task
from visiontasks.tasks import Likelihood

DATA = ("data.train_size=24", "data.val_size=9", "data.test_size=5", "data.batch_size=8")
TRAINER = ("trainer=cpu", "trainer.max_epochs=1", "trainer.enable_progress_bar=false")
NETWORK = ("backbone=resnet20", "backbone.depth=8", "data.image_size=16", *DATA, *TRAINER)
VAE = ("task=generation", "head=vae", "head.generator.width=4", "head.generator.latent_dim=8", *NETWORK)
PIXELS = (
    *("task=generation", "head=conditional_pixelcnn", "head.depth=1", "head.hidden=6", "head.values=4"),
    *("backbone.depth=1", "backbone.width=6", "data.image_size=8", "task.measured=4", *DATA, *TRAINER),
)


def trained(folder: Path, *words: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *words, f"hydra.run.dir={folder}"])
        train.main()
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "vae", *VAE)


@pytest.fixture(scope="module")
def pixels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("runs") / "pixelcnn", *PIXELS)


def test_a_vae_leaves_its_figures_and_what_comes_back_of_images(vae: Path) -> None:
    summary = json.loads((vae / "summary.json").read_text())
    assert summary["best/val/bits_per_dim"] == summary["val/bits_per_dim"] == pytest.approx(summary["val/loss"])
    assert -summary["val/elbo"] == pytest.approx(summary["val/reconstruction"] + summary["val/divergence"], rel=1e-5)
    assert summary["likelihood"].startswith("lower bound")
    made = {path.name for path in vae.iterdir()}
    assert {"reconstructions.png", "interpolations.png", "nearest.png", "samples.gif", "surprising.png"} <= made
    assert isinstance(load_task(vae / "checkpoints" / "best.ckpt"), Likelihood)


def test_a_pixelcnn_draws_what_it_can_and_makes_pictures_of_classes(
    pixels: Path, call: Callable[..., None], tmp_path: Path
) -> None:
    summary = json.loads((pixels / "summary.json").read_text())
    assert summary["val/log_likelihood"] == pytest.approx(-summary["val/bits_per_dim"] * 192 * 0.693147, rel=1e-4)
    assert (summary["likelihood"], summary["values_of_a_pixel"]) == ("exact", 4)
    made = {path.name for path in pixels.iterdir()}
    assert {"nearest.png", "samples.gif", "surprising.png"} <= made
    assert not {"reconstructions.png", "interpolations.png"} & made
    call("generate", f"run={pixels}", "n=2", "classes=[3,1]", f"output={tmp_path}", "accelerator=cpu")
    assert set(Image.open(tmp_path / "3" / "00000.png").tobytes()) <= {0, 85, 170, 255}


def test_an_encoder_starts_a_classifier_and_a_classifier_an_encoder(
    vae: Path, call: Callable[..., None], tmp_path: Path
) -> None:
    call("train", *NETWORK, f"init_from={vae}", "transfer=frozen", "test=false", f"hydra.run.dir={tmp_path / 'a'}")
    call(
        "train", *VAE, f"init_from={tmp_path / 'a'}", "transfer=frozen", "test=false", f"hydra.run.dir={tmp_path / 'b'}"
    )
    stored = torch.load(vae / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    for place in "ab":
        receipt = json.loads((tmp_path / place / "receipt.json").read_text())
        assert (receipt["share"], receipt["missing"]) == (1.0, [])
        task = load_task(tmp_path / place / "checkpoints" / "last.ckpt")
        for name, weight in task.backbone.named_parameters():
            assert torch.equal(weight, stored[f"backbone.{name}"]), name


@pytest.mark.parametrize("name", ["vae", "pixels"])
def test_runs_draw_pictures_are_rebuilt_and_make_pictures(
    name: str, request: pytest.FixtureRequest, call: Callable[..., None], tmp_path: Path
) -> None:
    run: Path = request.getfixturevalue(name)
    assert (run / "samples" / "epoch_000.png").exists()
    call("evaluate", f"run={run}", "trainer=cpu", f"hydra.run.dir={tmp_path / 'evaluated'}")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path / "evaluated"))
    assert 0 < first["test/bits_per_dim"] < 20
    assert second["test/bits_per_dim"] == pytest.approx(first["test/bits_per_dim"], rel=1e-2)
    call("generate", f"run={run}", "n=3", f"output={tmp_path / 'made'}", "accelerator=cpu")
    files = sorted((tmp_path / "made").rglob("*.png"))
    assert len(files) == 4  # and the grid
    with Image.open(files[0]) as picture:
        assert picture.size == ((16, 16) if name == "vae" else (8, 8))


@pytest.mark.exhaustive
def test_a_rate_is_found_and_a_run_is_resumed_where_it_was(call: Callable[..., None], tmp_path: Path) -> None:
    words = [word for word in VAE if not word.startswith(("trainer.max_epochs", "data.train_size"))]
    quick = ("watch=none", "test=false", f"hydra.run.dir={tmp_path}")
    call("train", *words, *quick, "data.train_size=880", "trainer.max_epochs=1", "find_lr=true")
    call("train", f"resume={tmp_path}", "trainer.max_epochs=2", "trainer.accumulate_grad_batches=2")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (165, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((*VAE, "task.generator_lr=1e-4"), "task.generator_lr=0.0001 is of a game, and this head has one optimiser"),
        ((*VAE, "task.ema=0.999"), "type callbacks.ema.decay=0.999, of all weights"),
        ((*VAE, "head.beta=-1"), "head.beta=-1 is no weight of the divergence"),
        ((*VAE, "data.image_size=30"), "data.image_size=30 is not 4 to 7 pixels doubled"),
        (("head=vae", *NETWORK), "serves task=generation and the task is classification"),
        (
            ("task=generation", "head=pixelcnn", *NETWORK),
            "PixelCNN learns each pixel from those before it, and CifarResNet sees them all: leave out backbone=",
        ),
        ((*PIXELS, "data.digits=[1,3]"), "The task needs label"),
    ],
)
def test_mistakes_are_one_sentence(
    words: tuple[str, ...], sentence: str, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call("train", *words, f"hydra.run.dir={tmp_path}")
    assert sentence in capsys.readouterr().err
