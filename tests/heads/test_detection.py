"""Detection heads against torchvision's detectors and plain forms of the papers."""

import subprocess
import sys
from collections import OrderedDict
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.models.detection as tv
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.ops import MultiScaleRoIAlign, box_iou, remove_small_boxes, sigmoid_focal_loss

from visiontasks.backbones import CifarResNet, TimmBackbone, TorchvisionBackbone
from visiontasks.cli.command_line import CONF
from visiontasks.contracts import Level, UsageError
from visiontasks.heads import FCOS, SSD, FasterRCNN, MaskRCNN, RetinaNet
from visiontasks.heads.detection.focal import focal_sum
from visiontasks.heads.detection.geometry import BACKGROUND, IGNORED, Anchors
from visiontasks.heads.detection.pooling import pool_regions
from visiontasks.heads.detection.pyramid import HalvingConv, Pyramid
from visiontasks.heads.detection.sampling import balanced, generators
from visiontasks.heads.detection.selecting import best_entries

HEADS = {"fcos": FCOS, "retinanet": RetinaNet, "ssd": SSD, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
ONE_STAGE = ("fcos", "retinanet", "ssd")
TWO_STAGE = ("faster_rcnn", "mask_rcnn")
LEVELS = (Level(6, 4), Level(8, 8), Level(10, 16), Level(12, 32))
STRIDES = (8, 16, 32, 64, 128)
SIDE = 128
Objects = dict[str, Tensor]
ALL: dict[str, Any] = {"rpn_batch_size_per_image": 10**6, "box_batch_size_per_image": 10**6}
UNTOUCHED: dict[str, Any] = {"min_size": SIDE, "max_size": SIDE, "image_mean": [0.0] * 3, "image_std": [1.0] * 3}


def make(name: str, levels: tuple[Level, ...] = LEVELS, num_classes: int = 3, **options: Any) -> Any:
    """A head of conf/ that is narrow enough to test."""
    small = {"width": 32} | ({"hidden": 48} if name in TWO_STAGE else {})
    small |= {"mask_width": 16} if name == "mask_rcnn" else {}
    chosen = OmegaConf.load(CONF / "head" / f"{name}.yaml")
    return instantiate(chosen, _convert_="all")(levels=levels, num_classes=num_classes, **small | options)


def lively(module: nn.Module) -> Any:
    """The module with larger weights in all convolutions of small ones, so that scores differ between places."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.Linear) and part.weight.std() < 0.02:
            nn.init.kaiming_normal_(part.weight)
            nn.init.zeros_(part.bias)
    return module


def features(images: int = 2, height: int = SIDE, width: int = SIDE) -> list[Tensor]:
    return [torch.randn(images, level.channels, height // level.stride, width // level.stride) for level in LEVELS]


def target(objects: int, height: int = SIDE, width: int = SIDE, least: float = 12, most: float = 60) -> Objects:
    sizes = least + torch.rand(objects, 2) * (most - least)
    corners = torch.rand(objects, 2) * (torch.tensor([width, height]) - sizes)
    boxes = torch.cat([corners, corners + sizes], dim=1)
    masks = torch.zeros(objects, height, width, dtype=torch.uint8)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.round().int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
    return {"boxes": boxes, "labels": torch.randint(0, 3, (objects,)), "masks": masks}


def shifted(targets: list[Objects]) -> list[Objects]:
    return [one | {"labels": one["labels"] + 1} for one in targets]


class Maps(nn.Module):
    """A backbone that knows its answer."""

    def __init__(self, maps: list[Tensor]) -> None:
        super().__init__()
        self.maps = maps
        self.out_channels: Any = maps[0].shape[1]

    def forward(self, images: Tensor) -> Objects:
        return OrderedDict((str(index), one) for index, one in enumerate(self.maps))


def images(number: int = 2) -> list[Tensor]:
    return [torch.zeros(3, SIDE, SIDE) for _ in range(number)]


def assert_same_detections(found: list[Objects], expected: list[Objects], *, first: int = 0) -> None:
    for ours, all_of_theirs in zip(found, expected, strict=True):
        left = remove_small_boxes(all_of_theirs["boxes"], 1e-2)  # torchvision's one-stage detectors keep the others
        theirs = {name: value[left] for name, value in all_of_theirs.items()}
        assert len(theirs["boxes"]) > 5
        torch.testing.assert_close(ours["scores"], theirs["scores"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], rtol=1e-4, atol=1e-3)
        assert torch.equal(ours["labels"] + first, theirs["labels"])


def means(terms: dict[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    return {name: (total / count).item() for name, (total, count) in terms.items()}


def test_fcos_is_torchvisions() -> None:
    head = lively(FCOS(levels=LEVELS, num_classes=3, width=128, offset=0.0)).eval()
    raw = head(inputs := features())
    maps = head.pyramid(inputs)
    anchors = AnchorGenerator(tuple((stride,) for stride in STRIDES), ((1.0,),) * 5)
    peer: Any = tv.FCOS(
        Maps(maps), 3, anchor_generator=anchors, score_thresh=0.3, nms_thresh=0.5, detections_per_img=10**4, **UNTOUCHED
    )
    peer.head.load_state_dict({k: v for k, v in head.state_dict().items() if k.partition(".")[0].endswith("_head")})
    targets = [target(4, most=110), target(2)]
    expected = peer.train()(images(), targets)
    found = means(head.loss(raw, targets))
    assert found["classification"] == pytest.approx(expected["classification"].item(), rel=1e-4)
    assert found["boxes"] == pytest.approx(expected["bbox_regression"].item(), rel=1e-4)
    assert found["centreness"] == pytest.approx(expected["bbox_ctrness"].item(), rel=1e-4)
    detections = head.detections(raw, score_threshold=0.3, nms_threshold=0.5, max_detections=10**4)
    assert_same_detections(detections, peer.eval()(images()))


def test_retinanet_is_torchvisions_with_the_papers_count() -> None:
    head = lively(RetinaNet(levels=LEVELS, num_classes=3, width=32)).eval()
    raw = head(inputs := features(1))
    sizes = [[4 * stride * 2 ** (step / 3) for step in range(3)] for stride in STRIDES]
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    options: dict[str, Any] = {"score_thresh": 0.3, "nms_thresh": 0.5, "detections_per_img": 10**4}
    peer: Any = tv.RetinaNet(Maps(head.pyramid(inputs)), 3, anchor_generator=anchors, **options, **UNTOUCHED)
    peer.head.load_state_dict({k: v for k, v in head.state_dict().items() if k.partition(".")[0].endswith("_head")})
    targets = [target(4)]
    expected = peer.train()(images(1), targets)
    found = means(head.loss(raw, targets))
    assert found["classification"] == pytest.approx(expected["classification"].item(), rel=1e-4)
    assert found["boxes"] == pytest.approx(expected["bbox_regression"].item(), rel=1e-4)
    detections = head.detections(raw, score_threshold=0.3, nms_threshold=0.5, max_detections=10**4)
    assert_same_detections(detections, peer.eval()(images(1)))


def test_ssd_is_torchvisions_in_strides() -> None:
    head = SSD(levels=LEVELS, num_classes=3, width=32, candidates=10**5).eval()
    nn.init.ones_(head.norm)  # no score is 1 in float32
    seen: list[list[Tensor]] = []
    head.layers.register_forward_pre_hook(lambda _, given: seen.append(list(given[0])))
    raw = head(features())
    backbone = Maps(seen[0])
    backbone.out_channels = [level.shape[1] for level in seen[0]]
    scales = [3 * stride / SIDE for stride in (*STRIDES, 256)]
    boxes = DefaultBoxGenerator([[2, 3]] * 5, scales=scales, steps=list(STRIDES), clip=False)
    options: dict[str, Any] = {"score_thresh": 0.4, "nms_thresh": 0.5, "detections_per_img": 10**4}
    normal: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}
    peer: Any = tv.ssd.SSD(backbone, boxes, (SIDE, SIDE), 4, **options, **normal, topk_candidates=10**5)
    peer.head.load_state_dict(head.layers.state_dict())
    targets = [target(4), target(2)]
    expected = peer.train()(images(), shifted(targets))
    found = means(head.loss(raw, targets))
    assert found["classification"] == pytest.approx(expected["classification"].item(), rel=1e-4)
    assert found["boxes"] == pytest.approx(expected["bbox_regression"].item(), rel=1e-4)
    detections = head.detections(raw, score_threshold=0.4, nms_threshold=0.5, max_detections=10**4)
    assert_same_detections(detections, peer.eval()(images()), first=1)


def test_narrow_branches_start_as_lively_as_the_papers() -> None:
    carried = {}
    for width in (32, 256):
        head = RetinaNet(levels=LEVELS, num_classes=3, width=width).requires_grad_(False)
        maps = torch.randn(4, width, 16, 16)
        carried[width] = [part.conv(maps).std().item() for part in (head.classification_head, head.regression_head)]
    np.testing.assert_allclose(carried[32], carried[256], rtol=0.5)  # a 64th with the paper's weights


def two_stage_peer(head: Any, inputs: list[Tensor]) -> Any:
    regions = head.proposals(inputs)
    anchors = AnchorGenerator([[4 * stride] for stride in STRIDES], ((0.5, 1.0, 2.0),) * 5)
    kind, masks = tv.FasterRCNN, {}
    if isinstance(head, MaskRCNN):
        kind = tv.MaskRCNN
        masks = {
            "mask_roi_pool": MultiScaleRoIAlign(["0", "1", "2"], 14, 2),
            "mask_head": tv.mask_rcnn.MaskRCNNHeads(32, [16] * 4, 1),
            "mask_predictor": tv.mask_rcnn.MaskRCNNPredictor(16, 16, 4),
        }
    peer: Any = kind(
        Maps(regions.maps),
        rpn_anchor_generator=anchors,
        box_roi_pool=MultiScaleRoIAlign(["0", "1", "2"], 7, 2),
        box_head=tv.faster_rcnn.TwoMLPHead(32 * 49, 48),
        box_predictor=tv.faster_rcnn.FastRCNNPredictor(48, 4),
        rpn_pre_nms_top_n_train=1000,
        rpn_post_nms_top_n_train=300,
        rpn_post_nms_top_n_test=300,
        rpn_positive_fraction=1.0,
        box_positive_fraction=1.0,
        box_score_thresh=0.28,
        box_detections_per_img=30,
        **masks,
        **ALL,
        **UNTOUCHED,
    )
    peer.rpn.head.load_state_dict(head.proposals.layers.state_dict())
    rest = {k: v for k, v in head.state_dict().items() if k.startswith(("box_", "mask_"))}
    peer.roi_heads.load_state_dict(rest)
    return peer


@pytest.mark.parametrize("name", TWO_STAGE)
def test_two_stages_are_torchvisions_where_nothing_is_drawn(name: str) -> None:
    head = lively(make(name, anchors_learnt=10**6, regions_learnt=10**6)).eval()
    head.object_share = (1.0, 1.0)
    raw = head(inputs := features())
    peer = two_stage_peer(head, inputs)
    targets = [target(4), target(2)]
    expected = peer.train()(images(), shifted(targets))
    found = means(head.loss(raw, targets))
    assert found["objectness"] == pytest.approx(expected["loss_objectness"].item(), rel=1e-4)
    assert found["proposals"] == pytest.approx(expected["loss_rpn_box_reg"].item(), rel=1e-4)
    assert found["classification"] == pytest.approx(expected["loss_classifier"].item(), rel=1e-4)
    assert found["boxes"] == pytest.approx(expected["loss_box_reg"].item(), rel=1e-4)
    detections = head.detections(raw, score_threshold=0.28, nms_threshold=0.5, max_detections=30)
    theirs = peer.eval()(images())
    assert_same_detections(detections, theirs, first=1)
    if name == "mask_rcnn":
        assert found["masks"] == pytest.approx(expected["loss_mask"].item(), rel=1e-4)
        for ours, one in zip(detections, theirs, strict=True):
            wanted = one["masks"][:, 0] >= 0.5
            assert wanted.any()
            assert (ours["masks"].bool() != wanted).float().mean() < 1e-4  # a value at 0.5 may fall to either side


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("objects", [(3, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("name", HEADS)
def test_every_weight_has_a_finite_gradient(name: str, objects: tuple[int, int], autocast: bool) -> None:
    head = make(name).train()
    targets = [target(number, 64, 32, most=30) for number in objects]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        terms = head.loss(head(features(2, 64, 32)), targets, keys=torch.tensor([1, 2]))
    total = sum(one / count.clamp(min=1) for one, count in terms.values())
    assert torch.isfinite(total)
    assert all(one.dtype == torch.float32 and count.dtype == torch.float32 for one, count in terms.values())
    total.backward()
    for parameter_name, parameter in head.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name
    scores = [one.grad for key, one in head.named_parameters() if "cls_" in key or "classification_head" in key]
    assert any(gradient.abs().sum() > 0 for gradient in scores)  # images without objects are learnt from


@pytest.mark.parametrize("name", HEADS)
def test_a_head_says_its_losses_in_order(name: str) -> None:
    head = make(name).eval()
    assert tuple(head.loss(head(features(1)), [target(2)])) == HEADS[name].losses


@pytest.mark.parametrize("name", HEADS)
def test_sums_and_counts_add_up_over_images(name: str) -> None:
    head = lively(make(name)).eval()
    inputs, targets, keys = features(3), [target(3), target(0), target(5)], torch.tensor([7, 8, 9])
    whole = head.loss(head(inputs), targets, keys=keys)
    parts = [
        head.loss(head([level[[index]] for level in inputs]), [targets[index]], keys=keys[[index]])
        for index in range(3)
    ]
    for term, (total, count) in whole.items():
        assert count == sum(part[term][1] for part in parts)
        torch.testing.assert_close(total, sum(part[term][0] for part in parts), rtol=2e-6, atol=1e-5)
        assert total > 0


@pytest.mark.parametrize("name", TWO_STAGE)
def test_draws_belong_to_the_image(name: str) -> None:
    head = lively(make(name, regions_learnt=8, anchors_learnt=8)).eval()
    raw, targets = head(features()), [target(3), target(4)]

    def losses(keys: list[int] | None) -> dict[str, float]:
        return means(head.loss(raw, targets, keys=None if keys is None else torch.tensor(keys)))

    assert losses([1, 2]) == losses([1, 2])
    assert losses([1, 2])["objectness"] != losses([1, 3])["objectness"]
    assert losses([1, 2])["classification"] != losses([1, 3])["classification"]
    assert losses(None) == losses(None) == losses([0, 0])


def test_draws_are_balanced_and_even() -> None:
    labels = torch.tensor([0] * 10 + [BACKGROUND] * 50 + [IGNORED] * 20)
    drawn = torch.zeros(80)
    for key in range(400):
        (stream,) = generators(torch.tensor([key]), 1)
        index = balanced(labels, size=16, fraction=0.25, generator=stream)
        assert (labels[index] == 0).sum() == 4
        assert (labels[index] == BACKGROUND).sum() == 12
        assert len(index.unique()) == 16
        drawn[index] += 1
    np.testing.assert_allclose(drawn[:10] / 400, 0.4, atol=0.1)
    np.testing.assert_allclose(drawn[10:60] / 400, 0.24, atol=0.1)


def test_what_lacks_objects_is_filled_with_background() -> None:
    labels = torch.tensor([2] + [BACKGROUND] * 50)
    index = balanced(labels, size=16, fraction=0.5, generator=torch.Generator())
    assert labels[index].tolist() == [2] + [BACKGROUND] * 15


@pytest.mark.parametrize("size", [7, 14])
def test_regions_are_pooled_as_torchvision_does(size: int) -> None:
    maps = [torch.randn(2, 5, 256 // stride, 320 // stride, requires_grad=True) for stride in (8, 16, 32)]
    corners = torch.rand(60, 2) * 240
    sides = torch.rand(60, 2) ** 2 * 320
    boxes = torch.cat([corners, corners + sides], dim=1).clamp(min=torch.zeros(4), max=torch.tensor([320, 256] * 2))
    boxes[0] = torch.tensor([319.0, 255.0, 320.0, 256.0])  # smaller than a place, in the corner
    boxes[1] = torch.tensor([0.0, 0.0, 320.0, 256.0])
    split = [boxes[:40], boxes[40:]]
    pool = MultiScaleRoIAlign(["0", "1", "2"], size, 2)
    expected = pool({str(index): one for index, one in enumerate(maps)}, split, [(256, 320)] * 2)
    found = pool_regions(maps, split, (8, 16, 32), size=size)
    factors = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad((found * factors).sum(), maps),
        torch.autograd.grad((expected * factors).sum(), maps),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_no_region_gives_an_empty_map() -> None:
    maps = [torch.randn(2, 5, 8, 8, requires_grad=True)]
    assert pool_regions(maps, [torch.zeros(0, 4)] * 2, (8,), size=7).shape == (0, 5, 7, 7)


def test_focal_loss_is_torchvisions_over_what_is_not_ignored() -> None:
    logits = (3 * torch.randn(2, 40, 3)).requires_grad_()
    labels = torch.randint(-2, 3, (2, 40))
    ones = torch.zeros(2, 40, 4).scatter_(2, labels.clamp(min=-1)[..., None] % 4, 1.0)[..., :3]
    kept = labels != IGNORED
    expected = sigmoid_focal_loss(logits[kept], ones[kept], reduction="sum")
    found = focal_sum(logits, labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(one, logits)[0] for one in (found, expected)))


def test_fcos_gives_each_place_the_smallest_object_that_it_belongs_to() -> None:
    head = make("fcos")
    raw = head(features(1, 128, 192))
    boxes = target(12, 128, 192, least=8, most=120)["boxes"]
    found = head.match(raw, boxes[None])[0].numpy()
    expected = []
    for level, stride in enumerate(STRIDES):
        for row in range(-(-128 // stride)):
            for column in range(-(-192 // stride)):
                x, y = (column + 0.5) * stride, (row + 0.5) * stride
                best, best_area = -1, np.inf
                for index, (x1, y1, x2, y2) in enumerate(boxes.numpy().astype(float)):
                    sides = [x - x1, y - y1, x2 - x, y2 - y]
                    low, high = (0 if level == 0 else 4 * stride), (np.inf if level == 4 else 8 * stride)
                    near = max(abs(x - (x1 + x2) / 2), abs(y - (y1 + y2) / 2)) < 1.5 * stride
                    area = (x2 - x1) * (y2 - y1)
                    if min(sides) > 0 and low < max(sides) < high and near and area < best_area:
                        best, best_area = index, area
                expected.append(best)
    assert len(set(expected)) > 6
    assert found.tolist() == expected


def test_anchors_lie_row_by_row() -> None:
    anchors = Anchors([torch.tensor([[-4.0, -2, 4, 2], [-1, -1, 1, 1]])], [8], offset=0.5)
    found = anchors([torch.zeros(1, 1, 2, 3)])
    assert found[:4].tolist() == [[0, 2, 8, 6], [3, 3, 5, 5], [8, 2, 16, 6], [11, 3, 13, 5]]
    assert found[-1].tolist() == [19, 11, 21, 13]
    assert anchors.counts([torch.zeros(1, 1, 2, 3)]) == (12,)


def test_best_entries_are_limited_level_by_level() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.7], [0.6, 0.2]])
    score, place, label = best_entries(scores, (2, 1), threshold=0.15, limit=2)
    assert [round(one, 3) for one in score.tolist()] == [0.9, 0.8, 0.6, 0.2]
    assert list(zip(place.tolist(), label.tolist(), strict=True)) == [(0, 1), (1, 0), (2, 0), (2, 1)]


@pytest.mark.parametrize("name", HEADS)
def test_detections_lie_in_the_image_best_first_without_overlaps(name: str) -> None:
    head = lively(make(name)).eval()
    with torch.no_grad():
        raw = head(features(2, 96, 160))
        found = head.detections(raw, score_threshold=0.01, nms_threshold=0.3, max_detections=25)
        none = head.detections(raw, score_threshold=1.0, nms_threshold=0.3, max_detections=25)
    for one, empty in zip(found, none, strict=True):
        boxes, labels = one["boxes"], one["labels"]
        assert boxes.shape == (25, 4)
        assert (boxes >= 0).all()
        assert (boxes <= torch.tensor([160, 96, 160, 96])).all()
        assert torch.equal(one["scores"], one["scores"].sort(descending=True).values)
        assert set(labels.tolist()) <= {0, 1, 2}
        overlaps = box_iou(boxes, boxes).fill_diagonal_(0) * (labels[:, None] == labels)
        assert overlaps.max() <= 0.3
        assert empty["boxes"].shape == (0, 4)
        assert empty["scores"].shape == empty["labels"].shape == (0,)
        assert name != "mask_rcnn" or (one["masks"].shape, empty["masks"].shape) == ((25, 96, 160), (0, 96, 160))


class Tiny(nn.Module):
    """A backbone that is quick to train."""

    levels = (Level(16, 8), Level(24, 16), Level(32, 32))

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 8, stride=8), nn.BatchNorm2d(16), nn.ReLU())
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(fine.channels, coarse.channels, 3, 2, 1), nn.BatchNorm2d(coarse.channels), nn.ReLU()
            )
            for fine, coarse in zip(self.levels, self.levels[1:], strict=False)
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        maps = [self.stem(pixels)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return maps


def scene() -> tuple[Tensor, Objects]:
    """An image of noise (1, 3, 96, 96) with a red and a blue object."""
    boxes = torch.tensor([[8.0, 10, 40, 44], [50, 30, 90, 70]])
    masks = torch.zeros(2, 96, 96, dtype=torch.uint8)
    pixels = torch.randn(1, 3, 96, 96) * 0.1
    for mask, colour, (x1, y1, x2, y2) in zip(masks, (0, 2), boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = 1
        pixels[:, colour, y1:y2, x1:x2] += 2
    return pixels, {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": masks}


@torch.no_grad()
def worst_overlap(backbone: nn.Module, head: Any, pixels: Tensor, truth: Objects) -> float:
    """The least IoU, of boxes and masks, of the objects with the two best detections; 0 where a class is wrong."""
    raw = head.eval()(backbone.eval()(pixels))
    (found,) = head.detections(raw, score_threshold=0.3, nms_threshold=0.5, max_detections=10)
    if len(found["boxes"]) < 2:
        return 0.0
    overlaps, best = box_iou(truth["boxes"], found["boxes"][:2]).max(dim=1)
    if not torch.equal(found["labels"][best], truth["labels"]):
        return 0.0
    if "masks" in found:
        seen, drawn = found["masks"][best].bool(), truth["masks"].bool()
        overlaps = torch.cat([overlaps, (seen & drawn).sum((1, 2)) / (seen | drawn).sum((1, 2))])
    return float(overlaps.min())


def learn_one_image(name: str, backbone: Any, *, most: int) -> None:
    """Trains until both objects are found in evaluation mode, for which it looks every 20 steps."""
    for layer in backbone.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.1  # MnasNet's, 0.0003, would take thousands of steps to know the image
    head = make(name, backbone.levels, width=64, **({"hidden": 128} if name in TWO_STAGE else {}))
    pixels, truth = scene()
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    for step in range(1, most + 1):
        terms = head.loss(head.train()(backbone.train()(pixels)), [truth], keys=torch.tensor([step]))
        optimizer.zero_grad()
        sum(total / count.clamp(min=1) for total, count in terms.values()).backward()
        nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        if step % 20 == 0 and worst_overlap(backbone, head, pixels, truth) > 0.8:
            return
    pytest.fail(f"{name} has not learnt its image in {most} steps")


@pytest.mark.parametrize("name", HEADS)
def test_one_image_is_learnt(name: str) -> None:
    torch.manual_seed(0)
    learn_one_image(name, Tiny(), most=120)


FAMILIES: dict[str, Any] = {
    "resnet18": TorchvisionBackbone,
    "vgg11_bn": TorchvisionBackbone,
    "googlenet": TorchvisionBackbone,
    "densenet121": TorchvisionBackbone,
    "mobilenet_v2": TorchvisionBackbone,
    "mobilenet_v3_small": TorchvisionBackbone,
    "mnasnet0_5": TorchvisionBackbone,
    "shufflenet_v2_x0_5": TorchvisionBackbone,
    "efficientnet_b0": TorchvisionBackbone,
    "regnet_y_400mf": TorchvisionBackbone,
    "convnext_tiny": TorchvisionBackbone,
    "resnetv2_50": TimmBackbone,
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HEADS)
def test_one_image_is_learnt_on_every_family(name: str, family: str) -> None:
    torch.manual_seed(0)
    learn_one_image(name, FAMILIES[family](name=family), most=240)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", HEADS)
def test_nothing_to_find_gives_every_weight_a_gradient(name: str, family: str) -> None:
    backbone = FAMILIES[family](name=family).train()
    head = make(name, backbone.levels)
    terms = head.loss(head(backbone(torch.randn(2, 3, 64, 64))), [target(0, 64, 64)] * 2, keys=torch.tensor([1, 2]))
    total = sum(one / count.clamp(min=1) for one, count in terms.values())
    assert torch.isfinite(total)
    total.backward()
    for parameter_name, parameter in nn.ModuleList([backbone, head]).named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("name", ONE_STAGE)
def test_one_stage_exports(name: str) -> None:
    head = lively(make(name)).eval()
    inputs = features()
    exported = torch.export.export(head, (inputs,)).module()
    for found, expected in zip(exported(inputs), head(inputs), strict=True):
        torch.testing.assert_close(found, expected)


def test_both_networks_of_two_stages_export() -> None:
    head = lively(make("faster_rcnn")).eval()
    inputs, pooled = features(), torch.randn(9, 32, 7, 7)
    second = nn.Sequential(head.box_head, head.box_predictor)
    for network, given in ((head.proposals, inputs), (second, pooled)):
        exported = torch.export.export(network, (given,)).module()
        for found, expected in zip(exported(given), network(given), strict=True):
            torch.testing.assert_close(found, expected)


BACKBONES: dict[str, Any] = {
    "resnet18": (partial(TorchvisionBackbone, name="resnet18"), (8, 16, 32, 64, 128)),
    "resnet18 at 8": (partial(TorchvisionBackbone, name="resnet18", output_stride=8), (8, 16, 32, 64, 128)),
    "squeezenet1_1": (partial(TorchvisionBackbone, name="squeezenet1_1"), (8, 16, 32, 64, 128)),
    "vgg11": (partial(TorchvisionBackbone, name="vgg11"), (8, 16, 32, 64, 128)),
    "timm": (partial(TimmBackbone, name="mobilenetv3_small_050"), (8, 16, 32, 64, 128)),
    "one level": (
        partial(
            TimmBackbone,
            name="vit_tiny_patch16_224",
        ),
        (16, 32, 64, 128),
    ),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_pyramid_over_any_backbone(backbone: str) -> None:
    kind, strides = BACKBONES[backbone]
    network = kind().eval()
    with torch.no_grad():
        maps = network(torch.randn(1, 3, 224, 224))
        pyramid = Pyramid(network.levels, strides=STRIDES, width=32)
        assert pyramid.strides == strides
        assert pyramid.size(maps) == (224, 224)
        shapes = [tuple(level.shape[1:]) for level in pyramid(maps)]
    assert shapes == [(32, -(-224 // stride), -(-224 // stride)) for stride in strides]


def test_a_backbone_without_these_strides_is_named() -> None:
    for name in HEADS:
        with pytest.raises(UsageError, match=r"strides are 1, 2, 4 .*backbone=resnet18"):
            make(name, CifarResNet(depth=8).levels)


@pytest.mark.parametrize("strides", [[8, 32], [], [16, 8]])
def test_strides_double(strides: list[int]) -> None:
    with pytest.raises(UsageError, match=r"head\.strides=\[.*must double"):
        make("fcos", strides=strides)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_coarse_levels_have_finite_gradients_in_bfloat16(side: int) -> None:
    convolution, x = HalvingConv(64, 64), torch.randn(8, 64, side, side)
    with torch.autocast("cpu", torch.bfloat16):
        convolution(x).square().sum().backward()
    found = convolution.weight.grad
    plain = nn.functional.conv2d(x, convolution.weight, convolution.bias, stride=2, padding=1)
    (expected,) = torch.autograd.grad(plain.square().sum(), convolution.weight)
    exact = side < 3  # one column wide, and therefore in float32
    assert (found - expected).norm() < (1e-5 if exact else 1e-2) * expected.norm()


@pytest.mark.parametrize("name", [*HEADS, "detection"])
def test_conf_names_a_head_that_serves_detection(name: str) -> None:
    chosen: Any = OmegaConf.load(CONF / "head" / f"{name}.yaml")
    chosen = chosen if "_target_" in chosen else OmegaConf.load(CONF / "head" / f"{chosen.defaults[0]}.yaml")
    head = instantiate(chosen, _convert_="all")(levels=LEVELS, num_classes=3)
    assert head.serves == "detection"
    assert sum(parameter.numel() for parameter in head.parameters()) < 6e6


def test_classification_waits_for_no_detection_head() -> None:
    script = "import sys; from visiontasks.heads import Linear; print('torchvision' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
