"""Converted sets: the same samples and batches as the map-style set, for any workers, processes and places."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.test_annotations import coco, coco_object, quick, write_coco
from tests.data.test_module import NoiseData
from visiontasks.contracts import UsageError
from visiontasks.data import BadFile, CocoJson, DataModule, DigitScenes, ImageFolder, MaskFolder, Streaming
from visiontasks.data.conversion import convert
from visiontasks.data.module import SPLITS
from visiontasks.data.sampling import chunk_order
from visiontasks.data.streaming import is_remote, make_room

Pair = tuple[Callable[..., DataModule], Path]  # makes the map-style set, and where its conversion lies
KINDS = ("scenes", "one digit", "folder", "coco", "masks")


def scenes(**options: Any) -> DigitScenes:
    sizes = {"train_size": 41, "val_size": 9, "test_size": 11, "image_size": 24, "batch_size": 8, "cache": None}
    return DigitScenes(**{**sizes, **options})


def photographs(root: Path) -> None:
    """JPEG, PNG, palette and a turned one, in two classes."""
    generator = np.random.default_rng(0)
    for number in range(20):
        image = Image.fromarray(generator.integers(0, 256, (20 + number % 3, 26, 3), np.uint8).repeat(2, 1))
        path = root / ("cat", "dog")[number % 2] / f"{number:02d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[0x0112] = 6
        image.save(path.with_suffix(".jpg"), exif=exif) if number % 3 else image.quantize(9).save(
            path.with_suffix(".png")
        )


def objects(root: Path) -> None:
    content = coco(root)
    content["annotations"].append(coco_object(9, 8, (10, 8, 20, 16), category_id=3, iscrowd=1))
    write_coco(root, content)


def masks(root: Path) -> None:
    generator = np.random.default_rng(1)
    for name, last in (("images", 256), ("masks", 3)):
        (root / name).mkdir(parents=True)
        for number in range(10):
            shape = (20, 24, 3) if name == "images" else (20, 24)
            Image.fromarray(generator.integers(0, last, shape, np.uint8)).save(root / name / f"{number}.png")
    (root / "classes.txt").write_text("ground\ntree\nsky\n")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    root = tmp_path_factory.mktemp("sets")
    photographs(root / "photographs")
    (root / "objects").mkdir()
    objects(root / "objects")
    masks(root / "labelled")
    small = {"image_size": 16, "batch_size": 2}
    makers: dict[str, Callable[..., DataModule]] = {
        "scenes": scenes,
        "one digit": lambda **options: scenes(digits=(1, 1), **options),
        "folder": lambda **options: ImageFolder(root / "photographs", **small, **options),
        "coco": lambda **options: CocoJson(root / "objects", **quick(), **options),
        "masks": lambda **options: MaskFolder(root / "labelled", **small, **options),
    }
    assert tuple(makers) == KINDS
    for name, make in makers.items():
        data = make()
        data.setup()
        convert(data, root / "converted" / name, chunk_mb=0.01, progress=False)
    return {name: (make, root / "converted" / name) for name, make in makers.items()}


def alike(one: DataModule, place: str | Path, **options: Any) -> Streaming:
    """The conversion with the options of the map-style set."""
    given = {"image_size": one.image_size, "batch_size": one.batch_size}
    return Streaming(place, **{**given, **options})


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, dict):
        return list(first) == list(second) and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return bool(first == second)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_are_those_of_the_map_style_set(sets: dict[str, Pair], kind: str) -> None:
    make, place = sets[kind]
    given = make()
    given.setup()
    streamed = alike(given, place)
    streamed.setup()
    assert streamed.classes == given.classes
    assert streamed.target_classes == given.target_classes
    assert streamed.provides == given.keys
    assert streamed.sizes() == given.sizes()
    assert streamed.mirror == given.mirror
    assert getattr(streamed, "category_ids", None) == getattr(given, "category_ids", None)
    for split in SPLITS:
        first, second = given.source(split), streamed.source(split)
        samples = [{key: first[index][key] for key in first[index] if key != "index"} for index in range(len(first))]  # type: ignore[literal-required]
        assert all(equal(sample, second[index]) for index, sample in enumerate(samples))
        assert all(first.name(index).endswith(second.name(index)) for index in range(len(first)))


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_one_order_are_equal_to_the_bit(sets: dict[str, Pair], kind: str) -> None:
    make, place = sets[kind]
    given = make()
    streamed = alike(given, place, shuffle="full")
    for name in ("train_dataloader", "val_dataloader", "test_dataloader"):
        loaders = [getattr(data, name)() for data in (given, streamed)]
        for loader in loaders:
            loader.sampler.set_epoch(3)
        first, second = (list(loader) for loader in loaders)
        assert len(first) == len(second) > 0
        assert all(map(equal, first, second))


def indices(data: DataModule, *, rank: int = 0, world: int = 1, epoch: int = 0) -> list[list[int]]:
    data.trainer = SimpleNamespace(world_size=world, global_rank=rank, lightning_module=None, training=True)  # type: ignore[assignment]
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return [batch["index"].tolist() for batch in loader]


def test_any_number_of_workers_gives_the_same_batches(sets: dict[str, Pair]) -> None:
    make, place = sets["scenes"]
    given = make()
    batches = [list(alike(given, place, num_workers=workers).train_dataloader()) for workers in (0, 2)]
    assert len(batches[0]) == 5
    assert all(map(equal, *batches))


def test_two_processes_see_different_chunks_and_together_each_sample_once(sets: dict[str, Pair]) -> None:
    make, place = sets["scenes"]
    given = make()
    one = indices(alike(given, place, lanes=2))
    parts = [indices(alike(given, place, lanes=2, batch_size=4), rank=rank, world=2) for rank in range(2)]
    assert [sorted(a + b) for a, b in zip(*parts, strict=True)] == [sorted(batch) for batch in one]
    source: Any = alike(given, place).source("train")
    chunks = [set(np.searchsorted(source.ends, sum(part, []), side="right").tolist()) for part in parts]  # noqa: RUF017
    assert len(source.sizes) > 6
    assert len(chunks[0] & chunks[1]) <= 1  # the one that the cut between the two goes through
    seen = sum((sum(part, []) for part in parts), [])  # noqa: RUF017
    assert len(seen) == len(set(seen)) == 40  # 41 but for the incomplete batch
    assert indices(alike(given, place)) != indices(alike(given, place), epoch=1)


def test_an_epoch_goes_on_at_any_batch(sets: dict[str, Pair]) -> None:
    make, place = sets["scenes"]
    whole, resumed = (alike(make(), place).train_dataloader() for _ in range(2))
    for loader in (whole, resumed):
        loader.sampler.set_epoch(2)  # type: ignore[attr-defined]
    resumed.sampler.resume(epoch=2, batches=2)  # type: ignore[attr-defined]
    rest = list(resumed)
    assert len(rest) == 3
    assert all(map(equal, list(whole)[2:], rest))


def test_evaluation_counts_each_sample_once_on_any_number_of_processes(sets: dict[str, Pair]) -> None:
    make, place = sets["scenes"]
    seen: list[int] = []
    for rank in range(3):
        data = alike(make(), place)
        data.trainer = SimpleNamespace(world_size=3, global_rank=rank, lightning_module=None, training=False)  # type: ignore[assignment]
        seen += [index for batch in data.test_dataloader() for index in batch["index"].tolist()]
    assert sorted(seen) == list(range(11))


@pytest.mark.parametrize(("sizes", "lanes"), [([7, 7, 7, 7, 7, 7], 2), ([5, 9, 1, 30, 2], 3), ([3], 8), ([], 2)])
def test_an_order_is_a_permutation_of_the_seed_and_the_epoch(sizes: list[int], lanes: int) -> None:
    orders = {
        (seed, epoch): tuple(chunk_order(sizes, seed=seed, epoch=epoch, window=2, lanes=lanes).tolist())
        for seed in range(2)
        for epoch in range(3)
    }
    assert all(sorted(order) == list(range(sum(sizes))) for order in orders.values())
    assert orders[1, 2] == tuple(chunk_order(sizes, seed=1, epoch=2, window=2, lanes=lanes).tolist())
    if sum(sizes) > 10:
        assert len(set(orders.values())) == 6


def test_an_order_reads_few_chunks_at_a_time() -> None:
    sizes = [50] * 40
    chunks = chunk_order(sizes, seed=0, epoch=0, window=3, lanes=2) // 50
    for start in range(0, 2000 - 200, 100):
        assert len(set(chunks[start : start + 100].tolist())) <= 2 * (2 * 3 + 1)
    neighbours = np.mean(chunks[:-2:2] == chunks[2::2])
    assert neighbours < 0.6  # samples of several chunks are mixed: 1 / 3 were they drawn from three at random


def test_what_is_not_needed_is_left_out(sets: dict[str, Pair]) -> None:
    make, place = sets["scenes"]
    data = alike(make(), place)
    data.select(frozenset({"mask"}))
    data.setup()
    assert data.source("val")[0].keys() == {"image", "mask"}
    assert next(iter(data.val_dataloader())).keys() == {"image", "mask", "index"}
    with pytest.raises(UsageError, match=r"needs label .*converted with it"):
        data.select(frozenset({"label"}))


def test_labels_are_known_without_a_look_at_the_samples(sets: dict[str, Pair]) -> None:
    make, place = sets["folder"]
    given, streamed = make(fraction=0.5), alike(make(), place, fraction=0.5)
    given.setup()
    streamed.setup()
    assert equal(list(given.train_dataloader()), list(streamed.train_dataloader()))


def test_files_are_copied_byte_for_byte(sets: dict[str, Pair]) -> None:
    make, place = sets["folder"]
    given = make()
    given.setup()
    source = given.source("train")
    chunks = b"".join(path.read_bytes() for path in (place / "train").glob("*.bin"))
    assert all(Path(source.name(index)).read_bytes() in chunks for index in range(len(source)))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_object_store_gives_the_same_batches_and_keeps_no_more_than_its_room(
    sets: dict[str, Pair], tmp_path: Path, workers: int
) -> None:
    make, place = sets["scenes"]
    given = make()
    near = alike(given, place)
    far = alike(given, f"local:{place}", folder=tmp_path, disk=5e-5, num_workers=workers)  # LitData's store for tests
    assert is_remote(far.root)
    assert all(map(equal, near.train_dataloader(), far.train_dataloader()))
    assert all(map(equal, near.test_dataloader(), far.test_dataloader()))
    kept = [path.stat().st_size for path in tmp_path.rglob("*.bin")]
    largest = max(path.stat().st_size for path in place.rglob("*.bin"))
    assert 0 < sum(kept) <= 2 * (5e4 + 2 * largest)  # of two splits, and of the two workers at the last moment


def test_room_is_made_by_what_was_longest_unused(tmp_path: Path) -> None:
    import os

    for age, name in enumerate("abcd"):
        (tmp_path / f"{name}.bin").write_bytes(b"0" * 100)
        os.utime(tmp_path / f"{name}.bin", (1000 - age, 1000 - age))
    make_room(tmp_path / "d.bin", 250)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "d"]


def test_bad_files_are_bad_in_the_conversion_too(tmp_path: Path) -> None:
    data = NoiseData(bad=frozenset({3}), max_bad_fraction=0.3)
    data.setup()
    done = convert(data, tmp_path / "kept", progress=False)
    assert [error.path for error in done["train"].bad] == ["noise/3"]
    streamed = alike(data, tmp_path / "kept", max_bad_fraction=0.3)
    streamed.setup()
    with pytest.raises(BadFile, match=r"^noise/3: is bad$"):
        streamed.source("train")[3]
    data.max_bad_fraction = 0
    with pytest.raises(UsageError, match=r"1 of the train files are bad, the last noise/3: is bad"):
        convert(data, tmp_path / "refused", progress=False)


def damaged(place: Path, copy: Path, damage: Callable[[bytes], bytes]) -> Path:
    """A copy of a converted set, its first training chunk damaged."""
    shutil.copytree(place, copy)
    chunk = copy / "train" / "chunk-0-0.bin"
    chunk.write_bytes(damage(chunk.read_bytes()))
    return copy


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "flipped": lambda data: data[:400] + bytes([data[400] ^ 1]) + data[401:],
    "cut": lambda data: data[:300],
    "zeros": lambda data: bytes(len(data)),
    "empty": lambda data: data[:0],
    "noise": lambda data: np.random.default_rng(0).bytes(len(data)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_chunk_is_one_sentence(sets: dict[str, Pair], tmp_path: Path, kind: str) -> None:
    make, place = sets["scenes"]
    given = make()
    data = alike(given, damaged(place, tmp_path / "copy", DAMAGE[kind]))
    with pytest.raises(UsageError, match=r"train files are bad: .*chunk-0-0.bin, sample 0,.*max_bad_fraction="):
        data.setup()
    data = alike(given, tmp_path / "copy", max_bad_fraction=1.0)
    wrong = {bad[1] for batch in data.train_dataloader() for bad in batch.get("bad", ())}
    assert len(wrong) >= 1
    assert all("chunk-0-0.bin" in path for path in wrong)


def test_a_missing_chunk_is_a_bad_file(sets: dict[str, Pair], tmp_path: Path) -> None:
    make, place = sets["scenes"]
    shutil.copytree(place, tmp_path / "copy")
    (tmp_path / "copy" / "train" / "chunk-0-0.bin").unlink()
    with pytest.raises(UsageError, match=r"chunk-0-0.bin, sample 0, cannot be read"):
        alike(make(), tmp_path / "copy").setup()


def altered(place: Path, file: str, **changes: Any) -> None:
    content = json.loads((place / file).read_text())
    for key, value in changes.items():
        holder, _, name = key.rpartition("__")
        (content[holder] if holder else content)[name] = value
    (place / file).write_text(json.dumps(content))


def test_a_set_that_would_execute_code_is_refused(sets: dict[str, Pair], tmp_path: Path) -> None:
    make, place = sets["scenes"]
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    altered(copy / "train", "index.json", config__data_format=["pickle"])
    with pytest.raises(UsageError, match="was not written by visiontasks convert"):
        alike(make(), copy).setup()
    shutil.copy(place / "train" / "index.json", copy / "train" / "index.json")
    chunks = json.loads((copy / "train" / "index.json").read_text())["chunks"]
    altered(copy / "train", "index.json", chunks=[chunks[0] | {"filename": "../../chunk-0-0.bin"}, *chunks[1:]])
    with pytest.raises(UsageError, match="was not written by visiontasks convert"):
        alike(make(), copy).setup()


def test_mistakes_are_one_sentence(sets: dict[str, Pair], tmp_path: Path) -> None:
    make, place = sets["scenes"]
    for root in (tmp_path, tmp_path / "none", f"local:{tmp_path}/none"):
        with pytest.raises(UsageError, match=r"holds no visiontasks.json, .*visiontasks convert"):
            Streaming(root, folder=tmp_path / "cache")
    for changes, words in (
        ({"shuffle": "all"}, "neither chunks nor full"),
        ({"lanes": 0}, "must both be 1 or more"),
    ):
        with pytest.raises(UsageError, match=words):
            Streaming(place, **changes)  # type: ignore[arg-type]
    copy = tmp_path / "copy"
    shutil.copytree(place, copy)
    (copy / "train" / "index.json").write_text("{")
    with pytest.raises(UsageError, match="holds no index of a converted split"):
        alike(make(), copy).setup()
    shutil.copy(place / "val" / "index.json", copy / "train" / "index.json")
    with pytest.raises(UsageError, match="holds 9 samples where 41 were converted"):
        alike(make(), copy).setup()
    altered(copy, "visiontasks.json", format=2)
    with pytest.raises(UsageError, match="is of format 2"):
        Streaming(copy)
    (copy / "visiontasks.json").write_text("[]")
    with pytest.raises(UsageError, match="is damaged"):
        Streaming(copy)


def test_a_conversion_refuses_a_folder_with_content_and_silly_chunks(sets: dict[str, Pair], tmp_path: Path) -> None:
    data = sets["scenes"][0]()
    data.setup()
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not empty"):
        convert(data, tmp_path, progress=False)
    with pytest.raises(UsageError, match="no size of a chunk"):
        convert(data, tmp_path / "new", chunk_mb=4096, progress=False)


def test_a_missing_engine_is_one_sentence(
    sets: dict[str, Pair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, place = sets["scenes"]
    data = make()
    data.setup()
    monkeypatch.setitem(sys.modules, "litdata", None)
    with pytest.raises(UsageError, match=r"pip install 'visiontasks\[streaming\]'"):
        Streaming(place)
    with pytest.raises(UsageError, match=r"pip install 'visiontasks\[streaming\]'"):
        convert(data, tmp_path / "new", progress=False)


def test_a_cache_of_decoded_samples_lies_over_the_chunks(sets: dict[str, Pair], tmp_path: Path) -> None:
    from visiontasks.data.source import Cached, fingerprint

    make, place = sets["scenes"]
    source = alike(make(), place).source("val")
    cached = Cached(source, "disk", folder=tmp_path)
    assert all(equal(cached[index], source[index]) for index in range(len(source)))
    assert fingerprint(source, None) != fingerprint(alike(make(), place).source("test"), None)
