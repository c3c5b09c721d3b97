"""COCO's numbers on real detections, beside those that pycocotools 2.0.11 gave; and what the rest counts."""

import contextlib
import io
import json
import math
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from faster_coco_eval.core import mask as codes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor

from visiontasks.tasks.detection_metrics import AveragePrecision, DetectionMetrics, ObjectConfusion, matched, mistakes

ORDER = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
ORDER += ("mar_1", "mar_10", "mar_100", "mar_small", "mar_medium", "mar_large")


def entries(rows: list[dict[str, Any]], labels: dict[int, int], *, masks: bool, truth: bool) -> dict[str, Tensor]:
    """COCO's rows of one image as tensors."""
    boxes = torch.tensor([row["bbox"] for row in rows], dtype=torch.float64).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    made = {"boxes": boxes, "labels": torch.tensor([labels[row["category_id"]] for row in rows], dtype=torch.int64)}
    if truth:
        made["iscrowd"] = torch.tensor([row.get("iscrowd", 0) for row in rows], dtype=torch.int64)
        made["area"] = torch.tensor([row["area"] for row in rows], dtype=torch.float64)
    else:
        made["scores"] = torch.tensor([row["score"] for row in rows], dtype=torch.float64)
    if masks:
        made["masks"] = torch.stack([decoded(row["segmentation"]) for row in rows] or [torch.zeros(0, 1)])[: len(rows)]
    return made


def decoded(given: Any) -> Tensor:
    code = given if isinstance(given["counts"], (str, bytes)) else codes.frPyObjects(given, *given["size"])
    return torch.from_numpy(codes.decode(code)).bool()


def computed(folder: Path, truth: str, found: str, *, masks: bool) -> dict[str, Tensor]:
    stated = json.loads((folder / "annotations" / truth).read_text())
    labels = {row["id"]: index for index, row in enumerate(stated["categories"])}
    objects, detections = defaultdict(list), defaultdict(list)
    for row in stated["annotations"]:
        objects[row["image_id"]].append(row)
    for row in json.loads((folder / "crosscheck" / found).read_text()):
        detections[row["image_id"]].append(row)
    metric = AveragePrecision(len(labels), masks=masks)
    for index, image in enumerate(sorted(row["id"] for row in stated["images"])):
        metric.update(
            [entries(detections[image], labels, masks=masks, truth=False)],
            [entries(objects[image], labels, masks=masks, truth=True)],
            [index],
        )
    return metric.compute()[0]


def test_boxes_of_a_real_detector_score_as_pycocotools_says(shared_data: Path) -> None:
    folder = shared_data / "coco"
    figures = computed(folder, "boxes_train128.json", "fastestdet_train128_dets.json", masks=False)
    expected = json.loads((folder / "crosscheck" / "expected_train.json").read_text())["fastestdet_bbox"]
    for name, value in zip(ORDER, expected, strict=True):
        assert figures[name].item() == pytest.approx(value, abs=1e-6), name


def test_perturbed_masks_score_as_pycocotools_says(shared_data: Path) -> None:
    """The stored numbers file masks under small, medium and large by the boxes that the detections came with."""
    folder = shared_data / "coco"
    figures = computed(folder, "instances_train100.json", "perturbed_train100_segm.json", masks=True)
    stored = json.loads((folder / "crosscheck" / "expected_train.json").read_text())
    truth = json.loads((folder / "annotations" / "instances_train100.json").read_text())
    found = json.loads((folder / "crosscheck" / "perturbed_train100_segm.json").read_text())
    ours = pycocotools_says(truth, [{k: v for k, v in row.items() if k != "bbox"} for row in found], "segm")
    for name, value, other in zip(ORDER, stored["perturbed_segm"], ours, strict=True):
        assert figures[f"mask_{name}"].item() == pytest.approx(other, abs=1e-6), name
        if name not in ("map_small", "map_medium", "map_large"):
            assert figures[f"mask_{name}"].item() == pytest.approx(value, abs=1e-6), name
    for name, value in zip(ORDER, stored["perturbed_bbox"], strict=True):
        assert figures[name].item() == pytest.approx(value, abs=1e-6), name


