"""Masks as indices whatever the file, every wrong one named before training, and classes counted as numpy counts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from visiontasks.contracts import Sample, UsageError
from visiontasks.data import Camvid, DigitScenes, MaskFolder
from visiontasks.data.augment import native, scale_and_crop
from visiontasks.data.images import BadFile
from visiontasks.data.mask_folder import read_table
from visiontasks.data.masks import ColourMasks, IndexMasks, MaskFiles, Pair, median_frequency, survey
from visiontasks.data.module import collate
from visiontasks.data.source import Cached, Source

RNG = np.random.default_rng(0)
COLOURS = [(0, 0, 0), (200, 10, 30), (7, 120, 255)]
Mask = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def random_mask(shape: tuple[int, int] = (12, 16), values: Sequence[int] = (0, 1, 2)) -> Mask:
    return RNG.choice(np.array(values, np.uint8), shape)


def save_image(path: Path, shape: tuple[int, int] = (12, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)).save(path)


def save_mask(path: Path, mask: Mask, kind: str = "grey") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "colour":
        Image.fromarray(np.array(COLOURS, np.uint8)[mask]).save(path)
        return
    picture = Image.fromarray(mask)
    if kind == "palette":
        picture.putpalette(RNG.integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)


def folder(root: Path, count: int = 10, *, kind: str = "grey", values: Sequence[int] = (0, 1, 2)) -> dict[str, Mask]:
    masks = {f"{number:02d}": random_mask(values=values) for number in range(count)}
    for stem, mask in masks.items():
        save_image(root / "images" / f"{stem}.jpg")
        save_mask(root / "masks" / f"{stem}.png", mask, kind)
    return masks


def made(root: Path, **options: Any) -> MaskFolder:
    given = {"classes": ["sky", "road", "tree"], "image_size": 8, "batch_size": 2, "eval_transform": native, **options}
    return MaskFolder(root, **given)


def names(source: Source) -> list[str]:
    return [Path(source.name(index)).stem for index in range(len(source))]


@pytest.mark.parametrize("kind", ["grey", "palette", "colour"])
def test_masks_of_every_kind_are_read_as_indices(tmp_path: Path, kind: str) -> None:
    masks = folder(tmp_path, kind=kind)
    rows = zip(("sky", "road", "tree"), COLOURS, strict=True)
    (tmp_path / "classes.csv").write_text("name,r,g,b\n" + "".join(f"{n},{r},{g},{b}\n" for n, (r, g, b) in rows))
    data = made(tmp_path, classes=None)
    data.setup()
    assert data.classes == data.target_classes == ("sky", "road", "tree")
    assert data.sizes() == {"train": 8, "val": 1, "test": 1}
    for split in ("train", "val", "test"):
        source = data.source(split)
        for index, name in enumerate(names(source)):
            np.testing.assert_array_equal(source[index]["mask"], masks[name])
    batch = next(iter(data.val_dataloader()))
    np.testing.assert_array_equal(batch["mask"][0], masks[names(data.source("val"))[0]])


def test_splits_are_a_partition_by_the_seed(tmp_path: Path) -> None:
    folder(tmp_path, 20)
    parts = {split: names(made(tmp_path, val_fraction=0.2, test_fraction=0.3).source(split)) for split in SPLITS}
    assert {split: len(part) for split, part in parts.items()} == {"train": 10, "val": 4, "test": 6}
    assert sorted(name for part in parts.values() for name in part) == [f"{number:02d}" for number in range(20)]
    assert parts == {s: names(made(tmp_path, val_fraction=0.2, test_fraction=0.3).source(s)) for s in SPLITS}
    assert names(made(tmp_path, seed=1).source("val")) != names(made(tmp_path).source("val"))
    alike = made(tmp_path, test_fraction=0)
    assert names(alike.source("test")) == names(alike.source("val"))
    with pytest.raises(UsageError, match="leave nothing to train on"):
        made(tmp_path, val_fraction=0.5, test_fraction=0.6).source("train")


SPLITS = ("train", "val", "test")


def test_split_folders_and_what_has_none(tmp_path: Path) -> None:
    folder(tmp_path / "train", 10)
    folder(tmp_path / "valid", 3)
    data = made(tmp_path)
    assert [len(data.source(split)) for split in SPLITS] == [9, 3, 1]
    folder(tmp_path / "test", 2)
    assert [len(made(tmp_path).source(split)) for split in SPLITS] == [10, 3, 2]


def test_orphans_are_counted_and_some_named(tmp_path: Path) -> None:
    folder(tmp_path)
    for number in range(5):
        save_image(tmp_path / "images" / f"alone{number}.jpg")
    save_mask(tmp_path / "masks" / "widow.png", random_mask())
    with pytest.raises(UsageError, match=r"5 images without a mask .*alone0.jpg.*\.\.\.\).* 1 masks .*widow.png"):
        made(tmp_path).setup()


def test_two_files_of_one_stem_are_named(tmp_path: Path) -> None:
    folder(tmp_path)
    save_image(tmp_path / "images" / "00.png")
    with pytest.raises(UsageError, match=r"00.jpg and .*00.png have the same name"):
        made(tmp_path).setup()


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_value_outside_the_classes_is_named_before_training(tmp_path: Path, split: str) -> None:
    folder(tmp_path)
    name = names(made(tmp_path).source(split))[-1]
    mask = random_mask()
    mask[3, 5] = 7
    save_mask(tmp_path / "masks" / f"{name}.png", mask)
    data = made(tmp_path)
    with pytest.raises(
        UsageError, match=rf"1 of \d+ {split} .*{name}.png holds the value 7 at row 3, column 5.*0 to 2"
    ):
        data.setup()
    tolerant = made(tmp_path, max_bad_fraction=1.0)
    tolerant.setup()
    assert [Path(path).stem for path in tolerant.bad_files] == [name]
    unchecked = made(tmp_path)
    unchecked.select(frozenset())
    unchecked.setup()  # without masks none is read


def test_a_colour_of_no_class_is_named(tmp_path: Path) -> None:
    folder(tmp_path, kind="colour")
    picture = np.array(COLOURS, np.uint8)[random_mask()]
    picture[4, 6] = (1, 2, 3)
    Image.fromarray(picture).save(tmp_path / "masks" / "03.png")
    (tmp_path / "classes.csv").write_text("sky,0,0,0\nroad,200,10,30\ntree,7,120,255\n")
    with pytest.raises(UsageError, match=r"03.png holds the colour \(1, 2, 3\) at row 4, column 6"):
        made(tmp_path, classes=None, test_fraction=0).setup()
    ignoring = made(tmp_path, classes=None, test_fraction=0, ignore_index=[[1, 2, 3]])
    ignoring.setup()
    found = [ignoring.source(s)[i]["mask"] for s in ("train", "val") for i in range(len(ignoring.source(s)))]
    assert sum(int((mask == 255).sum()) for mask in found) == 1


def test_colours_without_colours_in_the_table_say_what_to_write(tmp_path: Path) -> None:
    folder(tmp_path, kind="colour")
    with pytest.raises(UsageError, match="is in colour and the classes have no colours"):
        made(tmp_path).setup()


def test_a_mask_of_another_size_is_named(tmp_path: Path) -> None:
    folder(tmp_path)
    save_mask(tmp_path / "masks" / "04.png", random_mask((12, 17)))
    with pytest.raises(UsageError, match=r"04.png has 17 x 12 pixels and its image .*04.jpg has 16 x 12"):
        made(tmp_path, test_fraction=0).setup()


def test_a_jpeg_is_no_mask(tmp_path: Path) -> None:
    Image.fromarray(random_mask()).save(tmp_path / "a.jpg")
    for reader in (IndexMasks([0, 1, 2]), ColourMasks(COLOURS)):
        with pytest.raises(BadFile, match="JPEG"):
            reader(str(tmp_path / "a.jpg"))


def test_ignored_values_leave_the_classes_and_the_counts(tmp_path: Path) -> None:
    masks = folder(tmp_path, values=(0, 1, 2, 9, 255))
    data = made(tmp_path, classes=["sky", "void", "tree"], ignore_index=[1, 9])
    data.setup()
    assert data.classes == ("sky", "tree")
    train = [masks[name] for name in names(data.source("train"))]
    assert data.class_counts().tolist() == [sum(int((mask == value).sum()) for mask in train) for value in (0, 2)]
    assert set(np.unique(data.source("train")[0]["mask"])) == {0, 1, 255}


def test_binary_masks_of_0_and_255_are_explained_and_mended_by_a_table(tmp_path: Path) -> None:
    masks = folder(tmp_path, values=(0, 255))
    with pytest.raises(UsageError, match=r"hold background and .*255,thing"):
        made(tmp_path, classes=["background", "thing"]).setup()
    for table in ("0,background\n255,thing\n", "background,0,0,0\nthing,255,255,255\n"):
        (tmp_path / "classes.csv").write_text(table)
        data = made(tmp_path, classes=None)
        data.setup()
        source = data.source("train")
        np.testing.assert_array_equal(source[0]["mask"], masks[names(source)[0]] == 255)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sky\nold road\n\ntree\n", [("sky", 0, None), ("old road", 1, None), ("tree", 2, None)]),
        ("index,name\n0,sky\n7,road\n", [("sky", 0, None), ("road", 7, None)]),
        ("0 sky\n1 old road\n", [("sky", 0, None), ("old road", 1, None)]),
        ("\ufeffsky, 1, 2, 3\nroad;4;5;6\n", [("sky", 0, (1, 2, 3)), ("road", 1, (4, 5, 6))]),
    ],
)
def test_tables(tmp_path: Path, text: str, expected: list[Any]) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(text, encoding="utf-8")
    assert [tuple(row) for row in read_table(path)] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sky\n1,road\n", "has the line '1,road'"),
        ("sky,1,2\n", "has the line 'sky,1,2'"),
        ("sky\nsky\n", "the name sky"),
        ("0,sky\n0,road\n", "the number 0"),
        ("sky,1,2,3\nroad,1,2,3\n", r"the colour \(1, 2, 3\)"),
    ],
)
def test_tables_that_contradict_themselves(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_table(path)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no folder"):
        made(tmp_path / "nowhere").setup()
    with pytest.raises(UsageError, match="neither images nor train"):
        made(tmp_path).setup()
    folder(tmp_path)
    with pytest.raises(UsageError, match=r"holds no classes.txt"):
        made(tmp_path, classes=None).setup()
    with pytest.raises(UsageError, match="cannot hold 300"):
        made(tmp_path, ignore_index=300).setup()


class Given:
    """Masks in memory."""

    def __init__(self, masks: list[Mask]) -> None:
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> Sample:
        return Sample(image=np.zeros((*self.masks[index].shape, 3), np.uint8), mask=self.masks[index])

    def name(self, index: int) -> str:
        return f"given/{index}"


def test_counts_and_weights_are_those_of_the_definition(tmp_path: Path) -> None:
    masks = [random_mask(values=values) for values in ((0, 0, 0, 1), (0, 1, 255), (0, 0, 2), (0,))]
    found = survey(Given(masks), 4, folder=tmp_path)
    assert found.pixels == [sum(int((mask == value).sum()) for mask in masks) for value in range(4)]
    frequencies = []
    for value in range(3):
        having = [mask[mask != 255] for mask in masks if (mask == value).any()]
        frequencies.append(np.mean(np.concatenate(having) == value))
    np.testing.assert_allclose(median_frequency(found), [*(np.median(frequencies) / frequencies), 1.0])


def test_a_survey_is_kept_until_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder(tmp_path / "data")
    stems = [f"{number:02d}" for number in range(10)]
    pairs = [Pair(*(str(tmp_path / "data" / part) for part in (f"images/{s}.jpg", f"masks/{s}.png"))) for s in stems]
    first = survey(MaskFiles(pairs, IndexMasks(range(3))), 3, folder=tmp_path / "kept")

    def refuse(self: MaskFiles, index: int) -> Mask:
        raise AssertionError("was looked at again")

    with monkeypatch.context() as patched:
        patched.setattr(MaskFiles, "mask", refuse)
        assert survey(MaskFiles(pairs, IndexMasks(range(3))), 3, folder=tmp_path / "kept") == first
        with pytest.raises(AssertionError):  # other meanings of the same files
            survey(MaskFiles(pairs, IndexMasks([2, 1, 0])), 3, folder=tmp_path / "kept")
    save_mask(tmp_path / "data" / "masks" / "01.png", random_mask((12, 16), values=(1,)))
    again = survey(MaskFiles(pairs, IndexMasks(range(3))), 3, folder=tmp_path / "kept")
    assert again.pixels != first.pixels


def test_the_disk_cache_notices_a_changed_mask(tmp_path: Path) -> None:
    folder(tmp_path / "data")
    stems = [f"{number:02d}" for number in range(10)]
    pairs = [Pair(*(str(tmp_path / "data" / part) for part in (f"images/{s}.jpg", f"masks/{s}.png"))) for s in stems]
    files = MaskFiles(pairs, IndexMasks(range(3)))
    before = Cached(files, "disk", folder=tmp_path / "kept")[1]["mask"]
    save_mask(tmp_path / "data" / "masks" / "01.png", 2 - before)
    np.testing.assert_array_equal(Cached(files, "disk", folder=tmp_path / "kept")[1]["mask"], 2 - before)


def test_scenes_are_counted_with_their_background() -> None:
    data = DigitScenes(image_size=32, train_size=40, val_size=2, test_size=2)
    data.select(frozenset({"mask"}))
    data.setup()
    assert data.target_classes == ("background", *"0123456789")
    counts = data.class_counts()
    masks = [data.source("train")[index]["mask"] for index in range(40)]
    np.testing.assert_array_equal(counts, np.bincount(np.concatenate(masks).ravel(), minlength=11))
    assert len(data.class_weights()) == 11
    data.select(frozenset({"labels"}))
    assert data.target_classes == tuple("0123456789")
    with pytest.raises(UsageError, match="counted in masks, and the task uses labels"):
        data.class_counts()


def test_images_of_several_sizes_make_lists(tmp_path: Path) -> None:
    folder(tmp_path)
    for number, shape in enumerate([(12, 16), (20, 9), (12, 16), (5, 5)]):
        save_image(tmp_path / "val" / "images" / f"{number}.png", shape)
        save_mask(tmp_path / "val" / "masks" / f"{number}.png", random_mask(shape))
    (tmp_path / "images").rename(tmp_path / "val" / "unused")
    (tmp_path / "masks").rename(tmp_path / "val" / "unused_masks")
    folder(tmp_path / "train")
    data = made(tmp_path, batch_size=4, train_transform=scale_and_crop, image_size=[8, 12])
    (tmp_path / "val" / "images" / "1.png").write_bytes(b"broken")
    with pytest.raises(UsageError, match=r"1.png"):
        data.setup()
    data = made(tmp_path, batch_size=4, train_transform=scale_and_crop, image_size=[8, 12], max_bad_fraction=0.5)
    batch = data.on_before_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert [Path(name).name for name in data.bad_files] == ["1.png"]
    assert batch["index"].tolist() == [0, 2, 3]
    source = data.source("val")
    for position, image, mask in zip((0, 2, 3), batch["image"], batch["mask"], strict=True):
        np.testing.assert_array_equal(image, source[position]["image"].transpose(2, 0, 1))
        np.testing.assert_array_equal(mask, source[position]["mask"])
    train = next(iter(data.train_dataloader()))
    assert train["image"].shape == (4, 3, 8, 12)
    assert train["mask"].shape == (4, 8, 12)
    assert collate([source[0], source[2]])["mask"].shape == (2, 12, 16)


@pytest.mark.parametrize("size", [0, [8, 8, 8], [], ["a", 3]])
def test_a_size_that_is_none_is_named(tmp_path: Path, size: Any) -> None:
    with pytest.raises(UsageError, match=r"data.image_size=.* is no size"):
        made(tmp_path, image_size=size)
    with pytest.raises(UsageError, match=r"data.image_size="):
        DigitScenes(image_size=[64, 64])  # type: ignore[arg-type]


def test_real_camvid(shared_data: Path) -> None:
    data = Camvid(shared_data / "camvid", train_transform=scale_and_crop, eval_transform=native, image_size=[240, 320])
    data.setup()
    assert data.sizes() == {"train": 367, "val": 101, "test": 101}
    assert len(data.classes) == 11
    masks = [np.asarray(Image.open(path)) for path in (shared_data / "camvid" / "trainannot").iterdir()]
    counts = np.bincount(np.stack(masks).ravel(), minlength=12)
    np.testing.assert_array_equal(data.class_counts(), counts[:11])
    batch = next(iter(data.test_dataloader()))
    assert batch["image"].shape == (32, 3, 360, 480)
    first = np.asarray(Image.open(sorted((shared_data / "camvid" / "valannot").iterdir())[0]))
    np.testing.assert_array_equal(batch["mask"][0], np.where(first == 11, 255, first))
