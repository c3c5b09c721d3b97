"""Weights from every kind of file, and every way not to fit."""

from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from visiontasks.backbones import CifarResNet, TorchvisionBackbone
from visiontasks.contracts import UsageError
from visiontasks.weights import load_backbone, load_strictly, read_tensors

Net = Mapping[str, Tensor]


def network(in_channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
def test_reads_tensors_by_dotted_names(tmp_path: Path, wrapper: str | None) -> None:
    state = network().state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "a.pth")
    assert_equal(read_tensors(tmp_path / "a.pth"), {f"{wrapper}.{k}" if wrapper else k: v for k, v in state.items()})


def test_reads_safetensors(tmp_path: Path) -> None:
    state = dict(network().state_dict())
    save_file(state, tmp_path / "a.safetensors")
    assert_equal(read_tensors(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_counters_stay_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    state = network().to(dtype).state_dict()
    torch.save(state, tmp_path / "a.pt")
    found = read_tensors(tmp_path / "a.pt")
    assert {tensor.dtype for name, tensor in found.items() if "num_batches" not in name} == {torch.float32}
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(found["0.weight"], state["0.weight"].float())


def test_reads_the_best_of_a_run_before_its_last(tmp_path: Path) -> None:
    best, last = dict(network().state_dict()), dict(network().state_dict())
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(last, folder / "last.ckpt")
    assert_equal(read_tensors(tmp_path), last)
    torch.save(best, folder / "best.ckpt")
    assert_equal(read_tensors(tmp_path), best)
    assert_equal(read_tensors(folder / "last.ckpt"), last)


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"\x80\x02garbage", b"PK\x03\x04broken", bytes(range(256)) * 4]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_weights_are_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    said = "is damaged" if content.startswith(b"PK") else "cannot be read as weights"
    with pytest.raises(UsageError, match=rf"a\{suffix} {said}") as error:
        read_tensors(file)
    assert "\n" not in str(error.value)


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize("payload", [[1, 2], {"a": 1}, {}, torch.zeros(2)])
def test_files_of_other_things_are_named(tmp_path: Path, payload: object) -> None:
    torch.save(payload, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"a\.pth holds no state dict"):
        read_tensors(tmp_path / "a.pth")


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Hostile()}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="not tensors alone"):
        read_tensors(tmp_path / "a.pth")
    assert "executed" not in capsys.readouterr().out


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pth is no file and no run folder"):
        read_tensors(tmp_path / "nowhere.pth")
    with pytest.raises(UsageError, match=r"no checkpoints/best\.ckpt or last\.ckpt"):
        read_tensors(tmp_path)


def test_a_receipt_says_all() -> None:
    source = network()
    receipt = load_strictly(
        target := network(), {**source.state_dict(), "fc": torch.zeros(1)}, source="x", expected_left_over={"fc", "fc2"}
    )
    assert_equal(target.state_dict(), source.state_dict())
    assert (receipt.missing, receipt.left_over, receipt.reshaped, receipt.share) == ((), ("fc",), (), 1.0)
    assert (
        str(receipt)
        == "x: 9 tensors arrived (100.0% of the parameters), none reshaped, none missing, 1 (1 fc) left over"
    )


def spoil(state: dict[str, Tensor], fault: str) -> dict[str, Tensor]:
    if fault == "missing":
        return {name: tensor for name, tensor in state.items() if name != "2.bias"}
    if fault == "of another shape":
        return {**state, "2.bias": torch.zeros(6)}
    return {**state, "3.bias": torch.zeros(6)}


@pytest.mark.parametrize(
    ("fault", "name"), [("missing", "2.bias"), ("of another shape", "2.bias"), ("left over", "3.bias")]
)
def test_what_does_not_fit_is_refused_and_nothing_is_loaded(fault: str, name: str) -> None:
    target = network()
    before = {key: tensor.clone() for key, tensor in target.state_dict().items()}
    match = 9 if fault == "left over" else 8
    with pytest.raises(UsageError, match=rf"x does not fit .*: {match} of its 9 tensors match, 1 {fault} \({name}\)"):
        load_strictly(target, spoil(network().state_dict(), fault), source="x")
    assert_equal(target.state_dict(), before)


