import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from lightning import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from tests.callbacks.watched import Two, Watched, scenes, trainer_of
from visiontasks.callbacks import EmbeddingPictures, Probes
from visiontasks.contracts import IGNORE, UsageError
from visiontasks.tasks.base import Task
from visiontasks.tasks.metrics import Metrics

ALL = ["val/dense_miou", "val/knn", "val/knn_30", "val/linear"]


def validated(probes: Probes, trainer: Any, module: Watched) -> dict[str, float]:
    """What a validation logs."""
    module.logged = {}
    with torch.inference_mode():
        module.eval()
        probes.on_validation_epoch_start(trainer, module)
        for number, batch in enumerate(trainer.datamodule.val_dataloader()):
            probes.on_validation_batch_end(trainer, module, None, batch, number)
        probes.on_validation_epoch_end(trainer, module)
        module.train()
    return module.logged


def measured(**options: Any) -> dict[str, float]:
    module, data = Watched(), scenes()
    trainer = trainer_of(module, data)
    probes = Probes(neighbours=(5, 30), dense=True, dense_pixels=900, **options)
    probes.setup(trainer, module, "fit")
    probes.on_fit_start(trainer, module)
    return validated(probes, trainer, module)


def pooled(module: Watched, loader: Any) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a loader's images, worked out by hand."""
    batches = list(loader)
    pixels = torch.cat([batch["image"] for batch in batches]).float() / 255
    with torch.no_grad():
        features = module.backbone.eval()((pixels - 0.5) / 0.25)[-1].mean(dim=(2, 3))
    return features.double().numpy(), torch.cat([batch["label"] for batch in batches]).numpy()


def test_figures_of_labels_are_those_worked_out_by_hand() -> None:
    found, module, data = measured(), Watched(), scenes()
    data.select(frozenset(), frozenset({"label"}))
    (bank, labels), (seen, truth) = pooled(module, data.probe_dataloader()), pooled(module, data.val_dataloader())
    assert (len(bank), len(seen)) == (47, 23)
    unit_bank, unit_seen = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (bank, seen))
    for name, k in (("val/knn", 5), ("val/knn_30", 30)):
        right = 0
        for similar, label in zip(unit_seen @ unit_bank.T, truth, strict=True):
            near = np.argsort(-similar)[:k]
            right += int(np.bincount(labels[near], weights=np.exp(similar[near] / 0.07)).argmax() == label)
        assert found[name] == pytest.approx(right / 23), name
    mean, std = bank.mean(axis=0), bank.std(axis=0)
    oracle = LogisticRegression(C=1 / (1e-3 * 47), tol=1e-8, max_iter=5000).fit((bank - mean) / std, labels)
    assert found["val/linear"] == pytest.approx(oracle.score((seen - mean) / std, truth), abs=1e-6)


def test_dense_figure_is_close_to_that_of_scikit_learn_on_every_pixel() -> None:
    module, data = Watched(), scenes(probe_images=61, train_size=61)
    module.wants = frozenset({"mask"})
    trainer = trainer_of(module, data)
    probes = Probes(dense=True, dense_pixels=61 * 256 * 4)
    probes.setup(trainer, module, "fit")
    probes.on_fit_start(trainer, module)
    found = validated(probes, trainer, module)["val/dense_miou"]
    (bank, labels), (seen, truth) = (
        hypercolumns(module, loader) for loader in (data.probe_dataloader(), data.val_dataloader())
    )
    mean, std = bank.mean(axis=0), bank.std(axis=0)
    oracle = LogisticRegression(C=1 / (1e-3 * len(bank)), max_iter=300).fit((bank - mean) / std, labels)
    guess = oracle.predict((seen - mean) / std)
    ious = [
        ((guess == k) & (truth == k)).sum() / ((guess == k) | (truth == k)).sum()
        for k in np.union1d(np.unique(guess), np.unique(truth))
    ]
    assert found == pytest.approx(np.mean(ious), abs=0.03)
    assert found > 0.05


def hypercolumns(module: Watched, loader: Any) -> tuple[np.ndarray, np.ndarray]:
    batches = list(loader)
    pixels = torch.cat([batch["image"] for batch in batches]).float() / 255
    with torch.no_grad():
        levels = module.backbone.eval()((pixels - 0.5) / 0.25)
    maps = torch.cat([nn.functional.interpolate(level, size=(16, 16), mode="bilinear") for level in levels], dim=1)
    masks = torch.cat([batch["mask"] for batch in batches]).flatten()
    return maps.permute(0, 2, 3, 1).flatten(0, 2)[masks != IGNORE].numpy(), masks[masks != IGNORE].numpy()


def one_of_several(rank: int, world: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(measured()))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("world", [3, pytest.param(2, marks=pytest.mark.exhaustive)])
def test_figures_are_the_same_on_any_number_of_processes(tmp_path: Path, world: int) -> None:
    alone = measured()
    assert sorted(alone) == ALL
    mp.spawn(one_of_several, args=(world, str(tmp_path)), nprocs=world)
    for process in range(world):
        assert json.loads((tmp_path / f"{process}.json").read_text()) == pytest.approx(alone, abs=1e-6)


class Counted(Metrics):
    def compute(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"loss": torch.tensor(1.0)}, {}


