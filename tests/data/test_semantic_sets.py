"""Published sets in tiny imitations of their folders, offline."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visiontasks.contracts import UsageError
from visiontasks.data import ADE20K, Camvid, Cityscapes, OxfordPet, VocSegmentation
from visiontasks.data.mask_data import MaskData

RNG = np.random.default_rng(0)
SHAPE = (6, 8)


@pytest.fixture(autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise URLError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def pair(image: Path, mask: Path, values: range | list[int], *, palette: bool = False) -> NDArray[np.uint8]:
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*SHAPE, 3), dtype=np.uint8)).save(image)
    raw = RNG.choice(np.array(values, np.uint8), SHAPE)
    picture = Image.fromarray(raw)
    if palette:
        picture.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(mask)
    return raw


def check(data: MaskData, raw: dict[str, NDArray[np.uint8]], meaning: Callable[[int], int], sizes: list[int]) -> None:
    """Every mask is the raw one with each value replaced by what it means."""
    data.setup()
    assert list(data.sizes().values()) == sizes
    table = np.array([meaning(value) for value in range(256)])
    for split in ("train", "val", "test"):
        source = data.source(split)
        for index in range(len(source)):
            stem = Path(source.name(index)).stem
            np.testing.assert_array_equal(source[index]["mask"], table[raw[stem]])
    assert data.class_counts().shape == (len(data.target_classes),)


@pytest.mark.parametrize("tested", [False, True])
def test_camvid(tmp_path: Path, tested: bool) -> None:
    raw = {}
    for split, count in {"train": 4, "val": 3, **({"test": 2} if tested else {})}.items():
        for number in range(count):
            stem = f"{split}{number}"
            files = tmp_path / split / f"{stem}.png", tmp_path / f"{split}annot" / f"{stem}.png"
            raw[stem] = pair(*files, range(12))
    data = Camvid(tmp_path, batch_size=2)
    check(data, raw, lambda value: value if value < 11 else 255, [4, 3, 2 if tested else 3])
    assert data.classes[0] == "Sky"
    assert data.classes[10] == "Bicyclist"
    with pytest.raises(UsageError, match=r"trainannot"):
        Camvid(tmp_path / "train").setup()


def test_voc(tmp_path: Path) -> None:
    home, raw = tmp_path / "VOCdevkit" / "VOC2012", {}
    (home / "ImageSets" / "Segmentation").mkdir(parents=True)
    for part, count in (("train", 3), ("val", 2)):
        stems = [f"2007_{part}{number}" for number in range(count)]
        (home / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            files = home / "JPEGImages" / f"{stem}.jpg", home / "SegmentationClass" / f"{stem}.png"
            raw[stem] = pair(*files, [0, 1, 15, 20, 255], palette=True)
    data = VocSegmentation(tmp_path, batch_size=2)
    check(data, raw, lambda value: value, [3, 2, 2])
    assert len(data.classes) == 20
    assert data.target_classes[0] == "background"
    assert data.target_classes[15] == "person"


@pytest.mark.parametrize("kind", ["labelIds", "labelTrainIds"])
def test_cityscapes(tmp_path: Path, kind: str) -> None:
    raw, values = {}, range(34) if kind == "labelIds" else [*range(19), 255]
    for part, stem in (("train", "a_0_1"), ("train", "b_0_2"), ("val", "c_0_1")):
        image = tmp_path / "leftImg8bit" / part / stem[0] / f"{stem}_leftImg8bit.png"
        raw[f"{stem}_leftImg8bit"] = pair(
            image, tmp_path / "gtFine" / part / stem[0] / f"{stem}_gtFine_{kind}.png", values
        )
    data = Cityscapes(tmp_path, batch_size=2)
    ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14,
           28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
    check(data, raw, (lambda value: ids.get(value, 255)) if kind == "labelIds" else lambda value: value, [2, 1, 1])
    assert data.classes[0] == "road"
    assert data.classes[18] == "bicycle"
    next((tmp_path / "gtFine" / "val").glob("*/*")).unlink()
    with pytest.raises(UsageError, match=rf"c_0_1_gtFine_{kind}.png does not exist"):
        Cityscapes(tmp_path, batch_size=2).setup()


@pytest.mark.parametrize("boundary", [False, True])
def test_oxford_pet(tmp_path: Path, boundary: bool) -> None:
    home, raw = tmp_path / "oxford-iiit-pet", {}
    (home / "annotations").mkdir(parents=True)
    for part, count in (("trainval", 10), ("test", 3)):
        stems = [f"Abyssinian_{part}{number}" for number in range(count)]
        (home / "annotations" / f"{part}.txt").write_text("".join(f"{stem} 1 1 1\n" for stem in stems))
        for stem in stems:
            files = home / "images" / f"{stem}.jpg", home / "annotations" / "trimaps" / f"{stem}.png"
            raw[stem] = pair(*files, [1, 2, 3])
    data = OxfordPet(tmp_path, batch_size=2, boundary=boundary, val_fraction=0.2)
    check(data, raw, lambda value: {2: 0, 1: 1, 3: 2 if boundary else 255}.get(value, 255), [8, 2, 3])
    assert data.target_classes == ("background", "pet", *(["boundary"] if boundary else []))


def test_ade20k(tmp_path: Path) -> None:
    raw = {}
    for part, count in (("training", 3), ("validation", 2)):
        for number in range(count):
            stem = f"ADE_{part}_{number}"
            files = tmp_path / "images" / part / f"{stem}.jpg", tmp_path / "annotations" / part / f"{stem}.png"
            raw[stem] = pair(*files, range(151))
    words = [f"thing {number}, other" for number in range(148)] + ["screen, silver screen", "screen, CRT screen"]
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"] + [f"{i}\t0.1\t1\t1\t0\t{name}" for i, name in enumerate(words, 1)]
    (tmp_path / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    data = ADE20K(tmp_path, batch_size=2)
    check(data, raw, lambda value: value - 1 if value else 255, [3, 2, 2])
    assert data.classes[0] == "thing 0"
    assert data.classes[149] == "screen, CRT screen"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (VocSegmentation, "VOC2012 is not in .* could not be downloaded .*no network.*data.root=FOLDER"),
        (OxfordPet, "OxfordPet is not in .* could not be downloaded .*no network.*data.root=FOLDER"),
        (Cityscapes, r"holds no leftImg8bit/train.*data.root=FOLDER"),
        (ADE20K, r"holds no .*sceneparsing.*data.root=FOLDER"),
        (Camvid, "holds no folder train.*data.root=FOLDER"),
    ],
)
def test_what_is_missing_is_said_offline(tmp_path: Path, make: Callable[..., MaskData], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(tmp_path).setup()
