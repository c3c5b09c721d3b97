"""What every file in conf/backbone promises, on small images."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor, nn

from visiontasks.layers.freezing import FreezableBackbone, stage_parameters
from visiontasks.weights import load_backbone

CONF = Path(__file__).resolve().parents[2] / "conf"
NAMES = sorted(file.stem for file in (CONF / "backbone").glob("[!_]*.yaml"))
OPTIONS = {"weights", "in_channels", "frozen_stages", "output_stride"}


def make(name: str, **options: object) -> FreezableBackbone:
    overrides = [f"+backbone={name}", *(f"backbone.{key}={value}" for key, value in options.items())]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(overrides=overrides).backbone
    assert set(config) >= OPTIONS
    torch.manual_seed(0)
    backbone = instantiate(config)
    assert isinstance(backbone, FreezableBackbone)
    return backbone


def images_for(backbone: FreezableBackbone) -> Tensor:
    side = 32 if backbone.levels[-1].stride < 32 else 64
    return torch.randn(2, backbone.in_channels, side, side, generator=torch.Generator().manual_seed(1))


def check_grid(backbone: FreezableBackbone, images: Tensor, features: list[Tensor]) -> None:
    height, width = images.shape[-2:]
    expected = [(2, channels, height // stride, width // stride) for channels, stride in backbone.levels]
    assert [tuple(feature.shape) for feature in features] == expected


@pytest.fixture(scope="module", params=NAMES)
def backbone(request: pytest.FixtureRequest) -> FreezableBackbone:
    return make(request.param)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    return str(request.node.callspec.params["backbone"])


def test_levels_are_on_the_grid_and_gradients_reach_every_parameter(backbone: FreezableBackbone) -> None:
    strides = [stride for _, stride in backbone.levels]
    assert strides == sorted(set(strides))
    images = images_for(backbone)
    features = backbone.train()(images)
    check_grid(backbone, images, features)
    torch.autograd.backward([feature.square().mean() for feature in features])
    assert [name for name, parameter in backbone.named_parameters() if not learns(parameter)] == []
    backbone.zero_grad()


def learns(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None and bool(parameter.grad.isfinite().all())


def test_modes_reach_every_module(backbone: FreezableBackbone) -> None:
    assert all(module.training for module in backbone.train().modules())
    assert not any(module.training for module in backbone.eval().modules())


def test_statistics_are_one_number_a_channel(backbone: FreezableBackbone) -> None:
    assert len(backbone.mean) == len(backbone.std) == backbone.in_channels == 3
    assert all(0 <= mean < 1 for mean in backbone.mean)
    assert all(0 < std <= 1 for std in backbone.std)


def test_state_moves_into_a_grey_frozen_instance_whose_first_stage_then_stays(
    backbone: FreezableBackbone, name: str
) -> None:
    frozen = make(name, in_channels=1, frozen_stages=1)
    assert frozen.levels == backbone.levels
    assert frozen.mean == pytest.approx((sum(backbone.mean) / 3,))
    receipt = load_backbone(frozen, backbone.state_dict(), source=name)
    assert (len(receipt.reshaped), receipt.share) == (1, 1)

    grey = images_for(frozen)
    with torch.no_grad():
        expected = copy.deepcopy(backbone).eval()(grey.expand(-1, 3, -1, -1))
        found = frozen.eval()(grey)
    check_grid(frozen, grey, found)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()))

    first, *others = stage_parameters(frozen)
    assert {key for key, parameter in frozen.named_parameters() if not parameter.requires_grad} == set(first)
    still = {*first, *statistics_beside(first, frozen)}
    before = {key: value.clone() for key, value in frozen.state_dict().items() if key in still}
    with_parameters = next(stage for stage in reversed(others) if stage)
    last = frozen.get_parameter(with_parameters[-1]).detach().clone()
    train_one_step(frozen, grey)
    assert [key for key, value in before.items() if not torch.equal(frozen.state_dict()[key], value)] == []
    assert not torch.equal(frozen.get_parameter(with_parameters[-1]), last)


def train_one_step(backbone: FreezableBackbone, images: Tensor) -> None:
    optimiser = torch.optim.SGD([parameter for parameter in backbone.parameters() if parameter.requires_grad], lr=1.0)
    features = backbone.train()(images)
    torch.autograd.backward(torch.stack([feature.sum() for feature in features]).sum())
    optimiser.step()


def statistics_beside(parameters: list[str], backbone: FreezableBackbone) -> set[str]:
    modules = {name.rpartition(".")[0] for name in parameters}
    return {name for name, _ in backbone.named_buffers() if name.rpartition(".")[0] in modules}


@pytest.mark.exhaustive
def test_state_dict_round_trip(backbone: FreezableBackbone, name: str) -> None:
    again = make(name)
    again.load_state_dict(backbone.state_dict())
    images = images_for(backbone)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again.eval()(images), backbone.eval()(images), strict=True))


@pytest.mark.exhaustive
def test_pickles(backbone: FreezableBackbone) -> None:
    images = images_for(backbone)
    again = pickle.loads(pickle.dumps(backbone.eval()))
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(images), backbone(images), strict=True))


@pytest.mark.exhaustive
def test_exports(backbone: FreezableBackbone) -> None:
    images = images_for(backbone)
    program = torch.export.export(backbone.eval(), (images,))
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), backbone(images), rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
def test_compiles_as_one_graph(backbone: FreezableBackbone) -> None:
    torch._dynamo.reset()
    compiled = copy.deepcopy(backbone).eval()
    compiled.compile(backend="eager", fullgraph=True)
    images = images_for(backbone)
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), backbone.eval()(images), rtol=1e-4, atol=1e-4)
    assert compiled.state_dict().keys() == backbone.state_dict().keys()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["resnet20", "squeezenet1_1"])
def test_compiles_by_inductor(name: str) -> None:
    torch._dynamo.reset()
    backbone = make(name).eval()
    images = images_for(backbone)
    with torch.no_grad():
        expected = backbone(images)
        backbone.compile()
        torch.testing.assert_close(backbone(images), expected, rtol=1e-3, atol=1e-3)
