"""Faster R-CNN: a network that proposes regions, and one that looks at each of them."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

from visiontasks.contracts import Level
from visiontasks.heads.detection.geometry import Anchors, by_anchor, cells, labelled, matched, precise, truth_boxes
from visiontasks.heads.detection.pooling import pool_regions
from visiontasks.heads.detection.pyramid import STRIDES, Pyramid
from visiontasks.heads.detection.raw import Detection, Regions, Target, Terms, TwoStage
from visiontasks.heads.detection.sampling import balanced, generators
from visiontasks.heads.detection.selecting import without_overlaps

_BETA = 1 / 9  # where the smooth L1 loss turns from a square into a line
_POOLED = 7


class Drawn(NamedTuple):
    """The regions of each image that are learnt."""

    boxes: list[Tensor]  # (n, 4)
    objects: list[Tensor]  # (n,) index of the region's object in its image, or BACKGROUND
    labels: Tensor  # (N,) class, or BACKGROUND, of all images one after the other


class RegionProposals(nn.Module):
    """The first stage's network: objectness and a box for each anchor at each place of a feature pyramid.

    Ren, He, Girshick, Sun 2015, Faster R-CNN, arXiv 1506.01497. `layers` is torchvision's RPNHead.

    Shapes: a pyramid to Regions.
    """

    def __init__(
        self,
        levels: tuple[Level, ...],
        *,
        strides: Sequence[int],
        width: int,
        anchor_scale: float,
        ratios: Sequence[float],
    ) -> None:
        super().__init__()
        self.pyramid = Pyramid(levels, strides=strides, width=width, learnt=False)
        self.anchors = Anchors(cells(self.pyramid.strides, anchor_scale, ratios), self.pyramid.strides)
        self.layers = RPNHead(width, len(ratios))

    def forward(self, features: list[Tensor]) -> Regions:
        maps = self.pyramid(features)
        objectness, codes = self.layers(maps)
        return Regions(
            maps=maps,
            objectness=by_anchor(objectness, 1)[..., 0],
            codes=by_anchor(codes, 4),
            anchors=self.anchors(maps),
            counts=self.anchors.counts(maps),
            size=self.pyramid.size(features),
        )


class FasterRCNN(nn.Module):
    """Two-stage detection: regions are proposed, and each is classified and its box refined.

    Ren, He, Girshick, Sun 2015, Faster R-CNN, arXiv 1506.01497, on a feature pyramid (Lin et al. 2016,
    arXiv 1612.03144). The layers and their names within `proposals`, `box_head` and `box_predictor` are torchvision's.

    Shapes: a pyramid to TwoStage. The networks of both stages export; the choice of proposals between them does not.

    Args:
        strides: of the feature pyramid; 4 to 64 in the paper.
        width: channels of the feature pyramid; 256 in the paper.
        hidden: units of the two layers that look at a region; 1024 in the paper.
        anchor_scale: side of a level's anchors in strides; 8 in the paper, whose finest stride is 4.
        ratios: heights of the anchors over their widths.
        candidates: best anchors a level that go on to the suppression of overlaps.
        proposals: most regions of an image that the second stage looks at.
        proposal_overlap: IoU above which the worse of two proposals is dropped.
        anchors_learnt: anchors of an image that the first stage learns, at most half of them of objects.
        regions_learnt: those that the second stage learns, at most a quarter of them of objects; 512 in the paper.

    Raises:
        UsageError: if the strides do not double, or the backbone has none of them.
    """

    serves: ClassVar[str] = "detection"
    shards: ClassVar[bool] = False  # its second stage is used outside its forward
    losses: ClassVar[tuple[str, ...]] = ("objectness", "proposals", "classification", "boxes")
    object_share: ClassVar[tuple[float, float]] = (0.5, 0.25)  # of the anchors and of the regions learnt

    def __init__(
        self,
        *,
        levels: tuple[Level, ...],
        num_classes: int,
        strides: Sequence[int] = STRIDES,
        width: int = 128,
        hidden: int = 512,
        anchor_scale: float = 4.0,
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        candidates: int = 1000,
        proposals: int = 300,
        proposal_overlap: float = 0.7,
        anchors_learnt: int = 256,
        regions_learnt: int = 64,
    ) -> None:
        super().__init__()
        self.candidates, self.most, self.proposal_overlap = candidates, proposals, proposal_overlap
        self.learnt = (anchors_learnt, regions_learnt)
        self.proposals = RegionProposals(levels, strides=strides, width=width, anchor_scale=anchor_scale, ratios=ratios)
        self.box_head = TwoMLPHead(width * _POOLED**2, hidden)
        self.box_predictor = FastRCNNPredictor(hidden, num_classes + 1)
        self.anchor_coder = BoxCoder(weights=(1.0, 1.0, 1.0, 1.0))
        self.region_coder = BoxCoder(weights=(10.0, 10.0, 5.0, 5.0))
        self.anchor_matcher = Matcher(0.7, 0.3, allow_low_quality_matches=True)
        self.region_matcher = Matcher(0.5, 0.5, allow_low_quality_matches=False)

    def forward(self, features: list[Tensor]) -> TwoStage:
        regions = self.proposals(features)
        return TwoStage(regions=regions, proposals=self.propose(regions))

    @torch.no_grad()
    def propose(self, regions: Regions) -> list[Tensor]:
        """Gives the best anchors of each image, refined, inside the image and without overlaps, (N, 4) each."""
        levels = torch.split(precise(regions.objectness), list(regions.counts), dim=1)
        best = [level.topk(min(self.candidates, level.shape[1]), dim=1) for level in levels]
        starts = [sum(regions.counts[:index]) for index in range(len(levels))]
        place = torch.cat([chosen.indices + start for chosen, start in zip(best, starts, strict=True)], dim=1)  # (B, n)
        scores = torch.cat([chosen.values for chosen in best], dim=1).sigmoid()
        level = torch.cat([torch.full_like(chosen.indices[0], index) for index, chosen in enumerate(best)])  # (n,)
        codes = precise(regions.codes.gather(1, place[..., None].expand(-1, -1, 4)))
        boxes = self.anchor_coder.decode_single(codes.flatten(0, 1), regions.anchors[place].flatten(0, 1))
        boxes = clip_boxes_to_image(boxes.view_as(codes), regions.size)
        return [self._apart(own, score, level) for own, score in zip(boxes, scores, strict=True)]

    def _apart(self, boxes: Tensor, scores: Tensor, level: Tensor) -> Tensor:
        large = remove_small_boxes(boxes, 1e-3)
        boxes, scores, level = boxes[large], scores[large], level[large]
        return boxes[batched_nms(boxes, scores, level, self.proposal_overlap)[: self.most]]

    def loss(self, raw: TwoStage, targets: list[Target], *, keys: Tensor | None = None) -> Terms:
        """Both stages' classification and box losses, each with the number of anchors or regions drawn as its count.

        keys (B,) holds one number an image on which the draws of its anchors and regions depend; without keys each
        image is drawn from alike every time.
        """
        return self._learn(raw, targets, keys)[0]

    def _learn(self, raw: TwoStage, targets: list[Target], keys: Tensor | None) -> tuple[Terms, Drawn]:
        streams = generators(keys, len(targets))
        first = self._first_terms(raw.regions, targets, streams)
        drawn = self._draw(raw.proposals, targets, streams)
        return first | self._second_terms(raw.regions, drawn, targets), drawn

    def _first_terms(self, regions: Regions, targets: list[Target], streams: list[torch.Generator]) -> Terms:
        matches = [matched(self.anchor_matcher, regions.anchors, target["boxes"]) for target in targets]  # (P,) each
        drawn = [
            balanced(match, size=self.learnt[0], fraction=self.object_share[0], generator=stream)
            for match, stream in zip(matches, streams, strict=True)
        ]
        objects = [match[own] for match, own in zip(matches, drawn, strict=True)]
        image, place, found = _numbers(drawn), torch.cat(drawn), torch.cat(objects) >= 0  # (N,) each
        wanted = self.anchor_coder.encode_single(truth_boxes(targets, objects), regions.anchors[place[found]])
        codes = precise(regions.codes[image, place][found])
        objectness = precise(regions.objectness[image, place])
        count = regions.anchors.new_tensor(len(place))
        errors = F.binary_cross_entropy_with_logits(objectness, found.to(objectness.dtype), reduction="sum")
        return {
            "objectness": (errors, count),
            "proposals": (F.smooth_l1_loss(codes, wanted, beta=_BETA, reduction="sum"), count),
        }

    @torch.no_grad()
    def _draw(self, proposals: list[Tensor], targets: list[Target], streams: list[torch.Generator]) -> Drawn:
        """Draws the regions to learn from the proposals and the objects' own boxes."""
        boxes, objects, labels = [], [], []
        for proposed, target, stream in zip(proposals, targets, streams, strict=True):
            candidates = torch.cat([proposed, target["boxes"].float()])  # (n, 4)
            match = matched(self.region_matcher, candidates, target["boxes"])
            drawn = balanced(match, size=self.learnt[1], fraction=self.object_share[1], generator=stream)
            boxes.append(candidates[drawn])
            objects.append(match[drawn])
            labels.append(labelled(match[drawn], target["labels"]))
        return Drawn(boxes=boxes, objects=objects, labels=torch.cat(labels))

    def _second_terms(self, regions: Regions, drawn: Drawn, targets: list[Target]) -> Terms:
        scores, codes = self._looked_at(regions, drawn.boxes)
        found = drawn.labels >= 0  # (N,)
        own = codes[found, drawn.labels[found] + 1]  # (F, 4)
        wanted = self.region_coder.encode_single(truth_boxes(targets, drawn.objects), torch.cat(drawn.boxes)[found])
        count = scores.new_tensor(len(scores))
        return {
            "classification": (F.cross_entropy(scores, drawn.labels + 1, reduction="sum"), count),
            "boxes": (F.smooth_l1_loss(own, wanted, beta=_BETA, reduction="sum"), count),
        }

    def _looked_at(self, regions: Regions, boxes: list[Tensor]) -> tuple[Tensor, Tensor]:
        """The second stage's scores (N, K + 1), the first for background, and codes (N, K + 1, 4), in float32."""
        pooled = self._pooled(regions, boxes, _POOLED)
        scores, codes = self.box_predictor(self.box_head(pooled))
        return precise(scores), precise(codes).reshape(len(codes), -1, 4)

    def _pooled(self, regions: Regions, boxes: list[Tensor], size: int) -> Tensor:
        """Maps of the boxes, (N, width, size, size), from the levels that have a lateral connection.

        They are pooled again in the backward pass: the indices and weights would take more memory than that takes time.
        """
        pyramid = self.proposals.pyramid
        number = len(pyramid.used)
        maps, strides = regions.maps[:number], pyramid.strides[:number]
        pooled: Tensor = checkpoint(
            pool_regions, maps, boxes, strides, size=size, use_reentrant=False, preserve_rng_state=False
        )
        return pooled

    def detections(
        self, raw: TwoStage, *, score_threshold: float, nms_threshold: float, max_detections: int
    ) -> list[Detection]:
        """The objects of each image, best first."""
        scores, codes = self._looked_at(raw.regions, raw.proposals)
        numbers = [len(boxes) for boxes in raw.proposals]
        chances = torch.split(scores.softmax(dim=1)[:, 1:], numbers)  # (n, K) each
        found = []
        for boxes, chance, code in zip(raw.proposals, chances, torch.split(codes, numbers), strict=True):
            region, label = (chance > score_threshold).nonzero(as_tuple=True)
            refined = self.region_coder.decode_single(code[region, label + 1], boxes[region])
            found.append(
                without_overlaps(
                    clip_boxes_to_image(refined, raw.regions.size),
                    chance[region, label],
                    label,
                    nms_threshold=nms_threshold,
                    max_detections=max_detections,
                )
            )
        return found


def _numbers(drawn: list[Tensor]) -> Tensor:
    """The number of the image that each of the drawn belongs to, (N,)."""
    return torch.cat([torch.full_like(own, index) for index, own in enumerate(drawn)])
