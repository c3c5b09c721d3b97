"""A step that is not finite leaves no trace, is named, and ends a run that has too many; on one process and on two."""

import json
import math
from collections.abc import Callable
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader

from tests.callbacks.watched import Two
from tests.tasks.generation_parts import fit as fit_generation
from tests.tasks.generation_parts import images as pictures
from tests.tasks.generation_parts import made as generating
from tests.tasks.pretraining_parts import Tiny, maker
from tests.tasks.pretraining_parts import batch as views_of
from visiontasks.callbacks import NonFinite, ema
from visiontasks.contracts import Batch, UsageError
from visiontasks.data import DigitScenes
from visiontasks.layers.finite import gradients_finite
from visiontasks.tasks import Classification, Pretraining
from visiontasks.tasks.optimisation import constant

State = dict[str, Tensor]
BAD = 3  # the batch of an epoch that is poisoned, where it is one
OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "fused AdamW": lambda groups: AdamW(groups, lr=1e-2, weight_decay=0.1, fused=True),
    "AdamW": lambda groups: AdamW(groups, lr=1e-2, weight_decay=0.1, foreach=True),
    "fused SGD": lambda groups: SGD(groups, lr=1e-2, momentum=0.9, weight_decay=0.1, fused=True),
}


class Poisoned(Classification):
    """Meets something that is not finite in some batches, the way that `kind` says."""

    kind = ""
    value = math.nan
    bad: frozenset[int] = frozenset({BAD})
    ranks: frozenset[int] = frozenset({0})

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.spoil = batch_idx in self.bad and self.global_rank in self.ranks
        if self.spoil and self.kind == "input":
            batch = batch | {"image": batch["image"].float().index_fill(0, torch.tensor([0]), self.value)}
        loss = super().training_step(batch, batch_idx)
        if self.spoil and self.kind == "loss":
            return loss * self.value
        if self.spoil and self.kind == "loss without gradient":
            return loss * 0 + torch.tensor(self.value)
        return loss

    def on_after_backward(self) -> None:
        if self.spoil and self.kind == "gradient":
            next(self.backbone.parameters()).grad.view(-1)[1] = self.value  # type: ignore[union-attr]


class Journal(Callback):
    """The whole state after each step of the optimiser, and before the first."""

    def __init__(self) -> None:
        self.states: list[State] = []

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.states.append(state_of(trainer, module))

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *rest: Any) -> None:
        self.states.append(state_of(trainer, module))


def state_of(trainer: Trainer, module: LightningModule) -> State:
    moments = trainer.optimizers[0].state_dict()["state"]
    average = next((c._average_model for c in trainer.callbacks if hasattr(c, "_average_model")), nn.Module())
    state = {f"net.{name}": value for name, value in module.state_dict().items()}
    state |= {f"ema.{name}": value for name, value in average.state_dict().items()}
    state |= {f"{key}.{name}": value for key, moment in moments.items() for name, value in moment.items()}
    return {name: torch.as_tensor(value).clone() for name, value in state.items()}