def test_counters_that_old_files_lack_keep_their_values() -> None:
    state = {name: tensor for name, tensor in network().state_dict().items() if "num_batches" not in name}
    receipt = load_strictly(network(), state, source="x")
    assert (receipt.missing, receipt.share) == (("1.num_batches_tracked",), 1.0)


@pytest.mark.parametrize("in_channels", [1, 2, 4, 6])
def test_the_first_convolution_answers_equal_channels_as_it_did(in_channels: int) -> None:
    source, target = network(), network(in_channels)
    receipt = load_strictly(target, source.state_dict(), source="x")
    assert receipt.reshaped == ("0.weight",)
    grey = torch.randn(1, 1, 8, 8)
    if in_channels % 3 and in_channels != 1:
        assert target.state_dict()["0.weight"].shape[1] == in_channels
        return
    torch.testing.assert_close(target[0](grey.expand(-1, in_channels, -1, -1)), source[0](grey.expand(-1, 3, -1, -1)))


def test_only_the_first_convolution_and_only_from_three_channels() -> None:
    with pytest.raises(UsageError, match=r"1 of another shape \(0\.weight\)"):
        load_strictly(network(3), network(1).state_dict(), source="x")
    with pytest.raises(UsageError, match=r"of another shape"):
        load_strictly(network(), {**network().state_dict(), "2.weight": torch.zeros(5, 3, 3, 3)}, source="x")


def test_published_and_own_names_both_load() -> None:
    source = CifarResNet(depth=8)
    published = {**source.net.state_dict(), "linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}
    for state in (published, source.state_dict()):
        receipt = load_backbone(target := CifarResNet(depth=8), state, source="x")
        assert receipt.share == 1
        assert_equal(target.state_dict(), source.state_dict())


def test_weights_of_another_backbone_are_refused_with_counts() -> None:
    with pytest.raises(UsageError, match=r"this CifarResNet resnet14: \d+ of its \d+ tensors match, 30 missing"):
        load_backbone(CifarResNet(depth=14), CifarResNet(depth=8).state_dict(), source="x")


def below(prefix: str, net: Net) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in net.items()}


def noise(net: Net) -> dict[str, Tensor]:
    return {name: torch.randn_like(tensor, dtype=torch.float32) for name, tensor in net.items()}


