"""Published sets in tiny imitations of their files, offline."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from numpy.typing import NDArray

from visiontasks.contracts import UsageError
from visiontasks.data import CIFAR10, MNIST, FashionMNIST, torchvision_sets
from visiontasks.data.torchvision_sets import read_idx


def idx(array: NDArray[np.uint8]) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx(folder: Path, *, suffix: str = "") -> dict[str, NDArray[np.uint8]]:
    """100 images to train on, ten of each class, and 20 to test on."""
    folder.mkdir(parents=True, exist_ok=True)
    generator, images = np.random.default_rng(0), {}
    for name, count in (("train", 100), ("t10k", 20)):
        images[name] = generator.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for part, array in (("images-idx3-ubyte", images[name]), ("labels-idx1-ubyte", labels)):
            data = idx(array)
            (folder / f"{name}-{part}{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    return images


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", refuse)
    monkeypatch.setattr(FashionMNIST, "places", ())


@pytest.mark.parametrize(("below", "suffix"), [("MNIST/raw", ""), (".", ""), (".", ".gz"), ("MNIST/raw", ".gz")])
def test_idx_files_in_every_place(tmp_path: Path, below: str, suffix: str) -> None:
    images = write_idx(tmp_path / below, suffix=suffix)
    data = MNIST(root=tmp_path, val_fraction=0.2, batch_size=8)
    data.setup()
    assert data.sizes() == {"train": 80, "val": 20, "test": 20}
    assert data.classes == tuple("0123456789")
    assert not data.mirror
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (8, 3, 28, 28)
    assert batch["label"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    for channel in range(3):
        np.testing.assert_array_equal(batch["image"][:, channel], images["t10k"][:8])


def test_val_is_cut_from_train_class_by_class(tmp_path: Path) -> None:
    images = write_idx(tmp_path)
    data = MNIST(root=tmp_path, val_fraction=0.2)
    parts = {split: data.source(split) for split in ("train", "val")}
    labels = [parts["val"][index]["label"] for index in range(20)]
    assert np.bincount(labels).tolist() == [2] * 10  # type: ignore[arg-type]
    found = {source[index]["image"][..., 0].tobytes() for source in parts.values() for index in range(len(source))}
    assert found == {image.tobytes() for image in images["train"]}


def test_read_idx_agrees_with_torchvision(tmp_path: Path) -> None:
    from torchvision.datasets.mnist import read_image_file

    write_idx(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte"
    np.testing.assert_array_equal(read_idx(path), read_image_file(str(path)).numpy())


@pytest.mark.parametrize(
    ("data", "message"),
    [(b"", "no idx file"), (b"<html>", "no idx file"), (idx(np.zeros((3, 4), np.uint8))[:-1], "11 bytes where")],
)
def test_files_that_are_no_idx(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(UsageError, match=message):
        read_idx(tmp_path / "a")
    (tmp_path / "a.gz").write_bytes(gzip.compress(data)[:-9])
    with pytest.raises(UsageError, match="fetch it again"):
        read_idx(tmp_path / "a.gz")


def test_images_without_their_labels(tmp_path: Path) -> None:
    write_idx(tmp_path)
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(99, np.uint8)))
    with pytest.raises(UsageError, match="100 train images but 99 labels"):
        MNIST(root=tmp_path).setup()


@pytest.mark.parametrize("made", [CIFAR10, MNIST, FashionMNIST])
def test_data_that_are_nowhere(tmp_path: Path, made: Any) -> None:
    with pytest.raises(
        UsageError, match=f"{made.__name__} is not in {tmp_path} and could not be downloaded.*data.root="
    ):
        made(root=tmp_path).setup()


def test_fashion_is_named_and_found_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_idx(tmp_path / "elsewhere", suffix=".gz")
    monkeypatch.setattr(FashionMNIST, "places", (tmp_path / "elsewhere",))
    data = FashionMNIST(root=tmp_path)
    data.setup()
    assert data.classes[-1] == "Ankle boot"
    assert len(data.classes) == 10
    assert data.mirror


def test_cifar_in_the_layout_of_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    flat = np.random.default_rng(0).integers(0, 256, (40, 3, 32, 32)).astype(np.uint8)
    batch = {"data": flat.reshape(40, -1), "labels": [index % 10 for index in range(40)]}
    for name in ("data_batch_1", "test_batch"):
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", None]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", None]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": None})
    data = CIFAR10(root=tmp_path, val_fraction=0.5, batch_size=4)
    data.setup()
    assert data.classes == tuple("abcdefghij")
    assert data.sizes() == {"train": 20, "val": 20, "test": 40}
    np.testing.assert_array_equal(data.source("test")[3]["image"], flat[3].transpose(1, 2, 0))


def test_processes_download_one_at_a_time(tmp_path: Path) -> None:
    import fcntl

    with torchvision_sets._locked(tmp_path), (tmp_path / ".lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_an_archive_that_grows_beyond_all_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visiontasks.data.torchvision_sets._MOST_IDX", 1000)
    (tmp_path / "bomb.gz").write_bytes(gzip.compress(bytes(100_000)))
    with pytest.raises(UsageError, match="more than 1,000 bytes"):
        read_idx(tmp_path / "bomb.gz")