def train(
    folder: Path, *, kind: str, value: float = math.nan, optimizer: str = "AdamW", **options: Any
) -> tuple[list[State], NonFinite, Poisoned]:
    torch.manual_seed(0)
    data = DigitScenes(image_size=16, train_size=24, val_size=2, test_size=1, batch_size=4, digits=(1, 1))
    data.setup()
    task = Poisoned(backbone=Two(), classes=data.classes, optimizer=OPTIMIZERS[optimizer], scheduler=constant)
    task.kind, task.value = kind, value
    task.bad, task.ranks = options.pop("bad", task.bad), options.pop("ranks", task.ranks)
    journal, watch = Journal(), NonFinite(stop_after=options.pop("stop_after", 10))
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(
        **quiet | {"accelerator": "cpu", "max_epochs": 1, "default_root_dir": folder, "precision": "32-true"} | options,
        callbacks=[watch, ema(decay=0.9), journal],  # type: ignore[list-item]
        use_distributed_sampler=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    trainer.fit(task, datamodule=data)
    return journal.states, watch, task


def same(first: State, second: State) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def finite(state: State) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "non_finite.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["loss", "loss without gradient", "gradient", "input"])
@pytest.mark.usefixtures("one_thread")
def test_a_bad_step_leaves_no_trace(tmp_path: Path, kind: str, value: float, precision: str) -> None:
    optimizer = list(OPTIMIZERS)[(len(kind) + (value == math.inf)) % 3]
    states, watch, _ = train(tmp_path, kind=kind, value=value, precision=precision, optimizer=optimizer)
    assert len(states) == 7
    assert all(map(finite, states))
    moved = [not same(before, after) for before, after in pairwise(states)]
    assert moved == [True, True, True, False, True, True]
    assert (watch.skipped, watch.in_a_row) == (1, 0)
    (line,) = lines(tmp_path)
    assert len(line["files"]) == 4
    assert line["step"] == BAD + 1


@pytest.mark.usefixtures("one_thread")
def test_a_bad_batch_takes_all_that_is_accumulated_with_it(tmp_path: Path) -> None:
    states, _, task = train(tmp_path, kind="input", accumulate_grad_batches=2)
    assert all(finite(states[step]) for step in (0, 2, 4, 6))
    changed = [not same(states[before], states[before + 2]) for before in (0, 2, 4)]
    assert changed == [True, False, True]
    (line,) = lines(tmp_path)
    assert line["losses"] == ["nan"]  # of the one batch that is to blame
    data: Any = task.trainer.datamodule  # type: ignore[attr-defined]
    index = list(DataLoader(data.train_dataloader().dataset, sampler=data.train_dataloader().sampler, collate_fn=list))
    assert line["files"] == [data.train_name(item[0]["index"]) for item in index[4 * BAD : 4 * BAD + 4]]


@pytest.mark.usefixtures("one_thread")
def test_float16_scales_its_loss_and_skips_by_itself(tmp_path: Path) -> None:
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))
    states, watch, task = train(tmp_path, kind="input", precision=None, plugins=[plugin])
    assert all(map(finite, states))
    assert same(states[BAD], states[BAD + 1])
    assert not same(states[BAD + 1], states[BAD + 2])
    assert watch.skipped == 1
    assert task.trainer.precision_plugin.scaler.get_scale() == 512.0  # type: ignore[attr-defined]


@pytest.mark.usefixtures("one_thread")
def test_the_run_ends_after_some_in_a_row(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"3 steps in a row .* 4 images \(.*non_finite.jsonl"):
        train(tmp_path, kind="input", bad=frozenset({0, 2, 3, 4}), stop_after=3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 3, 4, 5]


@pytest.mark.usefixtures("one_thread")
def test_or_never(tmp_path: Path) -> None:
    states, watch, _ = train(tmp_path, kind="loss", bad=frozenset(range(6)), stop_after=None)
    assert same(states[0], states[-1])
    assert watch.warnings == {"non_finite": "6 steps were left out: loss or gradients not finite, see non_finite.jsonl"}


def test_stopping_after_none_at_all_is_a_mistake() -> None:
    with pytest.raises(UsageError, match="stop_after=0"):
        NonFinite(stop_after=0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e18, 0.0])
def test_gradients_are_finite_or_not(value: float) -> None:
    first, second, third = (nn.Parameter(torch.zeros(1000)) for _ in range(3))
    first.grad, second.grad = torch.full((1000,), 1e3), torch.zeros(1000)
    second.grad[999] = value
    assert bool(gradients_finite(SGD([first, second, third]))) == math.isfinite(value)


def test_nothing_to_learn_is_finite() -> None:
    assert bool(gradients_finite(SGD([nn.Parameter(torch.zeros(1))])))


