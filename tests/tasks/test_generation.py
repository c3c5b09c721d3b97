"""The task of generation: each step is the one that a bare loop takes, and samples come from the averaged generator."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning import Callback
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm
from torch.optim import SGD

from tests.tasks.generation_parts import GAMES, SIDE, fit, game, images, made
from tests.tasks.pretraining_parts import Tiny
from visiontasks.backbones import DCGAN, CifarResNet
from visiontasks.contracts import Backbone, Batch, UsageError
from visiontasks.layers.diffaugment import diffaugment
from visiontasks.losses.adversarial import Objective
from visiontasks.tasks import Generation
from visiontasks.tasks.optimisation import plateau

pytestmark = pytest.mark.usefixtures("one_thread")


def games(name: str) -> Any:
    """The losses of the critic and of the generator, written out."""
    return {
        "non_saturating": (
            lambda r, f: (
                F.binary_cross_entropy_with_logits(r, torch.ones_like(r))
                + F.binary_cross_entropy_with_logits(f, torch.zeros_like(f))
            ),
            lambda f: F.binary_cross_entropy_with_logits(f, torch.ones_like(f)),
        ),
        "least_squares": (
            lambda r, f: 0.5 * F.mse_loss(r, torch.ones_like(r)) + 0.5 * F.mse_loss(f, torch.zeros_like(f)),
            lambda f: 0.5 * F.mse_loss(f, torch.ones_like(f)),
        ),
        "wasserstein": (lambda r, f: f.mean() - r.mean(), lambda f: -f.mean()),
        "hinge": (
            lambda r, f: torch.clamp(1 - r, min=0).mean() + torch.clamp(1 + f, min=0).mean(),
            lambda f: -f.mean(),
        ),
    }[name]


def bare(task: Generation, batches: list[Batch]) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The backbone, the critic's end and the generator after a plain loop over the same batches and draws."""
    own = copy.deepcopy(task)
    backbone, end, generator, head = own.backbone, own.head.critic, own.head.generator, own.head
    for _, norm, network in own.normalised():
        norm.settle(network)
        for name in norm.names:
            layer = network.get_submodule(name.rpartition(".")[0])
            spectral_norm(layer)
            made_by_torch = layer.parametrizations.weight[0]
            made_by_torch._u.copy_(norm.get_buffer(f"{name.replace('.', '/')}/left"))
            made_by_torch._v.copy_(norm.get_buffer(f"{name.replace('.', '/')}/right"))
    critic_loss, generator_loss = games(head.objective)
    critic_optimizer = SGD([*backbone.parameters(), *end.parameters()], lr=0.05, momentum=0.5)
    generator_optimizer = SGD(generator.parameters(), lr=0.05, momentum=0.5)

    def scores(pictures: Tensor, numbers: Tensor, labels: Tensor | None) -> Tensor:
        seen = diffaugment(pictures, numbers, head.diffaugment)
        mean, std = (torch.tensor(each).view(1, -1, 1, 1) for each in (backbone.mean, backbone.std))
        return end(backbone(seen * (0.5 / std) + (0.5 - mean) / std), labels)  # type: ignore[no-any-return]

    for batch in batches:
        drawn = own.draw_for(batch)
        real = batch["image"].float() / 255 * 2 - 1
        fake = generator(drawn.critic_latents, drawn.labels).detach()
        with parametrize.cached():
            of_real = scores(real, drawn.real_numbers, drawn.labels)
            loss = critic_loss(of_real, scores(fake, drawn.fake_numbers, drawn.labels))
            if head.gradient_penalty:
                between = (
                    drawn.mix[:, None, None, None] * real + (1 - drawn.mix[:, None, None, None]) * fake
                ).requires_grad_()
                total = scores(between, drawn.fake_numbers, drawn.labels).sum()
                (slope,) = torch.autograd.grad(total, between, create_graph=True)
                loss = loss + head.gradient_penalty * ((slope.flatten(1).norm(dim=1) - 1) ** 2).mean()
            if head.r1:
                at = real.clone().requires_grad_()
                (slope,) = torch.autograd.grad(
                    scores(at, drawn.real_numbers, drawn.labels).sum(), at, create_graph=True
                )
                loss = loss + head.r1 / 2 * slope.flatten(1).square().sum(dim=1).mean()
        critic_optimizer.zero_grad()
        loss.backward()
        critic_optimizer.step()
        with parametrize.cached():
            made_up = generator(drawn.generator_latents, drawn.labels)
            loss = generator_loss(scores(made_up, drawn.generator_numbers, drawn.labels))
        generator_optimizer.zero_grad()
        loss.backward()
        generator_optimizer.step()
    return backbone, end, generator