def pycocotools_says(truth: dict[str, Any], found: list[dict[str, Any]], kind: str) -> list[float]:
    """The twelve numbers of the original."""
    with contextlib.redirect_stdout(io.StringIO()):
        stated = COCO()
        stated.dataset = truth | {"info": {}}
        stated.createIndex()
        evaluation = COCOeval(stated, stated.loadRes(found), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def random_set(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Crowds, images without objects, objects without detections and the other way round, and scores that tie."""
    generator = np.random.default_rng(seed)
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image in range(6):
        for _ in range(int(generator.integers(0, 5))):
            box = [*generator.uniform(0, 200, 2), *(10 ** generator.uniform(0.7, 2.3, 2))]
            category, crowd = int(generator.integers(1, 4)), int(generator.random() < 0.15)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image,
                    "category_id": category,
                    "bbox": [float(side) for side in box],
                    "area": float(box[2] * box[3] * generator.uniform(0.5, 1)),
                    "iscrowd": crowd,
                }
            )
            for _ in range(int(generator.integers(0, 3))):
                noisy = np.array(box) * generator.uniform(0.85, 1.15, 4)
                score = round(float(generator.random()), 1)
                found.append({"image_id": image, "category_id": category, "bbox": noisy.tolist(), "score": score})
        if generator.random() < 0.4:
            false = generator.uniform(5, 100, 4).tolist()
            found.append({"image_id": image, "category_id": int(generator.integers(1, 4)), "bbox": false, "score": 0.5})
    categories = [{"id": k, "name": str(k)} for k in (1, 2, 3)]
    return {
        "images": [{"id": image} for image in range(6)],
        "annotations": annotations,
        "categories": categories,
    }, found


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=[pytest.mark.exhaustive] * (seed >= 40)) for seed in range(200)]
)
def test_random_sets_score_as_pycocotools_says(seed: int) -> None:
    truth, found = random_set(seed)
    if not found:
        pytest.skip("pycocotools cannot load a set without detections")
    scores_as_pycocotools_says(truth, found)


def scores_as_pycocotools_says(truth: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Compares all twelve numbers."""
    labels = {row["id"]: index for index, row in enumerate(truth["categories"])}
    metric = AveragePrecision(len(labels))
    for image in (row["id"] for row in truth["images"]):
        objects, detections = (
            [row for row in rows if row["image_id"] == image] for rows in (truth["annotations"], found)
        )
        metric.update(
            [entries(detections, labels, masks=False, truth=False)],
            [entries(objects, labels, masks=False, truth=True)],
            [image],
        )
    figures = metric.compute()[0]
    for name, value in zip(ORDER, pycocotools_says(truth, found, "bbox"), strict=True):
        expected = pytest.approx(value, abs=1e-6) if value >= 0 else pytest.approx(math.nan, nan_ok=True)
        assert figures[name].item() == expected, name


def from_text(objects: Path, detections: Path, *, corners: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Rows of name, score where it was detected, and four numbers of a box; a file an image."""
    stems = sorted({path.stem for folder in (objects, detections) for path in folder.glob("*.txt")})
    rows = [
        (image, folder is detections, line.split())
        for image, stem in enumerate(stems)
        for folder in (objects, detections)
        for line in ((folder / f"{stem}.txt").read_text().splitlines() if (folder / f"{stem}.txt").is_file() else [])
    ]
    names = sorted({words[0] for _, _, words in rows})
    annotations: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, detected, words in rows:
        x, y, right, bottom = map(float, words[1 + detected : 5 + detected])
        box = [x, y, right - x, bottom - y] if corners else [x, y, right, bottom]
        row = {"image_id": image, "category_id": names.index(words[0]), "bbox": box}
        if detected:
            found.append(row | {"score": float(words[1])})
        else:
            annotations.append(row | {"id": len(annotations) + 1, "area": box[2] * box[3], "iscrowd": 0})
    categories = [{"id": index, "name": name} for index, name in enumerate(names)]
    images = [{"id": image} for image in range(len(stems))]
    return {"images": images, "annotations": annotations, "categories": categories}, found


@pytest.mark.parametrize(
    ("objects", "detections", "corners"),
    [
        ("cartucho/input/ground-truth", "cartucho/input/detection-results", True),
        ("samples/sample_2/groundtruths", "samples/sample_2/detections", False),
    ],
)
def test_sets_of_other_evaluators_score_as_pycocotools_says(
    shared_data: Path, objects: str, detections: str, corners: bool
) -> None:
    folder = shared_data / "map_crosscheck"
    truth, found = from_text(folder / objects, folder / detections, corners=corners)
    assert truth["annotations"]
    assert found
    scores_as_pycocotools_says(truth, found)


def boxes(*rows: tuple[float, ...]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 4)


def images(count: int = 7) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Random objects, and detections near some of them with scores that often tie; some images have neither."""
    generator = torch.Generator().manual_seed(0)
    found, truth = [], []
    for index in range(count):
        objects = index % 4
        corner, side = (
            torch.rand(objects, 2, generator=generator) * 60,
            8 + torch.rand(objects, 2, generator=generator) * 30,
        )
        own = torch.cat([corner, corner + side], dim=1)
        labels = torch.randint(0, 3, (objects,), generator=generator)
        near = torch.cat([own + torch.randn(objects, 4, generator=generator), own.flip(0)])
        scores = (torch.rand(2 * objects, generator=generator) * 4).round() / 4
        truth.append({"boxes": own, "labels": labels})
        found.append({"boxes": near, "labels": labels.repeat(2), "scores": scores})
    return found, truth


SHARES = ([0, 2, 3, 5], [1, 4, 6], [])  # the images of each process


def measured(indices: list[int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Figures and tables of some images, each with two losses."""
    found, truth = images()
    metrics = DetectionMetrics(3, losses={"a": 1.0, "b": 0.5}, shown=0.5)
    for index in indices:
        terms = torch.tensor([[index, 1.0], [1.0, index]])
        metrics.update([found[index]], [truth[index]], terms, scales=[0.5], indices=[index])
    return metrics.compute()


def one_of_three(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = timedelta(seconds=60)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=3, timeout=patience)
    torch.save(measured(SHARES[rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.exhaustive
def test_three_processes_of_uneven_shares_one_of_them_empty_measure_as_one(tmp_path: Path) -> None:
    mp.spawn(one_of_three, args=(str(tmp_path),), nprocs=3)
    figures, tables = measured(list(range(7)))
    assert figures["loss"].item() == pytest.approx(21 / 7 + 0.5 * 7 / 21)
    assert 0 < figures["map"] < 1
    for rank in range(3):
        others, other_tables = torch.load(tmp_path / f"{rank}.pt")
        assert {name: str(value) for name, value in others.items()} == {name: str(v) for name, v in figures.items()}
        assert torch.equal(other_tables["per_class_ap"].nan_to_num(9), tables["per_class_ap"].nan_to_num(9))
        assert torch.equal(other_tables["confusion"], tables["confusion"])


def test_the_mean_of_the_classes_is_the_figure() -> None:
    found, truth = images()
    metric = AveragePrecision(5)
    metric.update(found, truth, list(range(7)))
    figures, tables = metric.compute()
    assert tables["per_class_ap"].nanmean().item() == pytest.approx(figures["map"].item(), abs=1e-6)
    assert tables["per_class_ap"][3:].isnan().all()
    assert tables["precision_recall"].nanmean().item() == pytest.approx(figures["map_50"].item(), abs=1e-6)


def test_without_detections_the_figure_is_zero_and_without_objects_there_is_none() -> None:
    nothing = {"boxes": boxes(), "labels": torch.zeros(0, dtype=torch.int64), "scores": torch.zeros(0)}
    objects = {"boxes": boxes((0, 0, 9, 9)), "labels": torch.tensor([1])}
    metric = AveragePrecision(2)
    metric.update([nothing], [objects], [0])
    assert metric.compute()[0]["map"] == 0
    metric.reset()
    metric.update([nothing], [{"boxes": boxes(), "labels": torch.zeros(0, dtype=torch.int64)}], [0])
    assert math.isnan(metric.compute()[0]["map"])


def test_each_object_is_found_once_and_crowds_are_no_false_alarms() -> None:
    truth = {
        "boxes": boxes((0, 0, 10, 10), (20, 20, 30, 30), (50, 50, 100, 100)),
        "labels": torch.tensor([0, 1, 1]),
        "iscrowd": torch.tensor([0, 0, 1]),
    }
    found = {
        "boxes": boxes((0, 0, 10, 9), (0, 0, 10, 10), (60, 60, 70, 70), (200, 0, 210, 10)),
        "labels": torch.tensor([0, 0, 1, 1]),
        "scores": torch.tensor([0.9, 0.8, 0.7, 0.6]),
    }
    match = matched(found, truth)
    assert match.object_of.tolist() == [0, -1, -2, -1]
    assert match.true.tolist() == [0, -1, -1, -1]
    assert match.found.tolist() == [True, False]
    missed, wrong = mistakes(found, truth)
    assert missed.sum() == 1
    assert wrong.tolist() == [False, True, False, True]
    confusion = ObjectConfusion(2)
    confusion.update([found], [truth])
    figures, counts = confusion.compute()
    assert counts.tolist() == [[1, 0, 0], [0, 0, 1], [1, 1, 0]]
    assert figures["precision"].item() == pytest.approx(1 / 3)
    assert figures["recall"].item() == pytest.approx(1 / 2)