class PoisonedViews(Pretraining):
    """Sees views that are not finite in one batch."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        if batch_idx == BAD:
            batch = batch | {"views": [view * math.nan for view in batch["views"]]}
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("method", ["MoCo", "BYOL", "SwAV", "DINO"])
@pytest.mark.usefixtures("one_thread")
def test_teachers_queues_and_centres_stay_as_they_were(tmp_path: Path, method: str) -> None:
    torch.manual_seed(0)
    task = PoisonedViews(backbone=Tiny(), head=maker(method), optimizer=OPTIMIZERS["AdamW"], scheduler=constant)
    journal, batches = Journal(), [views_of(range(4 * step, 4 * step + 4)) for step in range(6)]
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(**quiet, accelerator="cpu", max_epochs=1, default_root_dir=tmp_path, precision="32-true",
                      callbacks=[NonFinite(), journal], enable_checkpointing=False)  # fmt: skip
    trainer.fit(task, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    moved = [not same(before, after) for before, after in pairwise(journal.states)]
    assert moved == [True, True, True, False, True, True]
    assert finite(journal.states[-1])


PROCESSES: dict[str, dict[str, Any]] = {
    "an input of the second": {"kind": "input", "ranks": frozenset({1}), "bad": frozenset({1})},
    "a loss of the second": {"kind": "loss without gradient", "ranks": frozenset({1}), "bad": frozenset({1})},
    "too many in the first": {"kind": "loss", "bad": frozenset({1, 2}), "stop_after": 2},
    "accumulated": {"kind": "input", "ranks": frozenset({1}), "bad": frozenset({0}), "accumulate_grad_batches": 2},
}


def one_of_two(rank: int, folder: str) -> None:
    import os

    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()}
    os.environ |= {"WORLD_SIZE": "2", "NODE_RANK": "0", "LOCAL_RANK": str(rank), "RANK": str(rank)}
    found = {}
    for number, (name, options) in enumerate(PROCESSES.items()):
        place = Path(folder) / str(number)
        place.mkdir(exist_ok=True)
        try:
            states, watch, task = train(place, **options, strategy="ddp", devices=2)
        except UsageError as error:
            found[name] = {"end": str(error)}
            continue
        moved = [not same(before, after) for before, after in pairwise(states)]
        found[name] = {"moved": moved, "finite": all(map(finite, states)), "skipped": watch.skipped,
                       "norm": float(sum(value.double().norm() for value in task.parameters()))}  # fmt: skip
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> tuple[Path, Any, Any]:
    import socket

    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        (folder / "port").write_text(str(free.getsockname()[1]))
    mp.start_processes(one_of_two, args=(str(folder),), nprocs=2, start_method="fork")  # what is imported stays so
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return folder, first, second


@pytest.mark.parametrize("name", PROCESSES)
def test_two_processes_leave_out_the_same_steps(ends: tuple[Path, Any, Any], name: str) -> None:
    folder, first, second = ends
    if name == "too many in the first":
        assert first[name] == second[name]
        assert "2 steps in a row" in first[name]["end"]
        return
    assert first[name]["norm"] == second[name]["norm"]
    assert first[name]["skipped"] == second[name]["skipped"] == 1
    (line,) = lines(folder / str(list(PROCESSES).index(name)))
    assert line["losses"] == ["nan"]  # of the second process alone
    assert len(line["files"]) == 4
    if name != "accumulated":
        assert first[name]["finite"]
        assert second[name]["finite"]
        assert first[name]["moved"] == second[name]["moved"] == [True, False, True]


@pytest.mark.parametrize("player", ["critic", "generator"])
def test_a_task_that_steps_itself_says_which_steps_it_left_out(player: str, tmp_path: Path) -> None:
    task = generating()
    whole, calls = getattr(task.objective, player), count(1)

    def spoiled(*scores: Tensor) -> Any:
        total, images = whole(*scores)
        return (total * math.nan if next(calls) in {2, 4, 5} else total), images

    task.objective = task.objective._replace(**{player: spoiled})
    callback = NonFinite(stop_after=2)
    with pytest.raises(UsageError, match="2 steps in a row"):
        fit_generation(task, pictures(48), callbacks=[callback], default_root_dir=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "non_finite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 5]
    assert {loss for line in lines for loss in line["losses"]} == {"nan"}
    assert callback.skipped == task.left_out == 3
