"""A backbone goes on from another run: what arrives, which stages stay, learn, when and how fast."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim import SGD, AdamW, Optimizer

from visiontasks.backbones import CifarResNet, TimmBackbone, TorchvisionBackbone
from visiontasks.callbacks.unfreezing import Unfreezing
from visiontasks.contracts import Backbone, UsageError
from visiontasks.data import DigitScenes
from visiontasks.layers.freezing import cut_stages, stage_parameters
from visiontasks.tasks import Classification
from visiontasks.tasks.optimisation import Pace, at_rates, parameter_groups
from visiontasks.transfer import Auto, Transfer, freeze_for_good
from visiontasks.weights import load_backbone


def run_folder(path: Path, backbone: Backbone) -> Path:
    state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    (path / "checkpoints").mkdir()
    torch.save({"pytorch-lightning_version": "2.6.6", "state_dict": state}, path / "checkpoints" / "last.ckpt")
    return path


def test_a_run_of_the_same_backbone_arrives_whole(tmp_path: Path) -> None:
    source, target = CifarResNet(depth=8), CifarResNet(depth=8)
    receipt = load_backbone(target, str(run_folder(tmp_path, source)))
    assert (receipt.share, receipt.missing, receipt.left_over) == (1.0, (), ())
    assert all(
        torch.equal(a, b) for a, b in zip(target.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_a_run_of_another_backbone_is_refused_with_counts(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, CifarResNet(depth=14))
    with pytest.raises(UsageError, match=r"resnet8: \d+ of its \d+ tensors match, \d+ left over"):
        load_backbone(CifarResNet(depth=8), str(folder))


PLANS: dict[str, tuple[Transfer, list[int | None], list[float]]] = {  # of three stages in twelve epochs
    "full": (Transfer(), [0, 0, 0], [1, 1, 1]),
    "frozen": (Transfer(train_from=None), [None, None, None], [1, 1, 1]),
    "last stages": (Transfer(train_from=3), [None, None, 0], [1, 1, 1]),
    "gradual": (Transfer(wait=1, every=2), [5, 3, 1], [1, 1, 1]),
    "gradual in shares": (Transfer(wait=0.5, every=0.125), [10, 8, 6], [1, 1, 1]),
    "discriminative": (Transfer(decay=0.4), [0, 0, 0], [0.064, 0.16, 0.4]),
    "probe, then all": (Transfer(wait=0.5), [6, 6, 6], [1, 1, 1]),
    "gradual over the last": (Transfer(train_from=2, wait=1, every=1), [None, 2, 1], [1, 1, 1]),
}


@pytest.mark.parametrize("name", PLANS)
def test_plans_say_when_and_how_fast_each_stage_learns(name: str) -> None:
    transfer, starts, rates = PLANS[name]
    stages = transfer.stages(CifarResNet(depth=8), epochs=12)
    assert [stage.start for stage in stages] == starts
    assert [stage.rate for stage in stages] == pytest.approx(rates)
    assert [list(stage.parameters) for stage in stages] == stage_parameters(CifarResNet(depth=8))


@pytest.mark.parametrize(
    ("transfer", "message"),
    [
        (Transfer(train_from=4), r"train_from=4, but this backbone has stages 1 to 3"),
        (Transfer(train_from=0), r"train_from=0"),
        (Transfer(wait=1, every=1), r"Stage 1 would learn from epoch 4 on and there are 3"),
    ],
)
def test_plans_that_cannot_be_kept_are_refused(transfer: Transfer, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        transfer.stages(CifarResNet(depth=8), epochs=3)


def test_a_share_of_an_unknown_number_of_epochs_is_refused() -> None:
    with pytest.raises(UsageError, match=r"0\.5 is a share of trainer\.max_epochs"):
        Transfer(wait=0.5).stages(CifarResNet(depth=8), epochs=-1)


BACKBONES = {
    "cifar": lambda: CifarResNet(depth=8),
    "resnet18": lambda: TorchvisionBackbone(name="resnet18"),
    "vgg11": lambda: TorchvisionBackbone(name="vgg11"),
    "regnet": lambda: TorchvisionBackbone(name="regnet_y_400mf"),
    "timm resnet": lambda: TimmBackbone(name="resnet10t"),
    "timm convnext": lambda: TimmBackbone(name="convnext_atto"),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_cut_backbone_is_the_beginning_of_the_whole(name: str) -> None:
    whole, cut = BACKBONES[name]().eval(), BACKBONES[name]().eval()
    cut_stages(cut, 2)
    receipt = load_backbone(cut, whole.state_dict(), source="x")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        features, expected = cut(images), whole(images)
    assert cut.levels == whole.levels[:2]
    assert len(features) == 2
    assert all(torch.equal(a, b) for a, b in zip(features, expected, strict=False))
    assert {name for names in stage_parameters(cut) for name in names} == {n for n, _ in cut.named_parameters()}
    assert receipt.share == 1
    assert set(receipt.left_over) == set(whole.state_dict()) - set(cut.state_dict()) != set()


@pytest.mark.parametrize("keep", [0, 4])
def test_cuts_outside_the_backbone_are_refused(keep: int) -> None:
    with pytest.raises(UsageError, match=rf"transfer\.keep={keep}, but this backbone has 3 stages"):
        cut_stages(CifarResNet(depth=8), keep)


def test_a_backbone_that_knows_no_cutting_says_so() -> None:
    backbone = Backbone()
    backbone.levels = CifarResNet(depth=8).levels
    with pytest.raises(UsageError, match="Backbone cannot be cut"):
        cut_stages(backbone, 1)


TABLE = {
    (100, False): "frozen",
    (100, True): "last",
    (9000, False): "decay",
    (9000, True): "full",
}


@pytest.mark.parametrize("case", TABLE)
def test_auto_follows_its_table_and_says_why(case: tuple[int, bool]) -> None:
    chosen, why = Auto(small=5000).choose(images=case[0], stages=4, other_data=case[1])
    expected = {
        "frozen": Transfer(train_from=None),
        "last": Transfer(train_from=3),
        "decay": Transfer(decay=0.5),
        "full": Transfer(),
    }
    assert chosen == expected[TABLE[case]]
    assert f"{case[0]:,} training images" in why
    assert ("unlike" in why) == case[1]


def test_what_is_said_of_similarity_wins_over_the_rule() -> None:
    said, _ = Auto(similar=False).choose(images=100, stages=4, other_data=False)
    ruled, _ = Auto().choose(images=100, stages=4, other_data=False)
    assert (said.train_from, ruled.train_from) == (3, None)


def test_groups_learn_at_their_stages_rates() -> None:
    backbone = CifarResNet(depth=8)
    pace = {n: Pace(0, s.rate) for s in Transfer(decay=0.5).stages(backbone, epochs=1) for n in s.parameters}
    optimizer = at_rates(AdamW(parameter_groups(backbone, pace), lr=0.8, weight_decay=0.1))
    found = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in backbone.named_parameters():
        stage = next(index for index, names in enumerate(stage_parameters(backbone)) if name in names)
        assert found[id(parameter)] == pytest.approx((0.8 * 0.5 ** (3 - stage), 0.1 if parameter.ndim > 1 else 0))


class Watch(Callback):
    """Notes what requires a gradient and what is in training mode in each epoch's last step; stops by an error."""

    def __init__(self, *, die_in_epoch: int | None = None) -> None:
        self.learning: dict[int, list[bool]] = {}
        self.training: dict[int, list[bool]] = {}
        self.die_in_epoch = die_in_epoch

    def on_train_batch_end(self, trainer: Trainer, module: Any, *_: Any) -> None:
        layers = [module.backbone.net.get_submodule(f"layer{index}") for index in (1, 2, 3)]
        self.learning[trainer.current_epoch] = [next(layer.parameters()).requires_grad for layer in layers]
        self.training[trainer.current_epoch] = [layer[0].bn1.training for layer in layers]
        if trainer.current_epoch == self.die_in_epoch:
            raise InterruptedError


OPTIMISERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": partial(AdamW, lr=0.01, weight_decay=0.1, fused=True),
    "sgd": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, fused=True),
}


def fit(
    transfer: Transfer,
    folder: Path,
    *,
    epochs: int,
    watch: Watch,
    resume: Path | None = None,
    optimiser: str = "adamw",
) -> Classification:
    torch.manual_seed(0)
    data = DigitScenes(digits=(1, 1), digit_size=(0.5, 0.9), image_size=32, train_size=16, val_size=8, batch_size=8)
    data.setup()
    task = Classification(backbone=CifarResNet(depth=8), classes=data.classes, optimizer=OPTIMISERS[optimiser])
    stages = transfer.stages(task.backbone, epochs=epochs)
    freeze_for_good(task.backbone, stages)
    task.pace = {f"backbone.{name}": Pace(each.start or 0, each.rate) for each in stages for name in each.parameters}
    saving = ModelCheckpoint(folder, "last", enable_version_counter=False)
    trainer = Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        callbacks=[Unfreezing(stages), watch, saving],
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(task, datamodule=data, ckpt_path=resume, weights_only=True)
    return task


def test_a_frozen_backbone_is_bit_identical_after_a_fit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = CifarResNet(depth=8).state_dict()
    task = fit(Transfer(train_from=None), tmp_path, epochs=2, watch=Watch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.backbone.state_dict().items())
    torch.manual_seed(0)
    CifarResNet(depth=8)
    fresh = Classification(backbone=CifarResNet(depth=8), classes=task.classes).head.state_dict()
    assert not torch.equal(task.head.state_dict()["classifier.weight"], fresh["classifier.weight"])


