"""Archives that are whole or not there."""

import random
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from visiontasks import durable
from visiontasks.contracts import UsageError
from visiontasks.durable import save_archive, verify
from visiontasks.weights import read_tensors


def content(step: int) -> dict[str, Any]:
    return {"step": step, "words": ["a", None, 1.5], "weight": torch.full((40, 50), float(step))}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoints" / "last.ckpt"
    save_archive(content(1), made)
    return made


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_it_and_a_copy_alone_is_vouched_for(file: Path, tmp_path: Path, *, mmap: bool) -> None:
    alone = Path(shutil.copy(file, tmp_path / "sent.ckpt"))
    assert verify(file)
    assert verify(alone)
    stored = torch.load(alone, weights_only=True, mmap=mmap)
    assert stored["words"] == ["a", None, 1.5]
    assert torch.equal(stored["weight"], content(1)["weight"])


def test_the_one_before_moves_aside(file: Path) -> None:
    save_archive(content(2), file, keep_as=file.with_name("previous.ckpt"))
    save_archive(content(3), file, keep_as=file.with_name("previous.ckpt"))
    assert {each.name: torch.load(each)["step"] for each in file.parent.iterdir()} == {
        "last.ckpt": 3,
        "previous.ckpt": 2,
    }


def damaged(whole: bytes, kind: str, draw: random.Random) -> bytes:
    data = bytearray(whole)
    if kind == "cut":
        del data[draw.choice((draw.randrange(len(data)), len(data) - draw.randint(1, 120))) :]
    elif kind == "flip":
        data[draw.choice((draw.randrange(len(data)), draw.randint(-120, 60)))] ^= 1 << draw.randrange(8)
    else:
        middle = len(data) // 2
        data[:100], data[middle : middle + 100] = data[middle : middle + 100], data[:100]
        data[-50:], data[200:250] = (data[-50:], data[200:250]) if draw.random() < 0.5 else (data[200:250], data[-50:])
    return bytes(data)


@pytest.mark.parametrize("kind", ["flip", "cut", "swap"])
def test_what_is_damaged_is_refused(file: Path, kind: str) -> None:
    whole, draw = file.read_bytes(), random.Random(0)
    for _ in range(60):
        file.write_bytes(damaged(whole, kind, draw))
        with pytest.raises(UsageError, match=r"last.ckpt is damaged"):
            verify(file)


def test_weights_of_our_own_are_checked_and_those_of_others_taken(file: Path, tmp_path: Path) -> None:
    foreign, older = tmp_path / "theirs.pth", tmp_path / "old.pth"
    torch.save({"weight": torch.ones(2)}, foreign)
    torch.save({"weight": torch.ones(2)}, older, _use_new_zipfile_serialization=False)
    assert not verify(foreign)
    assert not verify(older, foreign=True)
    assert read_tensors(foreign)["weight"].tolist() == read_tensors(older)["weight"].tolist() == [1, 1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UsageError, match="damaged"):
        read_tensors(file)


@pytest.mark.parametrize("room", [0, 2000, 8000])
def test_a_full_disk_leaves_the_one_before(file: Path, room: int) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(UsageError, match=r"last.ckpt could not be written \(File too large\); .* is untouched"):
            save_archive(content(2), file, keep_as=file.with_name("previous.ckpt"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [each.name for each in file.parent.iterdir()] == ["last.ckpt"]
    assert verify(file)
    assert torch.load(file)["step"] == 1


class _Death(BaseException):
    pass


@pytest.mark.parametrize("step", ["_write", "_sync", "_Signed.finish"])
def test_an_end_within_a_save_leaves_a_whole_one(file: Path, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: Any) -> None:
        raise _Death

    monkeypatch.setattr(f"{durable.__name__}.{step}", die)
    with pytest.raises(_Death):
        save_archive(content(2), file, keep_as=file.with_name("previous.ckpt"))
    kept = [each for each in file.parent.iterdir() if each.suffix == ".ckpt"]
    assert all(verify(each) for each in kept)
    assert torch.load(file)["step"] == (2 if step == "_sync" else 1)
