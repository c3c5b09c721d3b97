"""Readers of annotated objects: the layouts that users have, classes and ids both ways, splits, crowds and masks."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.data.test_annotations import (
    GOOD,
    HEIGHT,
    WIDTH,
    coco,
    coco_object,
    penn,
    quick,
    voc,
    voc_object,
    write_coco,
    write_voc,
    yolo,
)
from visiontasks.contracts import UsageError
from visiontasks.data import CocoJson, PennFudan, VocXml, YoloTxt
from visiontasks.data.object_files import ObjectData


def names(data: ObjectData, split: str) -> list[str]:
    source = data.source(split)
    return [Path(source.name(index)).stem for index in range(len(source))]


def test_coco_ids_are_mapped_both_ways(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["annotations"].append(coco_object(9, 8, (10, 8, 20, 16), category_id=3))
    write_coco(tmp_path, content)
    data = CocoJson(tmp_path, **quick())
    data.setup()
    assert data.classes == ("car", "dog")
    assert data.category_ids == (3, 18)
    whole = data.objects()["train"]
    assert whole.labels.tolist() == [1, 1, 0, 1, 1]
    assert whole.areas.tolist() == [300, 300, 80, 300, 300]
    ids = {data.image_id(split, index) for split in ("train", "val") for index in range(data.sizes()[split])}
    assert ids == {7, 8, 9, 10}
    for index in range(len(data.source("val"))):
        assert data.image_id("val", index) == 7 + "abcd".index(names(data, "val")[index])


def test_splits_are_cut_by_the_seed_alone(tmp_path: Path) -> None:
    write_coco(tmp_path, coco(tmp_path))
    data = CocoJson(tmp_path, **quick() | {"test_fraction": 0.25})
    parts = [names(data, split) for split in ("train", "val", "test")]
    assert sorted(sum(parts, [])) == list("abcd")  # noqa: RUF017
    assert [len(part) for part in parts] == [2, 1, 1]
    assert parts == [
        names(CocoJson(tmp_path, **quick() | {"test_fraction": 0.25}), s) for s in ("train", "val", "test")
    ]
    assert names(CocoJson(tmp_path, **quick()), "test") == names(CocoJson(tmp_path, **quick()), "val")


def test_crowds_are_for_evaluation_alone(tmp_path: Path) -> None:
    content = coco(tmp_path)
    for image in range(4):
        content["annotations"].append(coco_object(20 + image, 7 + image, (1, 1, 30, 28), iscrowd=1, area=77.5))
    write_coco(tmp_path, content)
    data = CocoJson(tmp_path, **quick())
    train, val = next(iter(data.train_dataloader())), next(iter(data.val_dataloader()))
    assert not train.keys() & {"crowd", "area"}
    assert len(train["labels"][0]) <= 1
    assert val["crowd"][0].tolist() == [0, 1]
    assert val["area"][0].tolist() == [300, 77.5]
    assert val["bboxes"][0].shape == (2, 4)


def test_images_without_objects_train(tmp_path: Path) -> None:
    content = coco(tmp_path)
    content["annotations"] = content["annotations"][:1]
    write_coco(tmp_path, content)
    batches = list(CocoJson(tmp_path, **quick()).train_dataloader())
    shapes = {tuple(batch["bboxes"][0].shape) for batch in batches}
    assert (0, 4) in shapes
    assert all(len(batch["labels"][0]) == len(batch["masks"][0]) == len(batch["bboxes"][0]) for batch in batches)


def test_masks_are_those_of_the_file(tmp_path: Path) -> None:
    content = coco(tmp_path)
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    drawn[3:9, 2:11] = 1
    ends = np.flatnonzero(np.diff(drawn.ravel("F"), prepend=0, append=0))
    counts = np.diff(ends, prepend=0, append=drawn.size).tolist()
    outline = {"size": [HEIGHT, WIDTH], "counts": counts}
    content["annotations"][0] |= {"bbox": [2, 3, 9, 6], "segmentation": outline}
    write_coco(tmp_path, content)
    data = CocoJson(tmp_path, **quick() | {"val_fraction": 0.01})
    sources = [data.source("train"), data.source("val")]
    source = {Path(part.name(index)).stem: part[index] for part in sources for index in range(len(part))}
    np.testing.assert_array_equal(source["a"]["masks"][0], drawn)
    filled = np.zeros((HEIGHT, WIDTH), np.uint8)
    filled[5:20, 4:24] = 1
    np.testing.assert_array_equal(source["b"]["masks"][0], filled)


def test_masks_that_are_not_there_are_not_provided(tmp_path: Path) -> None:
    content = coco(tmp_path)
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    write_coco(tmp_path, content)
    data = CocoJson(tmp_path, **quick())
    data.setup()
    assert data.provides == {"bboxes", "labels"}
    with pytest.raises(UsageError, match=r"needs masks and coco_json provides bboxes, labels:"):
        CocoJson(tmp_path, **quick()).select(frozenset({"bboxes", "labels", "masks"}))


@pytest.mark.parametrize(
    "places",
    [
        {"train": "annotations/instances_train2017.json", "val": "annotations/instances_val2017.json"},
        {"train": "train/_annotations.coco.json", "val": "valid/_annotations.coco.json"},
        {"train": "train.json", "val": "val.json"},
    ],
)
def test_files_are_found_by_the_word_of_the_split(tmp_path: Path, places: dict[str, str]) -> None:
    content = coco(tmp_path / "given")
    for split, place in places.items():
        file = tmp_path / "root" / place
        folder = (
            file.parent if file.parent.name in ("train", "valid") else tmp_path / "root" / "images" / f"{split}2017"
        )
        shutil.copytree(tmp_path / "given" / "images", folder, dirs_exist_ok=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    (tmp_path / "root" / "annotations").mkdir(exist_ok=True)
    (tmp_path / "root" / "annotations" / "instances_test.json").write_text(json.dumps(content))
    data = CocoJson(tmp_path / "root", **quick())
    if places["train"].startswith("annotations"):
        data.setup()
        assert data.sizes() == {"train": 4, "val": 4, "test": 4}
        assert all("val2017" in data.source("val").name(index) for index in range(4))
        return
    (tmp_path / "root" / "annotations" / "instances_test.json").unlink()
    data.setup()
    assert data.sizes() == {"train": 4, "val": 4, "test": 4}
    word = "valid" if "valid" in places["val"] else "val2017"
    assert all(f"/{word}/" in data.source("val").name(index) for index in range(4))
    assert set(data.origins()) == {f"{tmp_path / 'root' / place} ({split})" for split, place in places.items()}


def test_two_files_that_could_be_meant(tmp_path: Path) -> None:
    write_coco(tmp_path, coco(tmp_path))
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match=r"holds annotations.json, other.json for train: type data.annotations="):
        CocoJson(tmp_path).setup()
    CocoJson(tmp_path, annotations="annotations.json", **quick()).setup()
    with pytest.raises(UsageError, match=r"nothing.json does not exist"):
        CocoJson(tmp_path, annotations="nothing.json").setup()


def test_voc_lists_difficult_objects_and_the_first_pixel(tmp_path: Path) -> None:
    voc(tmp_path)
    hard = voc_object((1, 1, 9, 9)).replace("</name>", "</name><difficult>1</difficult>")
    write_voc(tmp_path, "c", voc_object(GOOD, "cat") + hard)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("b\na\n")
    (lists / "val.txt").write_text("c 1\n")
    data = VocXml(tmp_path, first_pixel=1, **quick())
    data.setup()
    assert data.classes == ("cat", "dog")
    assert data.category_ids == (1, 2)
    assert names(data, "train") == ["b", "a"]
    assert names(data, "val") == names(data, "test") == ["c"]
    sample = data.source("val")[0]
    assert sample["bboxes"].tolist() == [[3, 4, 24, 20], [0, 0, 9, 9]]
    assert sample["crowd"].tolist() == [0, 1]
    assert sample["labels"].tolist() == [0, 1]
    assert VocXml(tmp_path, keep_difficult=True, **quick()).source("val")[0]["crowd"].tolist() == [0, 0]


@pytest.mark.parametrize("layout", ["together", "split folders", "torchvision"])
def test_voc_layouts(tmp_path: Path, layout: str) -> None:
    voc(tmp_path / "given")
    files = [*(tmp_path / "given").rglob("*.xml"), *(tmp_path / "given").rglob("*.png")]
    folders = {"together": ["."], "split folders": ["train", "valid"], "torchvision": []}[layout]
    for folder in folders:
        (tmp_path / "root" / folder).mkdir(parents=True, exist_ok=True)
        for file in files:
            shutil.copy(file, tmp_path / "root" / folder)
    if layout == "torchvision":
        shutil.copytree(tmp_path / "given", tmp_path / "root" / "VOCdevkit" / "VOC2012")
    data = VocXml(tmp_path / "root", **quick())
    data.setup()
    train, held = (4, 4) if layout == "split folders" else (3, 1)
    assert data.sizes() == {"train": train, "val": held, "test": held}


def test_yolo_boxes_polygons_and_lists(tmp_path: Path) -> None:
    yolo(tmp_path)
    polygon = " ".join(str(value) for value in (4 / 40, 5 / 30, 24 / 40, 5 / 30, 24 / 40, 20 / 30, 4 / 40, 20 / 30))
    for stem in "abcd":
        (tmp_path / "labels" / f"{stem}.txt").write_text(f"1 {polygon}\n")
    (tmp_path / "labels" / "d.txt").unlink()
    (tmp_path / "val.txt").write_text("images/d.png\nimages/a.png\n")
    (tmp_path / "train.txt").write_text("images/b.png\nimages/c.png\n")
    (tmp_path / "data.yaml").write_text("train: train.txt\nval: val.txt\nnc: 2\nnames: {0: dog, 1: car}\n")
    data = YoloTxt(tmp_path / "data.yaml", **quick())
    data.setup()
    assert data.classes == ("dog", "car")
    assert data.category_ids == (0, 1)
    assert names(data, "val") == ["a", "d"]
    first, second = data.source("val")[0], data.source("val")[1]
    np.testing.assert_allclose(first["bboxes"], [GOOD], atol=1e-4)
    assert first["labels"].tolist() == [1]
    filled = np.zeros((HEIGHT, WIDTH), np.uint8)
    filled[5:20, 4:24] = 1
    np.testing.assert_array_equal(first["masks"][0], filled)
    assert second["bboxes"].shape == (0, 4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is an empty annotation file"),
        ("names: [dog]", "names no train images"),
        ("train: images", "has no names"),
        ("train: images\nnames: [dog]\nnc: 2", "says nc: 2 and has 1 names"),
        ("train: images\nnames: {1: dog}", r"has names for \[1\]: number the classes 0 to 0"),
        ("train: nowhere\nnames: [dog, car]", "names nowhere, which is not in"),
    ],
)
def test_a_data_yaml_that_does_not_do(tmp_path: Path, content: str, message: str) -> None:
    yolo(tmp_path)
    (tmp_path / "data.yaml").write_text(content)
    with pytest.raises(UsageError, match=message):
        YoloTxt(tmp_path).setup()


def test_yolo_without_any_label_file(tmp_path: Path) -> None:
    yolo(tmp_path)
    shutil.rmtree(tmp_path / "labels")
    with pytest.raises(UsageError, match=r"None of the images .* has a label file, such as .*labels/a.txt"):
        YoloTxt(tmp_path).setup()


def test_penn_fudan_is_split_by_name(tmp_path: Path) -> None:
    penn(tmp_path)
    data = PennFudan(tmp_path, **quick())
    data.setup()
    assert names(data, "train") == ["FudanPed00001", "FudanPed00002"]
    assert names(data, "val") == names(data, "test") == ["FudanPed00060", "PennPed00069"]
    sample = data.source("train")[0]
    assert sample["bboxes"].tolist() == [[4, 5, 24, 20], [30, 10, 35, 14]]
    assert sample["masks"].sum((1, 2)).tolist() == [300, 20]


@pytest.mark.parametrize("cls", [CocoJson, VocXml, YoloTxt, PennFudan])
def test_a_root_that_is_not_there_or_empty(tmp_path: Path, cls: type[ObjectData]) -> None:
    with pytest.raises(UsageError, match=r"nowhere does not exist: type data.root=FOLDER"):
        cls(tmp_path / "nowhere").setup()
    with pytest.raises(UsageError, match=r"type data\."):
        cls(tmp_path).setup()


def test_an_image_of_another_size_than_annotated_is_a_bad_file(tmp_path: Path) -> None:
    write_coco(tmp_path, coco(tmp_path))
    for stem in "abcd":
        Image.new("RGB", (50, 30)).save(tmp_path / "images" / f"{stem}.png")
    with pytest.raises(UsageError, match="has 50 x 30 pixels where its annotations say 40 x 30"):
        CocoJson(tmp_path, **quick()).setup()


def test_blood_cells(shared_data: Path) -> None:
    with pytest.raises(UsageError, match=r"Found 2 bad annotations \(zero-size box: 2\): .*BloodImage_00343.xml"):
        VocXml(shared_data / "bccd").setup()
    data = VocXml(shared_data / "bccd", bad_annotations="repair")
    data.setup()
    assert data.classes == ("Platelets", "RBC", "WBC")
    assert data.sizes() == {"train": 205, "val": 87, "test": 72}
    assert len(data.repaired) == 2


def test_coco_photographs(shared_data: Path) -> None:
    file = "annotations/instances_train100.json"
    data = CocoJson(shared_data / "coco", annotations=file, **quick())
    data.setup()
    stated: Any = json.loads((shared_data / "coco" / file).read_text())
    objects = data.objects()["train"]
    assert (len(objects.files), len(objects.labels)) == (len(stated["images"]), len(stated["annotations"]))
    assert objects.crowd.sum() == sum(annotation["iscrowd"] for annotation in stated["annotations"])
    position = objects.ids.index(stated["annotations"][0]["image_id"])
    source = data.source("train").source  # type: ignore[attr-defined]
    assert source[position]["masks"][0].sum() == stated["annotations"][0]["area"]


def test_people_in_photographs(shared_data: Path) -> None:
    data = PennFudan(shared_data / "penn_fudan")
    data.setup()
    assert data.sizes() == {"train": 120, "val": 50, "test": 50}
    assert sum(len(data.objects()[split].labels) for split in ("train", "val")) == 423


def test_a_run_says_what_was_repaired(tmp_path: Path) -> None:
    from visiontasks.callbacks.report import repaired

    content = coco(tmp_path)
    content["annotations"].append(coco_object(99, 8, (30, 8, 47, 20)))
    write_coco(tmp_path, content)
    data = CocoJson(tmp_path, bad_annotations="repair", **quick())
    data.setup()
    (line,) = repaired(SimpleNamespace(datamodule=data))  # type: ignore[arg-type]
    assert line.endswith("has the box (30, 8, 47, 20) in 40 x 30 pixels, which reaches over the image's edge: clipped")


def test_other_transforms_lose_crowds_with_their_boxes(tmp_path: Path) -> None:
    from visiontasks.data.augment import resize_and_crop

    content = coco(tmp_path)
    for image in range(4):
        content["annotations"].append(coco_object(20 + image, 7 + image, (36, 1, 40, 28), iscrowd=1))
    write_coco(tmp_path, content)
    data = CocoJson(tmp_path, eval_transform=resize_and_crop, **quick())
    batch = next(iter(data.val_dataloader()))
    assert batch["bboxes"][0].shape == (1, 4)
    assert batch["crowd"][0].tolist() == [0]
    assert batch["area"][0].tolist() == [300]
