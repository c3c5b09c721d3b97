"""Pretraining under a trainer: each method learns, the teacher follows, weights of views and steps are as promised."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning import LightningDataModule, Trainer
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from tests.tasks.pretraining_parts import SMALL, Tiny, batch, maker
from visiontasks.contracts import UsageError
from visiontasks.tasks import Pretraining
from visiontasks.tasks.pretraining import GAUGED, Gauges, set_weight_decay, side_by_side, statistics_kept


class Data(LightningDataModule):
    """Batches of fixed views, the same each epoch."""

    batch_size = 8
    bad_files: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, batches: int, views: int = 2) -> None:
        super().__init__()
        self.batches = [batch(range(8 * at, 8 * at + 8), views=views) for at in range(batches)]

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        return self.train_dataloader()


def task(name: str = "SimCLR", **options: Any) -> Pretraining:
    torch.manual_seed(0)
    return Pretraining(backbone=Tiny(), head=maker(name), **{"optimizer": fast, "scheduler": still, **options})


def fast(groups: Any, **options: Any) -> AdamW:
    return AdamW(groups, **{"lr": 3e-3, "weight_decay": 0.01, **options})


def still(optimizer: Any, *, total_steps: int) -> dict[str, Any]:
    return {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0), "interval": "step"}


def fit(module: Pretraining, folder: Path, *, batches: int, views: int = 2, **options: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "max_epochs": 1}
    quiet: Any = {"enable_model_summary": False, "limit_val_batches": 0, "accelerator": "cpu"}
    trainer = Trainer(default_root_dir=folder, **(settings | quiet | options))
    trainer.fit(module, datamodule=Data(batches, views))
    return trainer


class Losses(Pretraining):
    """Remembers each training loss."""

    seen: list[float]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.seen = [*getattr(self, "seen", []), loss.item()]
        return loss


@pytest.mark.parametrize("name", SMALL)
def test_thirty_steps_lower_each_loss(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    quick = {key: {"momentum": 0.9} for key in ("MoCo", "MoCoV3", "BYOL")}
    held = {"DINO": {"momentum": 1.0, "centre_momentum": 0.5}}  # else its targets spread out first, and the loss rises
    module = Losses(backbone=Tiny(), head=maker(name, **(quick | held).get(name, {})), optimizer=fast, scheduler=still)
    fit(module, tmp_path, batches=6, max_epochs=5)
    assert len(module.seen) == 30
    assert np.isfinite(module.seen).all()
    assert np.mean(module.seen[-6:]) < np.mean(module.seen[6:12]) - 1e-3  # the first fill MoCo's queue


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_finite_and_everywhere(name: str, tmp_path: Path) -> None:
    module = task(name)
    module._progress = lambda: 0.5  # type: ignore[method-assign]
    module.watch = lambda *_: None  # type: ignore[method-assign]
    module.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    loss = module.training_step(batch(range(8)), 0)
    loss.backward()
    for part, parameter in module.named_parameters():
        if part.startswith("teacher."):
            assert not parameter.requires_grad
        else:
            assert parameter.grad is not None, part
            assert parameter.grad.isfinite().all(), part
            assert parameter.grad.abs().sum() > 0 or part.endswith("bias"), part


@pytest.mark.parametrize("name", ["BYOL", "MoCo"])
def test_the_teacher_moves_only_with_the_optimiser(name: str, tmp_path: Path) -> None:
    """Four batches, two of which are accumulated for each of two steps; against numpy."""
    followed: list[tuple[float, Tensor]] = []

    class Followed(Pretraining):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            super().on_before_optimizer_step(optimizer)
            assert self.teacher is not None
            followed.append((self.trainer.global_step, flat(self.teacher)))

    torch.manual_seed(0)
    module = Followed(backbone=Tiny(), head=maker(name, momentum=0.8, final_momentum=1.0), optimizer=fast)
    students: list[Tensor] = []
    original = module.head.after_step
    module.head.after_step = lambda: (students.append(student(module)), original())  # type: ignore[assignment, method-assign]
    with torch.no_grad():
        module.backbone.stages[0][0].weight.add_(1)  # type: ignore[index, operator, union-attr]
    start = student(module).double().numpy()
    trainer = fit(module, tmp_path, batches=4, accumulate_grad_batches=2)
    assert trainer.global_step == 2
    assert [step for step, _ in followed] == [0, 1]
    expected = start
    for step, (_, before) in enumerate(followed):
        assert np.allclose(before.numpy(), expected, atol=1e-6)
        momentum = 1 - (1 - 0.8) * (math.cos(math.pi * step / 2) + 1) / 2
        expected = momentum * expected + (1 - momentum) * students[step].double().numpy()
    assert module.teacher is not None
    assert np.allclose(flat(module.teacher).numpy(), expected, atol=1e-6)


def flat(module: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def student(module: Pretraining) -> Tensor:
    return torch.cat([flat(module.backbone), flat(module.head.projector)])


@pytest.mark.parametrize("name", ["BYOL", "SimCLR"])
def test_recomputed_activations_change_nothing(name: str, tmp_path: Path) -> None:
    plain, thrifty = (task(name, checkpointing=checkpointing) for checkpointing in (False, True))
    for module in (plain, thrifty):
        fit(module, tmp_path, batches=3)
    kept = thrifty.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.allclose(value, kept[key], atol=1e-6), key
    counter = "backbone.stages.0.1.num_batches_tracked"
    assert kept[counter] == plain.state_dict()[counter] == (6 if name == "BYOL" else 3)


def test_statistics_are_kept_where_asked() -> None:
    norm = nn.BatchNorm1d(3)
    with statistics_kept(norm):
        norm(torch.randn(4, 3))
    assert torch.equal(norm.running_mean, torch.zeros(3))  # type: ignore[arg-type]
    assert norm.num_batches_tracked == 0


def test_the_rate_is_in_proportion_to_the_images_of_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from functools import partial

    module = task(optimizer=partial(SGD, lr=0.3), reference_batch=256)
    trainer = fit(module, tmp_path, batches=4, accumulate_grad_batches=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3 * 16 / 256)
    said = capsys.readouterr().out
    assert "rate       0.01875: optimizer.lr x 16 images a step / 256" in said
    assert "SimCLR compares 8 images with each other, however many" in said
    module = task("BYOL", optimizer=partial(SGD, lr=0.3))
    trainer = fit(module, tmp_path, batches=4, accumulate_grad_batches=2)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.3)
    assert "compares" not in capsys.readouterr().out


def test_a_rate_that_was_found_is_not_scaled(tmp_path: Path) -> None:
    from functools import partial

    module = task(optimizer=partial(SGD, lr=0.3), reference_batch=256)
    module.lr = 0.07
    assert module.learning_rate() == 0.07


def test_weight_decay_moves_along_half_a_cosine() -> None:
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = AdamW([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], weight_decay=0.04)
    for progress, expected in (
        (0.0, 0.04),
        (0.5, 0.22),
        (1.0, 0.4),
        (0.25, 0.4 - 0.36 * (math.cos(math.pi / 4) + 1) / 2),
    ):
        set_weight_decay(optimizer, 0.4, progress)
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(expected)
        assert optimizer.param_groups[1]["weight_decay"] == 0


def test_weight_decay_of_a_run_ends_where_it_should(tmp_path: Path) -> None:
    trainer = fit(task("DINO", final_weight_decay=0.4), tmp_path, batches=8)
    last = 0.4 - (0.4 - 0.01) * (math.cos(math.pi * 7 / 8) + 1) / 2
    assert trainer.optimizers[0].param_groups[0]["weight_decay"] == pytest.approx(last)


def test_lars_does_not_adapt_norms_and_biases() -> None:
    """A step of timm's LARS against the paper's formula."""
    from timm.optim import Lars

    weight, bias = nn.Parameter(torch.full((2, 2), 3.0)), nn.Parameter(torch.full((2,), 3.0))
    optimizer = Lars([{"params": [weight]}, {"params": [bias], "weight_decay": 0.0}], lr=0.3, weight_decay=1e-6)
    weight.grad, bias.grad = torch.full((2, 2), 0.5), torch.full((2,), 0.5)
    optimizer.step()
    trust = 0.001 * 6 / (1 + 1e-6 * 6)
    assert weight[0, 0].item() == pytest.approx(3 - 0.3 * trust * (0.5 + 3e-6), rel=1e-6)
    assert bias[0].item() == pytest.approx(3 - 0.3 * 0.5)


def test_what_a_run_measures_is_over_all_views(tmp_path: Path) -> None:
    module = task()
    module.eval()
    module.evaluation_step(batch(range(8)))
    figures, tables = module.metrics.compute()
    assert set(figures) == {"loss", "feature_std", "effective_rank", "alignment", "uniformity"}
    assert tables == {}
    whole = batch(range(8))
    features = module.features(module.images(whole)).detach().double().numpy()
    view = module.features(module.images({"image": whole["views"][0]})).detach().double().numpy()
    ours, theirs = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (features, view))
    assert figures["alignment"].item() == pytest.approx(((ours - theirs) ** 2).sum(1).mean(), rel=1e-4)
    outputs = [module.head(module.backbone(module.images({"image": each}))).detach() for each in whole["views"]]
    assert figures["loss"].item() == pytest.approx(module.head.loss(outputs, None).item(), rel=1e-5)


def test_gauges_look_at_the_first_images_and_forget() -> None:
    gauges = Gauges(("guess",))
    rows = torch.randn(4, 3)
    gauges.gauge(rows, rows, torch.tensor([0, GAUGED - 1, GAUGED, GAUGED + 5]))
    assert [len(part) for part in gauges.rows] == [2]
    gauges.update(torch.tensor(2.0), torch.tensor([[3.0, 4.0]]), 4)
    gauges.update(torch.tensor(5.0), torch.tensor([[0.0, 2.0]]), 2)
    figures, _ = gauges.compute()
    assert figures["loss"].item() == 3
    assert figures["guess"].item() == 0.5
    gauges.reset()
    gauges.update(torch.tensor(2.0), torch.tensor([[3.0, 4.0]]), 4)
    assert set(gauges.compute()[0]) == {"loss", "guess"}


def test_one_image_has_no_loss_but_features() -> None:
    module = task("BarlowTwins").eval()
    assert module.evaluation_step(batch(range(1))).shape == (1, 8)


def test_views_are_drawn_side_by_side() -> None:
    small, large = np.zeros((2, 3, 3), np.uint8), np.full((4, 5, 3), 9, np.uint8)
    sheet = side_by_side([small, large])
    assert sheet.shape == (4, 10, 3)
    assert (sheet[:2, :3] == 0).all()
    assert (sheet[2:, :5] == 255).all()
    assert (sheet[:, 5:] == 9).all()


def test_embeddings_are_lines_and_a_file(tmp_path: Path) -> None:
    module = task().eval()
    raw = module.predict_step(batch(range(3)), 0)
    lines = module.predictions(raw)
    module.finish([lines[0], {"error": "bad"}, lines[2]], tmp_path)
    stored = np.load(tmp_path / "embeddings.npy")
    assert stored.dtype == np.float32
    assert np.allclose(stored, raw.detach()[[0, 2]].numpy(), atol=1e-5)


def test_images_without_views_are_refused() -> None:
    module = task()
    with pytest.raises(UsageError, match=r"makes 0: type augment=simclr"):
        module._views({"image": torch.zeros(1, 3, 8, 8)})