def distance(found: nn.Module, expected: nn.Module) -> float:
    """The largest difference between two parameters."""
    others = {name.replace("parametrizations.weight.original", "weight"): p for name, p in expected.named_parameters()}
    own = dict(found.named_parameters())
    assert own.keys() == others.keys()
    return max((own[name] - others[name]).abs().max().item() for name in own)


@pytest.mark.parametrize("name", GAMES)
def test_steps_are_those_of_a_bare_loop(name: str) -> None:
    task, batches = made(name), images(16)
    before = copy.deepcopy(task)
    expected = bare(task, batches)
    fit(task, batches)
    own = (task.backbone, task.head.critic, task.head.generator)
    for found, wanted, start in zip(
        own, expected, (before.backbone, before.head.critic, before.head.generator), strict=True
    ):
        assert distance(found, wanted) < 1e-6
        assert distance(found, start) > 1e-3


@pytest.mark.parametrize("name", GAMES)
def test_one_pass_of_the_critic_takes_the_step_of_two(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ends, passes = [], []
    for at_once in (True, False):
        monkeypatch.setattr(Generation, "_at_once", lambda _task, _images, at_once=at_once: at_once)
        task = made(name)
        task.backbone.stages[0].register_forward_hook(lambda _layer, given, _made: passes.append(len(given[0])))
        fit(task, images(24))
        ends.append(moved(task))
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)
    assert 16 in passes


@pytest.mark.parametrize(
    ("backbone", "options", "at_once"),
    [
        (DCGAN(), {}, [True, False]),  # 2.8 M weights, and its norms are given 14,336 values an image
        (CifarResNet(depth=8), {}, [False, False]),
        (CifarResNet(depth=8), {"batch_norms": False}, [True, True]),
    ],
)
def test_a_critic_makes_one_pass_where_norms_copy_less_than_weights_are(
    backbone: Backbone, options: dict[str, Any], at_once: list[bool]
) -> None:
    task = Generation(backbone=backbone, classes=(), head=game(**options), image_size=32)
    assert not task._at_once(1)
    task.on_train_start()
    assert [task._at_once(images) for images in (16, 1024)] == at_once


def moved(task: Generation) -> Tensor:
    """All that a step may change, in one row."""
    return torch.cat([value.detach().flatten().float() for value in task.state_dict().values()])


def test_one_counter_means_steps_of_the_critic() -> None:
    task = made(critic_steps=3)
    trainer = fit(task, images(56))
    assert trainer.global_step == 7
    steps = [next(iter(each.state.values()))["momentum_buffer"] is not None for each in trainer.optimizers]
    assert steps == [True, True]
    assert [each["scheduler"].last_epoch for each in _schedules(trainer)] == [7, 2]
    trainer = fit(made(critic_steps=3), images(56), max_epochs=-1, max_steps=10)
    assert trainer.global_step == 10


def _schedules(trainer: Any) -> list[dict[str, Any]]:
    return [{"scheduler": config.scheduler} for config in trainer.lr_scheduler_configs]


def test_accumulated_batches_are_one_step_and_one_schedule() -> None:
    task = made(task={"accumulate_grad_batches": 3})
    trainer = fit(task, images(56), max_epochs=2)  # seven batches: steps of three, three and one
    assert trainer.global_step == 6
    assert task._steps() == 6


