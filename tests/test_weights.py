"""Weights from every kind of file, and every way not to fit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from visiontasks.backbones import CifarResNet
from visiontasks.contracts import UsageError
from visiontasks.weights import load_backbone, load_strictly, read_state_dict


def network(in_channels: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 3))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("wrapper", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_reads_what_people_save(tmp_path: Path, wrapper: str | None, prefix: str) -> None:
    state = network().state_dict()
    written = {prefix + name: tensor for name, tensor in state.items()}
    torch.save({wrapper: written, "epoch": 3} if wrapper else written, tmp_path / "a.pth")
    assert_equal(read_state_dict(tmp_path / "a.pth"), state)


def test_reads_safetensors(tmp_path: Path) -> None:
    state = dict(network().state_dict())
    save_file(state, tmp_path / "a.safetensors")
    assert_equal(read_state_dict(tmp_path / "a.safetensors"), state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_and_counters_stay_integers(tmp_path: Path, dtype: torch.dtype) -> None:
    state = network().to(dtype).state_dict()
    torch.save(state, tmp_path / "a.pt")
    found = read_state_dict(tmp_path / "a.pt")
    assert {tensor.dtype for name, tensor in found.items() if "num_batches" not in name} == {torch.float32}
    assert found["1.num_batches_tracked"].dtype == torch.int64
    assert torch.equal(found["0.weight"], state["0.weight"].float())


def checkpoint(state: dict[str, Tensor]) -> dict[str, object]:
    named = {f"backbone.{name}": tensor for name, tensor in state.items()}
    return {"pytorch-lightning_version": "2.6.6", "state_dict": {**named, "head.weight": torch.zeros(1)}}


def test_reads_the_backbone_of_a_run_best_before_last(tmp_path: Path) -> None:
    best, last = network().state_dict(), network().state_dict()
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    torch.save(checkpoint(last), folder / "last.ckpt")
    assert_equal(read_state_dict(tmp_path), last)
    torch.save(checkpoint(best), folder / "best.ckpt")
    assert_equal(read_state_dict(tmp_path), best)
    assert_equal(read_state_dict(folder / "last.ckpt"), last)


def test_a_checkpoint_without_a_backbone_is_refused(tmp_path: Path) -> None:
    torch.save(
        {"pytorch-lightning_version": "2.6.6", "state_dict": {"head.weight": torch.zeros(1)}}, tmp_path / "a.ckpt"
    )
    with pytest.raises(UsageError, match=r"a\.ckpt holds no tensors under `backbone\.`"):
        read_state_dict(tmp_path / "a.ckpt")


@pytest.mark.parametrize(
    "content", [b"", b"<html>404</html>", b"\x80\x02garbage", b"PK\x03\x04broken", bytes(range(256)) * 4]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_hold_no_weights_are_named(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    file.write_bytes(content)
    with pytest.raises(UsageError, match=rf"a\{suffix} cannot be read as weights") as error:
        read_state_dict(file)
    assert "\n" not in str(error.value)


class Hostile:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("executed",))


@pytest.mark.parametrize("payload", [[1, 2], {"a": 1, "b": torch.zeros(1)}, {}, torch.zeros(2)])
def test_files_of_other_things_are_named(tmp_path: Path, payload: object) -> None:
    torch.save(payload, tmp_path / "a.pth")
    with pytest.raises(UsageError, match=r"a\.pth holds no state dict"):
        read_state_dict(tmp_path / "a.pth")


def test_code_in_a_file_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"a": Hostile()}, tmp_path / "a.pth")
    with pytest.raises(UsageError, match="not tensors alone"):
        read_state_dict(tmp_path / "a.pth")
    assert "executed" not in capsys.readouterr().out


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere\.pth is no file and no run folder"):
        read_state_dict(tmp_path / "nowhere.pth")
    with pytest.raises(UsageError, match=r"no checkpoints/best\.ckpt or last\.ckpt"):
        read_state_dict(tmp_path)


def test_a_receipt_says_all() -> None:
    source = network()
    receipt = load_strictly(
        target := network(), {**source.state_dict(), "fc": torch.zeros(1)}, source="x", expected_left_over={"fc", "fc2"}
    )
    assert_equal(target.state_dict(), source.state_dict())
    assert (receipt.missing, receipt.left_over, receipt.reshaped, receipt.share) == ((), ("fc",), (), 1.0)
    assert str(receipt) == "x: 9 tensors arrived (100.0% of the parameters), none reshaped, none missing, 1 left over"


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