PROJECTOR = {"0.weight": torch.zeros(8, 64), "2.weight": torch.zeros(8, 8)}
OPTIMISER = {"optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]}}
FORMATS: dict[str, tuple[Callable[[Net], object], int]] = {  # as published -> file, tensors that are left over
    "data parallel": (lambda net: {"state_dict": below("module.", net), "epoch": 3}, 0),
    "moco v2": (
        lambda net: {
            "arch": "resnet50",
            "state_dict": {
                **below("module.encoder_k.", noise(net)),
                **below("module.encoder_q.", net),
                **below("module.encoder_q.fc.", PROJECTOR),
                "module.queue": torch.zeros(8, 4),
            },
            **OPTIMISER,
        },
        4,
    ),
    "moco v3": (
        lambda net: {
            "state_dict": {
                **below("module.base_encoder.", net),
                **below("module.base_encoder.fc.", PROJECTOR),
                **below("module.momentum_encoder.", noise(net)),
                **below("module.predictor.", PROJECTOR),
            }
        },
        4,
    ),
    "dino": (
        lambda net: {
            "student": {**below("module.backbone.", noise(net)), **below("module.head.", PROJECTOR)},
            "teacher": {**below("backbone.", net), **below("head.", PROJECTOR)},
            "args": Namespace(lr=0.1),
            **OPTIMISER,
        },
        5,
    ),
    "lightly": (
        lambda net: {
            "state_dict": {
                **below("backbone.", net),
                **below("backbone_momentum.", noise(net)),
                **below("projection_head.layers.", PROJECTOR),
            },
            "pytorch-lightning_version": "2.0",
        },
        2,
    ),
    "solo-learn": (
        lambda net: {
            "state_dict": {
                **below("momentum_backbone.", noise(net)),
                **below("backbone.", net),
                **below("projector.", PROJECTOR),
                "classifier.weight": torch.zeros(10, 64),
            },
            "hyper_parameters": OmegaConf.create({"method": "byol", "crops": [224, 224], "lr": None}),
            "pytorch-lightning_version": "1.9",
        },
        3,
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_published_formats(tmp_path: Path, name: str) -> None:
    source = CifarResNet(depth=8)
    make, besides = FORMATS[name]
    written = make(source.net.state_dict())
    torch.save(written, tmp_path / "a.pth")
    receipt = load_backbone(target := CifarResNet(depth=8), tmp_path / "a.pth")
    assert_equal(target.state_dict(), source.state_dict())
    copies = sum("momentum" in left or "student" in left or "_k." in left for left in receipt.left_over)
    extra = [left for left in receipt.left_over if not left.endswith(tuple(source.net.state_dict()))]
    assert (receipt.share, len(extra)) == (1.0, besides)
    assert copies >= (len(source.state_dict()) if name not in {"data parallel"} else 0)


def test_positions_in_a_sequential_of_the_children() -> None:
    source = TorchvisionBackbone(name="resnet18")
    children = nn.Sequential(*source.net.children(), nn.AdaptiveAvgPool2d(1))
    state = {**below("backbone.", children.state_dict()), "projection_head.0.weight": torch.zeros(3)}
    assert "backbone.4.0.conv1.weight" in state
    receipt = load_backbone(target := TorchvisionBackbone(name="resnet18"), state, source="x")
    assert_equal(target.state_dict(), source.state_dict())
    assert receipt.left_over == ("projection_head.0.weight",)


def test_a_deeper_network_is_refused_below_any_prefix() -> None:
    deeper = below("teacher.backbone.", CifarResNet(depth=14).net.state_dict())
    with pytest.raises(
        UsageError, match=r"resnet8: 42 of its 42 tensors match, 36 left over \(teacher\.backbone\.layer1"
    ):
        load_backbone(CifarResNet(depth=8), deeper, source="x")


def test_what_may_be_missing_is_said_and_stays_as_it_was() -> None:
    source, target = CifarResNet(depth=8), CifarResNet(depth=8)
    state = {name: tensor for name, tensor in source.net.state_dict().items() if not name.startswith("layer3")}
    state["conv1.weight"] = torch.zeros(16, 3, 7, 7)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(UsageError, match=r"1 of another shape .*init_allow_missing=\[layer3,conv1\]"):
        load_backbone(target, below("module.", state), source="x")
    receipt = load_backbone(target, below("module.", state), source="x", allow_missing=["layer3", "conv1"])
    arrived = {name for name in before if not name.startswith(("net.layer3", "net.conv1"))}
    assert set(receipt.arrived) == arrived
    assert set(receipt.missing) == before.keys() - arrived
    expected = {name: source.state_dict()[name] if name in arrived else before[name] for name in before}
    assert_equal(target.state_dict(), expected)
    numbers = {name: parameter.numel() for name, parameter in target.named_parameters()}
    assert receipt.share == pytest.approx(sum(numbers.get(n, 0) for n in arrived) / sum(numbers.values()))


def test_allowances_end_at_a_dot() -> None:
    state = {name: tensor for name, tensor in CifarResNet(depth=8).net.state_dict().items() if "layer3" not in name}
    with pytest.raises(UsageError, match="9 missing"):
        load_backbone(CifarResNet(depth=8), state, source="x", allow_missing=["layer", "net.layer3.0.conv1"])


def test_settings_beside_the_tensors_are_never_called(tmp_path: Path) -> None:
    class Calls:
        def __reduce__(self) -> tuple[object, ...]:
            return (Namespace, (), {"a": Hostile()})

    torch.save({"state_dict": network().state_dict(), "args": Calls()}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="not tensors alone"):
        read_tensors(tmp_path / "a.pth")