def test_accumulation_takes_the_step_of_the_larger_batch() -> None:
    options: dict[str, Any] = {"batch_norms": False, "objective": "hinge", "residual": True}
    whole, parts = made(**options), made(**options, task={"accumulate_grad_batches": 4})
    for task in (whole, parts):
        for layer in task.head.generator.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = 0.0
                layer.train = lambda *_, layer=layer: layer  # type: ignore[method-assign, assignment, misc]
                layer.training = False  # else parts see other statistics
    fit(whole, images(16, batch_size=16))
    fit(parts, images(16, batch_size=4))
    assert distance(parts.backbone, whole.backbone) < 1e-6
    assert distance(parts.head.generator, whole.head.generator) < 1e-6


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    options: dict[str, Any] = {"critic_steps": 2, "spectral_norm": True}
    whole, first, second = (made("hinge", **options) for _ in range(3))
    fit(whole, images(24), max_epochs=2)
    fit(first, images(24), max_epochs=1).save_checkpoint(tmp_path / "half.ckpt")
    trainer = fit(second, images(24), max_epochs=2, ckpt=tmp_path / "half.ckpt")
    assert trainer.global_step == 6
    assert torch.equal(moved(second), moved(whole))


def test_what_is_not_finite_changes_nothing_and_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    task = made()
    whole = task.objective
    at = iter((False, True, False))

    def critic(real: Tensor, fake: Tensor) -> Any:
        total, count = whole.critic(real, fake)
        return (total * math.nan if next(at) else total), count

    task.objective = Objective(critic, whole.generator)
    seen: list[Tensor] = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            seen.append(moved(module))

    trainer = fit(task, images(24), callbacks=[Watch()])
    assert trainer.global_step == 3
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert seen[2].isfinite().all()
    assert task.left_out == 1
    assert "step 1 of the critic left out: its loss or gradients are not finite (1 so far)" in capsys.readouterr().out


def test_mixed_precision_learns_what_float32_does() -> None:
    for name in ("non_saturating", "wasserstein"):
        start, full, mixed = made(name), made(name), made(name)
        fit(full, images(8))
        fit(mixed, images(8), precision="bf16-mixed")
        for part in ("backbone", "head.generator", "head.critic"):
            steps = [
                nn.utils.parameters_to_vector(task.get_submodule(part).parameters())
                - nn.utils.parameters_to_vector(start.get_submodule(part).parameters())
                for task in (full, mixed)
            ]
            assert F.cosine_similarity(*steps, dim=0) > 0.97, (name, part)
        assert all(p.dtype == torch.float32 for p in mixed.parameters())


def test_gradients_are_clipped_to_a_norm() -> None:
    start, task = made(), made(task={"gradient_clip_val": 1e-3})
    fit(task, images(8))
    for part in ("backbone", "head.generator"):
        pairs = zip(task.get_submodule(part).parameters(), start.get_submodule(part).parameters(), strict=True)
        assert 0 < math.sqrt(sum((a - b).square().sum().item() for a, b in pairs)) <= 0.05 * 1.0001e-3


def test_samples_come_from_the_average_and_the_seed() -> None:
    task = made("conditional", task={"ema": 0.5})
    start = copy.deepcopy(task.head.generator)
    fit(task, images(8))
    for own, learnt, first in zip(
        task.average.parameters(), task.head.generator.parameters(), start.parameters(), strict=True
    ):
        weight = 1 - min(0.5, 2 / 11)  # the ramp after one step
        assert torch.allclose(own, first.lerp(learnt, weight), atol=1e-6)
    latents = task.latents(5, seed=3)
    assert torch.equal(latents[:2], task.latents(2, seed=3))
    assert not torch.equal(latents, task.latents(5, seed=4))
    pictures = task.sample(latents, torch.tensor([0, 1, 2, 0, 1]))
    assert (pictures.dtype, pictures.shape) == (torch.uint8, (5, 3, SIDE, SIDE))
    assert torch.equal(pictures[:2], task.sample(latents[:2], torch.tensor([0, 1])))
    same = task.sample(latents, torch.zeros(5, dtype=torch.long), truncation=0.0)
    assert torch.equal(same[0], same[4])
    with pytest.raises(UsageError, match="give labels"):
        task.sample(latents)


def test_latents_are_normal() -> None:
    values = made().latents(20_000, seed=1)
    assert values.mean(dim=0).abs().max() < 0.04
    assert (values.std(dim=0) - 1).abs().max() < 0.03
    assert torch.corrcoef(values.T).fill_diagonal_(0).abs().max() < 0.04
    assert values.isfinite().all()