class Spread(Task):
    """Pushes features apart at random, so that a disturbed random state would change the weights."""

    needs: frozenset[str] = frozenset()
    wants: frozenset[str] = frozenset({"label"})

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(backbone=Two(), classes=(), monitor="val/knn", mode="max")
        self.metrics = Counted()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.backbone.training
        features = self.backbone(self.images(batch))[-1].mean(dim=(2, 3))
        return (features * torch.randn_like(features)).mean() * random.random() * np.random.rand()  # noqa: NPY002

    def evaluation_step(self, batch: Any) -> None:
        assert not self.training


def fitted(folder: Path, *callbacks: Any, **options: Any) -> tuple[Trainer, Spread]:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    module = Spread()
    trainer = Trainer(
        **{"max_epochs": 3, "logger": False, "enable_checkpointing": False} | options,
        accelerator="cpu",
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=scenes())
    return trainer, module


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_watched_is_bit_for_bit_the_one_that_is_not(tmp_path: Path) -> None:
    _, plain = fitted(tmp_path)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    trainer, watched = fitted(tmp_path, Probes(dense=True, neighbours=(5, 30)), EmbeddingPictures(images=20))
    assert set(ALL) <= trainer.callback_metrics.keys()
    for name, value in plain.state_dict().items():
        assert torch.equal(watched.state_dict()[name], value), name
    for (name, expected), found in zip(plain.named_parameters(), watched.parameters(), strict=True):
        assert (expected.grad is None) == (found.grad is None), name
        assert expected.grad is None or torch.equal(expected.grad, found.grad), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]  # noqa: NPY002
    assert {"embedding_map.png", "neighbours.png"} <= {file.name for file in tmp_path.iterdir()}


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_and_early_stopping_see_the_figure_of_the_same_validation(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="val/knn", mode="max", save_top_k=-1, filename="{epoch}")
    stop = EarlyStopping(monitor="val/knn", mode="max", patience=50, check_on_train_epoch_end=False)
    trainer, _ = fitted(tmp_path, Probes(every_n_epochs=2), stop, best, max_epochs=4, enable_checkpointing=True)
    assert len(best.best_k_models) == 4
    assert trainer.callback_metrics["val/knn"] <= stop.best_score


def epochs_measured(probes: Probes, trainer: Any, module: Watched, epochs: range) -> list[int]:
    found = []
    for trainer.current_epoch in epochs:
        found += [trainer.current_epoch] if validated(probes, trainer, module) else []
    return found


def test_every_second_epoch_the_last_and_the_first_after_a_resume_are_measured() -> None:
    module = Watched()
    trainer = trainer_of(module, scenes(), max_epochs=6)
    for epochs, expected in ((range(6), [0, 2, 4, 5]), (range(3, 6), [3, 4, 5])):
        probes = Probes(every_n_epochs=2)
        probes.on_fit_start(trainer, module)
        assert epochs_measured(probes, trainer, module, epochs) == expected
    trainer.sanity_checking = True
    assert validated(probes, trainer, module) == {}


def test_the_untrained_backbone_is_measured_before_the_first_step(capsys: pytest.CaptureFixture[str]) -> None:
    module, rows = Watched(), []
    logger: Any = type("Logger", (), {"log_metrics": lambda _, figures, step: rows.append((figures, step))})()
    trainer = trainer_of(module, scenes(), loggers=[logger])
    probes = Probes()
    probes.on_fit_start(trainer, module)
    probes.on_train_start(trainer, module)
    assert rows == [(pytest.approx(validated(probes, trainer, module)), 0)]
    assert "untrained val/knn" in capsys.readouterr().out
    assert all(part.training for part in module.modules())
    trainer.global_step = 1
    probes.on_train_start(trainer, module)
    Probes(untrained=False).on_train_start(trainer, module)
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("options", "dense", "lines"),
    [
        ({}, False, ["all 47 images of the bank vote where 200 neighbours are asked for"]),
        ({"digits": (1, 3)}, False, ["no val/knn and val/linear: an image of DigitScenes has no label"]),
        ({"digits": (1, 3)}, True, ["no val/knn and val/linear: an image of DigitScenes has no label"]),
        ({"multi_label": True}, False, ["no val/knn and val/linear: an image of DigitScenes has several labels"]),
    ],
)
def test_what_cannot_be_measured_is_said_and_left_out(
    options: dict[str, Any], dense: bool, lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    module = Watched()
    trainer = trainer_of(module, scenes(**options))
    probes = Probes(dense=dense)
    probes.setup(trainer, module, "fit")
    probes.on_fit_start(trainer, module)
    assert capsys.readouterr().out.splitlines() == [f"probes     {line}" for line in lines]
    expected = [] if options else ["val/knn", "val/knn_200", "val/linear"]
    assert sorted(validated(probes, trainer, module)) == [*(["val/dense_miou"] if dense else []), *expected]


def test_masks_that_the_data_do_not_have_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    module, data = Watched(), scenes()
    data.provides = frozenset({"label"})
    trainer = trainer_of(module, data)
    probes = Probes(dense=True, neighbours=(5,))
    probes.setup(trainer, module, "fit")
    probes.on_fit_start(trainer, module)
    assert "no val/dense_miou: an image of DigitScenes has no mask" in capsys.readouterr().out
    assert sorted(validated(probes, trainer, module)) == ["val/knn", "val/linear"]


def test_no_epochs_are_refused() -> None:
    with pytest.raises(UsageError, match="every_n_epochs=0"):
        Probes(every_n_epochs=0)
