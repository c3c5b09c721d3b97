"""Methods of pretraining: their parts, their views, and that each learns."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.tasks.pretraining_parts import SMALL, Tiny
from visiontasks import heads
from visiontasks.contracts import UsageError
from visiontasks.heads.pretraining.dino import UnitLinear
from visiontasks.heads.pretraining.method import Method, mlp
from visiontasks.heads.pretraining.teacher import Teacher, rising
from visiontasks.layers.draws import draws, image_keys

LEVELS = Tiny.levels


def make(name: str, **options: Any) -> Method:
    torch.manual_seed(0)
    method: Method = getattr(heads, name)(levels=LEVELS, **SMALL[name], **options)
    return method


def test_names_and_widths_are_those_of_the_papers() -> None:
    widths = {
        "SimCLR": [(8, 8), (8, 128)],
        "MoCo": [(8, 8), (8, 128)],
        "MoCoV3": [(8, 4096), (4096, 256), (256, 4096), (4096, 256)],
        "BYOL": [(8, 4096), (4096, 256), (256, 4096), (4096, 256)],
        "SimSiam": [(8, 2048), (2048, 2048), (2048, 2048), (2048, 512), (512, 2048)],
        "BarlowTwins": [(8, 8192), (8192, 8192), (8192, 8192)],
        "VICReg": [(8, 8192), (8192, 8192), (8192, 8192)],
        "SwAV": [(8, 2048), (2048, 128)],
        "DINO": [(8, 2048), (2048, 2048), (2048, 256)],
    }
    for name, expected in widths.items():
        with torch.device("meta"):
            method = getattr(heads, name)(levels=LEVELS, **({"queue": 8} if name == "MoCo" else {}))
        linears = [layer for layer in method.modules() if isinstance(layer, nn.Linear)]
        assert [(layer.in_features, layer.out_features) for layer in linears] == expected, name


def test_mlp_has_norms_where_it_is_told() -> None:
    kinds = [type(layer) for layer in mlp([2, 3, 4, 5])]
    linear, norm, relu = nn.Linear, nn.BatchNorm1d, nn.ReLU
    assert kinds == [linear, norm, relu, linear, norm, relu, linear]
    assert [type(layer) for layer in mlp([2, 3, 4], norm=False)] == [linear, relu, linear]
    last = mlp([2, 3, 4], last_norm=True, affine=False)[-1]
    assert isinstance(last, norm)
    assert last.weight is None
    assert [layer.bias is None for layer in mlp([2, 3, 4], last_norm=True) if isinstance(layer, linear)] == [True, True]
    assert [layer.bias is None for layer in mlp([2, 3, 4]) if isinstance(layer, linear)] == [True, False]


@pytest.mark.parametrize(("name", "views"), [("SimCLR", 8), ("BYOL", 1), ("DINO", 1), ("SwAV", 0)])
def test_views_that_do_not_fit_are_refused_with_what_to_type(name: str, views: int) -> None:
    with pytest.raises(UsageError, match=rf"makes {views}: type augment={getattr(heads, name).augment}"):
        make(name).check(views)
    make(name).check(2)


def test_crops_may_be_many() -> None:
    make("SwAV").check(8)
    make("DINO").check(10)


def said(method: Method, views: int = 2, images: int = 12) -> list[Tensor]:
    """Random projections of views, unlike each other."""
    torch.manual_seed(1)
    maps = [[torch.zeros(images, 6, 2, 2), torch.randn(images, 8, 1, 1)] for _ in range(views)]
    return [method(features) for features in maps]


def test_byol_is_the_squared_distance_of_unit_vectors_both_ways() -> None:
    method = make("BYOL")
    outputs, targets = said(method), [torch.randn(12, 12) for _ in range(2)]
    rows = [(x / x.norm(dim=1, keepdim=True)).detach().double().numpy() for x in (*outputs, *targets)]
    expected = ((rows[0] - rows[3]) ** 2).sum(1).mean() + ((rows[1] - rows[2]) ** 2).sum(1).mean()
    assert method.loss(outputs, targets).item() == pytest.approx(expected, rel=1e-6)


def test_simsiam_predicts_its_own_projections_without_teaching_them() -> None:
    method = make("SimSiam")
    outputs = said(method)
    predicted, projected = outputs[0].unbind(1)
    assert torch.allclose(predicted, method.predictor(projected), atol=1e-5)  # type: ignore[operator]
    rows = [(x / x.norm(dim=-1, keepdim=True)).detach().double().numpy() for x in outputs]
    cosines = (rows[0][:, 0] * rows[1][:, 1]).sum(1).mean() + (rows[1][:, 0] * rows[0][:, 1]).sum(1).mean()
    assert method.loss(outputs, None).item() == pytest.approx(-cosines / 2, rel=1e-5)
    leaf = outputs[1].detach().requires_grad_()
    method.loss([outputs[0], leaf], None).backward()
    assert leaf.grad is not None
    assert leaf.grad[:, 0].abs().sum() > 0
    assert leaf.grad[:, 1].abs().sum() == 0


def test_moco_keeps_its_keys_after_the_loss() -> None:
    method = make("MoCo")
    outputs, keys = said(method, views=1), [torch.randn(12, 16)]
    method.observe(outputs, keys)
    assert torch.allclose(method.queue.rows[:12], keys[0] / keys[0].norm(dim=1, keepdim=True))  # type: ignore[union-attr, index]


def test_swav_uses_its_queue_once_it_is_full() -> None:
    method = make("SwAV", queue=24)
    plain = make("SwAV")
    outputs = said(method)
    for full in (False, False, True):
        same = torch.equal(method.loss(outputs, None), plain.loss(outputs, None))
        assert same != full
        method.observe([torch.randn(12, 8) for _ in range(2)], None)


def test_swav_prototypes_wait_and_stay_on_the_sphere() -> None:
    method = make("SwAV", frozen=0.1)
    weight = method.prototypes.weight  # type: ignore[union-attr]
    for progress, learns in ((0.05, False), (0.1, True)):
        method.progress = progress
        method.loss(said(method), None).backward()
        method.before_step()
        assert (weight.grad is not None) == learns  # type: ignore[union-attr]
    with torch.no_grad():
        weight.mul_(3)  # type: ignore[operator, union-attr]
    method.after_step()
    assert torch.allclose(weight.norm(dim=1), torch.ones(10))  # type: ignore[operator, union-attr]


def test_dino_warms_its_teacher_up_and_evaluates_at_the_end() -> None:
    method: Any = make("DINO", warmup=0.1)
    found = []
    for progress in (0.0, 0.05, 0.1, 0.7):
        method.progress = progress
        found.append(method.teacher_temperature())
    assert found == pytest.approx([0.04, 0.055, 0.07, 0.07])
    method.progress = 0.0
    assert method.eval().teacher_temperature() == 0.07


def test_dino_keeps_its_last_layer_at_first_and_its_centre_after_the_loss() -> None:
    method: Any = make("DINO", frozen=0.5)
    outputs, targets = said(method), [torch.randn(12, 20) for _ in range(2)]
    method.loss(outputs, targets).backward()
    method.before_step()
    assert method.projector.layers[-1].weight.grad is None
    assert method.projector.layers[0].weight.grad is not None
    method.observe(outputs, targets)
    assert torch.allclose(method.centre.centre, 0.1 * torch.cat(targets).mean(dim=0), atol=1e-6)


def test_last_layer_of_dino_says_cosines() -> None:
    layer, rows = UnitLinear(5, 3), torch.randn(4, 5)
    a, b = rows.double().numpy(), layer.weight.detach().double().numpy()
    expected = (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T
    assert np.allclose(layer(rows).detach().numpy(), expected, atol=1e-6)


def moved(make_it: Callable[[], nn.Module], by: float) -> nn.Module:
    module = make_it()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(by * torch.randn_like(parameter))
    return module


def test_the_teacher_follows_as_numpy_says() -> None:
    student: Any = moved(Tiny, 0.0)
    projector = make("BYOL").projector
    teacher = Teacher(student, projector)
    before = {name: value.double().numpy().copy() for name, value in teacher.named_parameters()}
    with torch.no_grad():
        for parameter in (*student.parameters(), *projector.parameters()):
            parameter.add_(torch.randn_like(parameter))
    now = {f"backbone.{name}": value for name, value in student.named_parameters()}
    now |= {f"projector.{name}": value for name, value in projector.named_parameters()}
    teacher.follow(student, projector, 0.9)
    assert set(now) == set(before)
    for name, value in teacher.named_parameters():
        expected = 0.9 * before[name] + 0.1 * now[name].detach().double().numpy()
        assert np.allclose(value.numpy(), expected, atol=1e-6), name
        assert not value.requires_grad


def test_a_teacher_trains_its_norms_where_the_student_does() -> None:
    student: Any = Tiny()
    teacher = Teacher(student, make("BYOL").projector)
    student.train()
    student.stages[0].eval()
    teacher.eval()
    teacher.share_mode(student, make("BYOL").projector)
    assert not teacher.backbone.stages[0][1].training  # type: ignore[index, union-attr]
    assert teacher.backbone.stages[1][1].training  # type: ignore[index, union-attr]


def test_momentum_rises_along_half_a_cosine() -> None:
    for progress in (0.0, 0.25, 0.5, 1.0, 1.2):
        expected = 1 - (1 - 0.996) * (np.cos(np.pi * min(1.0, progress)) + 1) / 2
        assert rising(0.996, 1.0, progress) == pytest.approx(expected, abs=1e-12)
    assert rising(0.999, 0.999, 0.3) == 0.999


def test_draws_belong_to_the_image_the_epoch_and_the_seed() -> None:
    index = torch.arange(1000)
    keys = image_keys(index, seed=3, epoch=2)
    assert torch.equal(image_keys(index.flip(0), seed=3, epoch=2).flip(0), keys)
    others = [
        image_keys(index, seed=3, epoch=1),
        image_keys(index, seed=4, epoch=2),
        image_keys(index, seed=2, epoch=3),
    ]
    assert torch.cat([keys, *others, image_keys(index, seed=3, epoch=-1)]).unique().numel() == 5000
    numbers = draws(keys, 8)
    assert torch.equal(draws(keys[5:6], 8), numbers[5:6])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers.mean(dim=0) - 0.5).abs().max() < 0.05
    assert (torch.corrcoef(numbers.T) - torch.eye(8)).abs().max() < 0.12


def test_draws_are_splitmix64() -> None:
    def split_mix(state: int) -> int:
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    keys = torch.tensor([0, 7, -5])
    expected = [
        [(split_mix((key + 0x9E3779B97F4A7C15 * place) % 2**64) >> 40) / 2**24 for place in (1, 2, 3)]
        for key in keys.tolist()
    ]
    assert np.array_equal(draws(keys, 3).numpy(), np.array(expected, np.float32))
