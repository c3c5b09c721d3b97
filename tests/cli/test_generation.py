"""Generation through the real entry points."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visiontasks.cli import train
from visiontasks.cli.build import load_task
from visiontasks.tasks import Generation

TINY = (
    "task=generation",
    "backbone=resnet20",
    "backbone.depth=8",
    "data.image_size=16",
    "data.train_size=48",
    "data.val_size=12",
    "data.test_size=9",
    "data.batch_size=8",
    "head.generator.width=4",
    "head.generator.latent_dim=8",
    "trainer=cpu",
    "trainer.max_epochs=1",
    "trainer.enable_progress_bar=false",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run of a conditional GAN with spectral norms, trained through the entry point."""
    folder = tmp_path_factory.mktemp("runs") / "generation"
    words = [
        "head=cgan",
        "trainer.accumulate_grad_batches=2",
        "trainer.gradient_clip_val=10",
        f"hydra.run.dir={folder}",
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["train.py", *TINY, *words])
        train.main()
    return folder


def test_a_run_counts_steps_and_leaves_its_figures(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 3
    assert summary["test/diversity"] > 0
    stored = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert stored["global_step"] == 3
    assert len(stored["optimizer_states"]) == len(stored["lr_schedulers"]) == 2
    assert not (run / "predictions.png").exists()


def test_evaluation_rebuilds_the_run(run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    call("evaluate", f"run={run}", "trainer=cpu", f"hydra.run.dir={tmp_path}")
    first, second = (json.loads((folder / "summary.json").read_text()) for folder in (run, tmp_path))
    assert second["test/diversity"] == pytest.approx(first["test/diversity"], rel=1e-3)


def test_a_spectrally_normalised_critic_starts_a_classifier(
    run: Path, call: Callable[..., None], tmp_path: Path
) -> None:
    words = [word for word in TINY if not word.startswith(("task=", "head."))]
    call("train", *words, f"init_from={run}", "transfer=frozen", "test=false", f"hydra.run.dir={tmp_path}")
    receipt = json.loads((tmp_path / "receipt.json").read_text())
    assert (receipt["share"], receipt["missing"]) == (1.0, [])
    critic = load_task(run / "checkpoints" / "best.ckpt")
    assert isinstance(critic, Generation)
    classifier = load_task(tmp_path / "checkpoints" / "last.ckpt")
    arrived = dict(classifier.backbone.named_parameters())
    for name, weight in critic.spectral["backbone"](critic.backbone).items():
        assert torch.allclose(arrived[name], weight, atol=1e-6), name
        assert torch.linalg.svdvals(weight.flatten(1))[0] < 1.2


def test_a_classifier_starts_a_critic(finished_run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    words = [word for word in TINY if word != "backbone.depth=8"]
    call(
        "train", *words, f"init_from={finished_run}", "transfer=last_stages", f"hydra.run.dir={tmp_path}", "test=false"
    )
    source = torch.load(finished_run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    task = load_task(tmp_path / "checkpoints" / "last.ckpt")
    weights = dict(task.backbone.named_parameters())
    first, last = next(iter(weights)), [name for name in weights if name.endswith("conv2.weight")][-1]
    assert torch.equal(weights[first], source[f"backbone.{first}"])
    assert not torch.equal(weights[last], source[f"backbone.{last}"])


def test_generate_writes_pictures_of_each_class_and_a_grid(
    run: Path, call: Callable[..., None], tmp_path: Path
) -> None:
    call(
        "generate", f"run={run}", "n=7", "classes=[3,1]", f"output={tmp_path / 'a'}", "accelerator=cpu", "batch_size=2"
    )
    files = sorted(path.relative_to(tmp_path / "a").as_posix() for path in (tmp_path / "a").rglob("*.png"))
    assert files == [*(f"1/{k:05d}.png" for k in (1, 3, 5)), *(f"3/{k:05d}.png" for k in (0, 2, 4, 6)), "grid.png"]
    assert Image.open(tmp_path / "a" / "grid.png").size == (4 * 18 + 2, 2 * 18 + 2)
    call("generate", f"run={run}", "n=2", "classes=[3,1]", f"output={tmp_path / 'b'}", "accelerator=cpu")
    call("generate", f"run={run}", "n=2", "classes=[3,1]", "seed=1", f"output={tmp_path / 'c'}", "accelerator=cpu")
    first, again, other = (np.asarray(Image.open(tmp_path / at / "3" / "00000.png")).astype(int) for at in "abc")
    assert np.abs(first - again).max() <= 1
    assert np.abs(first - other).max() > 1


def test_a_run_is_resumed_where_it_was(run: Path, call: Callable[..., None], tmp_path: Path) -> None:
    words = [*TINY, "head=wgan_gp", "head.critic_steps=2", "test=false", f"hydra.run.dir={tmp_path}"]
    call("train", *words)
    call("train", f"resume={tmp_path}", "trainer.max_epochs=2")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["epochs"]) == (12, 2)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["head=linear"], "serves task=classification and the task is generation"),
        (["data.digits=[1,3]"], "type head=dcgan (which is told no class) or data.digits=[1,1]"),
        (["find_lr=true"], "type find_lr=false"),
        (["data.image_size=30"], "data.image_size=30 is not 4 to 7 pixels doubled"),
    ],
)
def test_mistakes_are_one_sentence(
    words: list[str], sentence: str, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    own = [word for word in TINY if not (words[0] == "head=linear" and word.startswith("head."))]
    with pytest.raises(SystemExit):
        call("train", *own, *words, f"hydra.run.dir={tmp_path}")
    assert sentence in capsys.readouterr().err


def test_a_classifier_makes_no_pictures(
    finished_run: Path, call: Callable[..., None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        call("generate", f"run={finished_run}", f"output={tmp_path}")
    assert "is a run of Classification: give one of task=generation" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize("head", ["dcgan", "lsgan", "wgan_gp", "sngan", "biggan_small"])
def test_every_head_trains_and_makes_pictures(head: str, call: Callable[..., None], tmp_path: Path) -> None:
    call("train", *TINY, f"head={head}", f"hydra.run.dir={tmp_path / 'run'}")
    assert np.isfinite(json.loads((tmp_path / "run" / "summary.json").read_text())["test/diversity"])
    call("generate", f"run={tmp_path / 'run'}", "n=4", f"output={tmp_path / 'out'}", "accelerator=cpu")
    assert len(list((tmp_path / "out").rglob("0*.png"))) == 4
