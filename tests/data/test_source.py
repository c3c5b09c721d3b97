"""The cache: the same samples, bad files included, from memory and from disk."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visiontasks.contracts import Sample, UsageError
from visiontasks.data import source as source_module
from visiontasks.data.image_folder import ImageFiles
from visiontasks.data.images import BadFile
from visiontasks.data.source import Cached, Source, Subset, fingerprint


class Made:
    """Samples with every annotation, of differing shapes; number 2 is bad, number 3 has no objects."""

    def __init__(self, size: int = 6) -> None:
        self.size = size
        self.reads = 0

    def __len__(self) -> int:
        return self.size

    def name(self, index: int) -> str:
        return f"made/{index}"

    def __getitem__(self, index: int) -> Sample:
        self.reads += 1
        if index == 2:
            raise BadFile(self.name(index), "is bad")
        generator, count = np.random.default_rng(index), 0 if index == 3 else index + 1
        shape = (8 + index, 12)
        return Sample(
            image=generator.integers(0, 256, (*shape, 3)).astype(np.uint8),
            label=index,
            mask=generator.integers(0, 5, shape).astype(np.uint8),
            masks=generator.integers(0, 2, (count, *shape)).astype(np.uint8),
            bboxes=generator.random((count, 4)).astype(np.float32),
            labels=generator.integers(0, 9, count),
        )


def assert_same(found: Sample, expected: Sample) -> None:
    given: Any = found
    assert given.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_array_equal(given[key], value)
        assert np.asarray(given[key]).dtype == np.asarray(value).dtype, key


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_cached_samples_are_the_same(kind: Any, tmp_path: Path) -> None:
    made = Made()
    cached: Source = Cached(made, kind, folder=tmp_path)
    reads = made.reads
    assert len(cached) == 6
    assert cached.name(4) == "made/4"
    for index in (5, 0, 1, 3, 4):
        assert_same(cached[index], made[index])
    assert made.reads == reads + 5  # those of the comparison
    with pytest.raises(BadFile, match="made/2: is bad"):
        cached[2]


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_cached_sample_cannot_be_spoilt(kind: Any, tmp_path: Path) -> None:
    cached = Cached(Made(), kind, folder=tmp_path)
    cached[0]["mask"][:] = 7
    with pytest.raises(ValueError, match="read-only"):
        cached[0]["image"][:] = 7
    assert_same(cached[0], Made()[0])


def test_disk_is_read_again_and_made_anew_for_other_data(tmp_path: Path) -> None:
    Cached(Made(), "disk", folder=tmp_path)
    again = Made()
    Cached(again, "disk", folder=tmp_path)
    assert again.reads == 3  # the fingerprint's
    other = Made(7)
    assert_same(Cached(other, "disk", folder=tmp_path)[6], other[6])
    assert len([*tmp_path.iterdir()]) == 2  # nothing half-written is left


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path)
    before = fingerprint(ImageFiles([path] * 5), None)
    assert before == fingerprint(ImageFiles([path] * 5), None) != fingerprint(ImageFiles([path] * 5), 3)
    Image.new("RGB", (4, 5)).save(path)
    assert fingerprint(ImageFiles([path] * 5), None) != before


def test_large_images_are_shrunk_to_what_training_needs(tmp_path: Path) -> None:
    sizes = {"large.png": (40, 20), "small.png": (9, 6), "tall.png": (15, 31)}
    for name, size in sizes.items():
        Image.new("RGB", size, (10, 200, 30)).save(tmp_path / name)
    cached = Cached(ImageFiles(sorted(tmp_path.iterdir())), "ram", size=10)
    assert [cached[index]["image"].shape for index in range(3)] == [(10, 20, 3), (6, 9, 3), (21, 10, 3)]
    assert (cached[0]["image"] == (10, 200, 30)).all()
    assert_same(Cached(Made(), "ram", size=4)[1], Made()[1])  # boxes and masks would no longer fit


def test_memory_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_free_memory", lambda: 1000)
    with pytest.raises(UsageError, match=r"data\.cache=disk"):
        Cached(Made(), "ram")


def test_a_subset_keeps_the_order_given() -> None:
    subset = Subset(Made(), np.array([5, 0]))
    assert len(subset) == 2
    assert subset.name(0) == "made/5"
    assert subset[1]["label"] == 0