def test_a_stored_backbone_computes_what_the_normalised_one_did_and_comes_back() -> None:
    task = made("hinge")
    fit(task, images(16))
    state = task.state_dict()
    plain = Tiny().eval()
    plain.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    pictures = task.images(images()[0])
    task.eval()
    wanted = functional_call(task.backbone, task.spectral["backbone"](task.backbone), (pictures,))
    assert torch.allclose(plain(pictures)[-1], wanted[-1], atol=1e-6)
    again = made("hinge", seed=1)
    again.load_state_dict(state)
    assert torch.equal(
        nn.utils.parameters_to_vector(again.parameters()), nn.utils.parameters_to_vector(task.parameters())
    )
    assert torch.equal(moved(again), moved(task))


def test_grey_backbones_make_grey_pictures() -> None:
    backbone = Tiny()
    backbone.in_channels, backbone.mean, backbone.std = 1, (0.5,), (0.5,)
    backbone.stages[0][0] = nn.Conv2d(1, 6, 3, 2, 1)
    task = Generation(backbone=backbone, head=game(), image_size=SIDE)
    pictures = task.sample(task.latents(3))
    assert pictures.shape == (3, 3, SIDE, SIDE)
    assert torch.equal(pictures[:, 0], pictures[:, 2])


class Deep(Tiny):
    """Residual blocks behind one another, whose values would double in each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(60)
        )
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> list[Tensor]:
        first, x = super().forward(images)
        for block in self.blocks:
            x = x + block(x)
        return [first, x]


def test_batch_norms_that_keep_their_statistics_have_some() -> None:
    torch.manual_seed(0)
    task = Generation(backbone=Deep(), head=game("wasserstein"), image_size=SIDE)
    assert not any(layer.training for layer in task.backbone.modules() if isinstance(layer, nn.BatchNorm2d))
    pictures = task.images(images(64, batch_size=64)[0])
    assert task(pictures).abs().max() < 100  # 2 ** 30 without
    again = Generation(backbone=Deep(), head=game("wasserstein"), image_size=SIDE)
    again.load_state_dict(task.state_dict())
    assert torch.equal(again(pictures), task(pictures))


def test_batch_norms_that_have_statistics_keep_them() -> None:
    backbone = Tiny()
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.fill_(0.5)  # type: ignore[union-attr]
    before = copy.deepcopy(backbone.state_dict())
    task = Generation(backbone=backbone, head=game("r1"), image_size=SIDE)
    assert all(torch.equal(value, before[name]) for name, value in task.backbone.state_dict().items())


def test_a_layer_without_a_second_derivative_is_refused_under_a_penalty() -> None:
    backbone = Tiny()
    backbone.stages[1][2] = nn.Hardsigmoid()  # type: ignore[index, operator]
    with pytest.raises(UsageError, match=r"backbone=Tiny has a layer without a second derivative \(hardsigmoid"):
        Generation(backbone=backbone, head=game("wasserstein"), image_size=SIDE)
    Generation(backbone=backbone, head=game("hinge"), image_size=SIDE)


def test_under_spectral_norms_places_are_added_up() -> None:
    maps = [torch.randn(2, 8, 3, 5)]
    for name, share in (("hinge", 1.0), ("non_saturating", 1 / 15)):
        critic = made(name).head.critic
        expected = maps[0].flatten(2).sum(dim=2) @ critic.linear.weight[0] * share + critic.linear.bias
        assert torch.allclose(critic(maps), expected, atol=1e-5)


def test_what_cannot_train_is_refused() -> None:
    with pytest.raises(UsageError, match="scheduler=cosine or constant"):
        fit(made(task={"scheduler": plateau}), images())
    with pytest.raises(MisconfigurationException, match="gradient accumulation is not supported"):
        fit(made(), images(), accumulate_grad_batches=2)
    batch = images()[0] | {"label": torch.zeros(8, 3)}
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))
    with pytest.raises(UsageError, match=r"not 16-mixed: type trainer\.precision=32"):
        fit(made(), images(8), plugins=[scaled])
    with pytest.raises(UsageError, match="these have several"):
        made("conditional").draw_for(batch)
