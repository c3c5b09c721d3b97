"""Bad annotations in every format: found when the files are read, named, and refused or repaired."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from visiontasks.contracts import UsageError
from visiontasks.data import CocoJson, PennFudan, VocXml, YoloTxt
from visiontasks.data.object_files import ObjectData

WIDTH, HEIGHT = 40, 30
GOOD = (4.0, 5.0, 24.0, 20.0)
BOXES = {
    "zero-size box": (10, 8, 10, 20),
    "inverted box": (30, 20, 10, 8),
    "NaN box": (float("nan"), 8, 30, 20),
    "infinite box": (10, 8, float("inf"), 20),
    "outside box": (60, 8, 70, 20),
    "partly outside box": (30, 8, 47, 20),
    "sub-pixel box": (10, 8, 10.5, 20),
    "duplicate object": GOOD,
}
MENDED = {"inverted box": (10, 8, 30, 20), "partly outside box": (30, 8, 40, 20)}


def picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (WIDTH, HEIGHT), (90, 120, 150)).save(path)


def four(root: Path, folder: str) -> list[str]:
    for stem in "abcd":
        picture(root / folder / f"{stem}.png")
    return list("abcd")


def coco(root: Path) -> dict[str, Any]:
    stems = four(root, "images")
    polygon = [4, 5, 24, 5, 24, 20, 4, 20]
    return {
        "images": [
            {"id": 7 + n, "file_name": f"{stem}.png", "width": WIDTH, "height": HEIGHT} for n, stem in enumerate(stems)
        ],
        "annotations": [coco_object(1 + n, 7 + n, GOOD, segmentation=[polygon]) for n in range(4)],
        "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}],
    }


def coco_object(id: int, image: int, box: Any, **more: Any) -> dict[str, Any]:  # noqa: A002
    left, top, right, bottom = box
    given = {"id": id, "image_id": image, "category_id": 18, "bbox": [left, top, right - left, bottom - top]}
    return given | {"iscrowd": 0, "segmentation": [[4, 5, 24, 5, 24, 20, 4, 20]]} | more


def write_coco(root: Path, data: Any) -> None:
    (root / "annotations.json").write_text(json.dumps(data))


def voc_object(box: Any, name: str = "dog") -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=False)
    inner = "".join(f"<{key}>{value}</{key}>" for key, value in corners)
    return f"<object><name>{name}</name><bndbox>{inner}</bndbox></object>"


def voc(root: Path) -> None:
    for stem in four(root, "JPEGImages"):
        write_voc(root, stem, voc_object(GOOD))


def write_voc(root: Path, stem: str, objects: str) -> None:
    size = f"<size><width>{WIDTH}</width><height>{HEIGHT}</height></size>"
    (root / "Annotations").mkdir(exist_ok=True)
    page = f"<annotation><filename>{stem}.png</filename>{size}{objects}</annotation>"
    (root / "Annotations" / f"{stem}.xml").write_text(page)


def yolo_line(box: Any, label: Any = 0) -> str:
    left, top, right, bottom = box
    numbers = ((left + right) / 2 / WIDTH, (top + bottom) / 2 / HEIGHT, (right - left) / WIDTH, (bottom - top) / HEIGHT)
    return " ".join([str(label), *map(str, numbers)])


def yolo(root: Path) -> None:
    (root / "data.yaml").write_text("train: images\nnames: [dog, car]\n")
    (root / "labels").mkdir()
    for stem in four(root, "images"):
        (root / "labels" / f"{stem}.txt").write_text(yolo_line(GOOD))


def penn(root: Path) -> None:
    numbers = np.zeros((HEIGHT, WIDTH), np.uint8)
    numbers[5:20, 4:24] = 1
    numbers[10:14, 30:35] = 2
    (root / "PedMasks").mkdir(parents=True)
    for stem in ("FudanPed00001", "FudanPed00002", "FudanPed00060", "PennPed00069"):
        picture(root / "PNGImages" / f"{stem}.png")
        Image.fromarray(numbers).save(root / "PedMasks" / f"{stem}_mask.png")


def bad_box(format: str, root: Path, kind: str) -> ObjectData:  # noqa: A002
    """Write the format with one bad box more on image b."""
    box = BOXES[kind]
    if format == "coco":
        data = coco(root)
        data["annotations"].append(coco_object(99, 8, box))
        write_coco(root, data)
        return CocoJson(root, **quick())
    if format == "voc":
        voc(root)
        write_voc(root, "b", voc_object(GOOD) + voc_object(box))
        return VocXml(root, **quick())
    yolo(root)
    (root / "labels" / "b.txt").write_text(f"{yolo_line(GOOD)}\n{yolo_line(box)}\n")
    return YoloTxt(root, **quick())


def quick() -> dict[str, Any]:
    return {"val_fraction": 0.25, "test_fraction": 0, "image_size": 32, "batch_size": 1}


NAMES = {"coco": "annotations.json, annotation 99,", "voc": "b.xml, object 2,", "yolo": "b.txt, line 2,"}


@pytest.mark.parametrize("kind", BOXES)
@pytest.mark.parametrize("format", NAMES)
def test_bad_boxes_are_refused_by_name_or_repaired(tmp_path: Path, format: str, kind: str) -> None:  # noqa: A002
    data = bad_box(format, tmp_path, kind)

    kinds = "NaN box|infinite box" if kind == "infinite box" else kind  # a centre between inf and a number: inf or NaN
    with pytest.raises(UsageError, match=rf"Found 1 bad annotations \(({kinds}): 1\): .*{NAMES[format]} .*=repair"):
        data.setup()
    data.bad_annotations = "repair"
    data.setup()
    assert len(data.repaired) == 1
    assert NAMES[format] in data.repaired[0]
    boxes = data.objects()["train"].boxes
    expected = [MENDED[kind]] if kind in MENDED else []
    np.testing.assert_allclose(boxes[[0, 1]], [GOOD, GOOD], atol=1e-4)
    np.testing.assert_allclose(boxes[2:-2], np.reshape(expected, (-1, 4)), atol=1e-4)


Spoil = Callable[[Path], ObjectData]


def spoiled_coco(change: Callable[[dict[str, Any], Path], None]) -> Spoil:
    def spoil(root: Path) -> ObjectData:
        data = coco(root)
        change(data, root)
        write_coco(root, data)
        return CocoJson(root, **quick())

    return spoil


def one(**change: Any) -> Spoil:
    return spoiled_coco(lambda data, _: data["annotations"][1].update(change))


def lost(root: Path, name: str) -> None:
    (root / name).unlink()


def spoiled_voc(objects: str) -> Spoil:
    def spoil(root: Path) -> ObjectData:
        voc(root)
        write_voc(root, "b", objects)
        return VocXml(root, **quick())

    return spoil


def spoiled_yolo(line: str, name: str = "labels/b.txt") -> Spoil:
    def spoil(root: Path) -> ObjectData:
        yolo(root)
        (root / name).write_text(line)
        return YoloTxt(root, **quick())

    return spoil


def without(make: Callable[[Path], None], cls: type[ObjectData], name: str, content: bytes | None = None) -> Spoil:
    def spoil(root: Path) -> ObjectData:
        make(root)
        lost(root, name) if content is None else (root / name).write_bytes(content)
        return cls(root, **quick())

    return spoil


def spoiled_penn(numbers: Any) -> Spoil:
    def spoil(root: Path) -> ObjectData:
        penn(root)
        Image.fromarray(numbers).save(root / "PedMasks" / "FudanPed00002_mask.png")
        return PennFudan(root, **quick())

    return spoil


RLE = {"size": [HEIGHT, WIDTH], "counts": [10, 5, HEIGHT * WIDTH - 15]}
OTHERS: dict[str, tuple[Spoil, str, str]] = {  # kind: how to make it, what is said of it, where
    "coco label 0": (one(category_id=0), "unknown label", "annotation 2, has category 0"),
    "coco label -1": (one(category_id=-1), "unknown label", "annotation 2, has category -1"),
    "coco label K": (one(category_id=19), "unknown label", "annotation 2, has category 19"),
    "coco three numbers": (one(bbox=[1, 2, 3]), "count mismatch", r"annotation 2, has the box \[1, 2, 3\]"),
    "coco words": (one(bbox=[1, 2, "x", 4]), "NaN box", "annotation 2, has the box"),
    "coco no mask": (one(segmentation=[]), "count mismatch", "annotation 2, has a box but no mask"),
    "coco mask size": (
        one(segmentation=RLE | {"size": [5, 5]}),
        "wrong mask size",
        r"annotation 2, has a mask of height and",
    ),
    "coco mask counts": (one(segmentation=RLE | {"counts": [3]}), "wrong mask values", "annotation 2, has a mask that"),
    "coco mask text": (one(segmentation=RLE | {"counts": "!!"}), "wrong mask values", "annotation 2, has a mask that"),
    "coco empty mask": (
        one(segmentation=RLE | {"counts": [1200]}),
        "wrong mask values",
        "annotation 2, .*without a pixel",
    ),
    "coco polygon": (one(segmentation=[[1, 2, 3, 4]]), "wrong mask values", "annotation 2, has polygons"),
    "coco NaN polygon": (
        one(segmentation=[[1, 2, 3, 4, 5, float("nan")]]),
        "wrong mask values",
        "annotation 2, has poly",
    ),
    "coco thin polygon": (
        one(segmentation=[[1, 1, 1, 1, 1.1, 1]]),
        "wrong mask values",
        "annotation 2, .*without a pixel",
    ),
    "coco polygon outside": (one(segmentation=[[90, 1, 99, 1, 99, 9]]), "wrong mask values", "annotation 2, .*without"),
    "coco no such image": (one(image_id=1), "missing file", "annotation 2, belongs to image 1"),
    "coco missing file": (spoiled_coco(lambda _, root: lost(root, "images/b.png")), "missing file", "image 8, .*b.png"),
    "coco duplicate image": (
        spoiled_coco(lambda data, _: data["images"].append(data["images"][1])),
        "duplicate image",
        "image 8, .*b.png",
    ),
    "voc no name": (spoiled_voc(voc_object(GOOD, "")), "unknown label", "b.xml, object 1, has no name"),
    "voc three corners": (
        spoiled_voc(voc_object(GOOD[:3])),
        "count mismatch",
        "b.xml, object 1, has a box of 3 numbers",
    ),
    "voc words": (spoiled_voc(voc_object(("x", 1, 2, 3))), "NaN box", "b.xml, object 1, has the box"),
    "voc missing file": (without(voc, VocXml, "JPEGImages/b.png"), "missing file", "b.xml has no image"),
    "voc empty file": (without(voc, VocXml, "Annotations/b.xml", b""), "empty annotation file", "b.xml is an empty"),
    "voc half a file": (without(voc, VocXml, "Annotations/b.xml", b"<anno"), "unreadable file", "b.xml is no XML"),
    "yolo label -1": (spoiled_yolo(yolo_line(GOOD, -1)), "unknown label", "b.txt, line 1, has class -1"),
    "yolo label K": (
        spoiled_yolo(yolo_line(GOOD, 2)),
        "unknown label",
        "b.txt, line 1, has class 2, and there are 0 to 1",
    ),
    "yolo half a label": (spoiled_yolo(yolo_line(GOOD, 0.5)), "unknown label", "b.txt, line 1, has class 0.5"),
    "yolo four numbers": (spoiled_yolo("0 .5 .5 .1"), "count mismatch", "b.txt, line 1, has 4 numbers"),
    "yolo six numbers": (spoiled_yolo("0 .5 .5 .1 .1 .1"), "count mismatch", "b.txt, line 1, has 6 numbers"),
    "yolo words": (spoiled_yolo("0 .5 .5 .1 x"), "NaN box", "b.txt, line 1, has a word"),
    "yolo missing image": (without(yolo, YoloTxt, "images/b.png"), "missing file", "b.txt has no image"),
    "yolo bad image": (without(yolo, YoloTxt, "images/b.png", b"abc"), "unreadable file", "b.png is no image"),
    "yolo label without image": (spoiled_yolo(yolo_line(GOOD), "labels/z.txt"), "missing file", "z.txt has no image"),
    "penn missing mask": (
        without(penn, PennFudan, "PedMasks/FudanPed00002_mask.png"),
        "missing file",
        "2.png has no mask",
    ),
    "penn missing image": (
        without(penn, PennFudan, "PNGImages/FudanPed00002.png"),
        "missing file",
        "2_mask.png has no im",
    ),
    "penn empty mask file": (
        without(penn, PennFudan, "PedMasks/FudanPed00002_mask.png", b""),
        "empty annotation file",
        "2_mask.png is empty",
    ),
    "penn mask size": (
        spoiled_penn(np.ones((9, 8), np.uint8)),
        "wrong mask size",
        "2_mask.png has 8 x 9 pixels .* 40 x 30",
    ),
    "penn coloured mask": (
        spoiled_penn(np.ones((30, 40, 3), np.uint8)),
        "wrong mask values",
        "2_mask.png holds colours",
    ),
    "penn mask values": (
        spoiled_penn(np.full((30, 40), 255, np.uint8)),
        "wrong mask values",
        "2_mask.png has the numbers 255: expected 1 to 1",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_other_faults_are_refused_by_name_or_left_out(tmp_path: Path, case: str) -> None:
    spoil, kind, place = OTHERS[case]
    data = spoil(tmp_path)
    with pytest.raises(UsageError, match=rf"Found 1 bad annotations \({kind}: 1\): .*{place}"):
        data.setup()
    data.bad_annotations = "repair"
    data.setup()
    assert len(data.repaired) == 1
    for batch in [*data.train_dataloader(), *data.val_dataloader()]:
        for boxes, labels in zip(batch["bboxes"], batch["labels"], strict=True):
            assert len(boxes) == len(labels)
            assert np.isfinite(boxes).all()
            assert ((labels >= 0) & (labels < len(data.classes))).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"annotations.json is an empty annotation file \(0 bytes\)"),
        ('{"images": [], "annotations": [], "categories": []}', "an empty annotation file"),
        ("{", "is no JSON file"),
        ("[]", "has no list images"),
        ('{"images": [1], "annotations": []}', "has no list categories"),
    ],
)
def test_a_json_file_that_says_nothing(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "annotations.json").write_text(content)
    with pytest.raises(UsageError, match=message):
        CocoJson(tmp_path).setup()


def test_a_rounded_edge_is_no_mistake(tmp_path: Path) -> None:
    data = coco(tmp_path)
    data["annotations"].append(coco_object(99, 8, (30, 8, WIDTH + 0.7, HEIGHT + 1)))
    write_coco(tmp_path, data)
    made = CocoJson(tmp_path, **quick())
    made.setup()
    assert made.repaired == ()
    assert made.objects()["train"].boxes.tolist()[2] == [30, 8, WIDTH, HEIGHT]


def test_many_faults_are_counted_by_kind(tmp_path: Path) -> None:
    data = coco(tmp_path)
    data["annotations"] += [coco_object(90 + n, 8, BOXES["outside box"]) for n in range(6)]
    data["annotations"] += [coco_object(99, 8, BOXES["NaN box"])]
    write_coco(tmp_path, data)
    with pytest.raises(UsageError, match=r"Found 7 bad annotations \(NaN box: 1, outside box: 6\): .*; and 2 more"):
        CocoJson(tmp_path).setup()


def test_the_policy_is_one_of_two(tmp_path: Path) -> None:
    write_coco(tmp_path, coco(tmp_path))
    with pytest.raises(UsageError, match="bad_annotations=ignore is neither"):
        CocoJson(tmp_path, bad_annotations="ignore").setup()