def test_last_stages_learn_and_the_finer_ones_do_not_move(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = CifarResNet(depth=8).state_dict()
    task = fit(Transfer(train_from=3), tmp_path, epochs=1, watch=Watch())
    moved = {n.split(".")[1] for n, tensor in task.backbone.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved == {"layer3"}


def test_gradual_lets_one_stage_more_learn_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch = Watch()
    fit(Transfer(wait=1, every=1, decay=0.5), tmp_path, epochs=4, watch=watch)
    expected = {0: [False] * 3, 1: [False, False, True], 2: [False, True, True], 3: [True] * 3}
    assert watch.learning == watch.training == expected
    said = capsys.readouterr().out
    assert "stage 1 at 0.0013 from epoch 3; stage 2 at 0.0025 from epoch 2; stage 3 at 0.005 from epoch 1" in said
    assert said.count("head at 0.01") == 1


def test_what_has_not_begun_to_learn_is_neither_decayed_nor_remembered(tmp_path: Path) -> None:
    torch.manual_seed(0)
    before = CifarResNet(depth=8).state_dict()
    task = fit(Transfer(wait=2), tmp_path, epochs=3, watch=Watch())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["state"]
    assert {int(entry["step"]) for entry in state.values()} == {2, 6}  # the backbone's and the head's steps
    assert any(not torch.equal(tensor, before[name]) for name, tensor in task.backbone.state_dict().items())


@pytest.mark.parametrize(("died_in", "optimiser"), [(2, "adamw"), (3, "adamw"), (3, "sgd")])
def test_a_run_that_was_killed_goes_on_with_what_it_had_let_learn(tmp_path: Path, died_in: int, optimiser: str) -> None:
    once_more = partial(fit, Transfer(wait=1, every=1), epochs=4, optimiser=optimiser)
    whole = once_more(tmp_path / "whole", watch=Watch())
    with pytest.raises(InterruptedError):
        once_more(tmp_path / "killed", watch=Watch(die_in_epoch=died_in))
    watch = Watch()
    resumed = once_more(tmp_path / "killed", watch=watch, resume=tmp_path / "killed" / "last.ckpt")
    expected = {2: [False, True, True], 3: [True] * 3}
    assert watch.learning == watch.training == {epoch: expected[epoch] for epoch in range(died_in, 4)}
    first, second = whole.state_dict(), resumed.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
