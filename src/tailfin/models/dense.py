"""What RetinaNet and ATSS share: a head on every level of a pyramid, rows for a classification loss, detections.

    pyramid -> two towers per level -> class logits, box deltas, (how well the box lies)       outputs
        -> anchors matched with objects -> rows of all anchors -> losses                        losses
        -> best candidates of every level -> boxes, NMS over all levels -> detections           detections

Every anchor is a row of the classification loss: its object's class, background C, or ignored -1. Matching is one
computation for the whole batch (`tailfin.models.assigners`); a step reads the number of positives back to the host, and
no more of its own.

What the losses are divided by (`detector.normalizer`), each time over all processes, so that many processes give what
one gives on the joined batch:

    batch      the positives of the batch, a picture without any counting as one (mmdetection; the default)
    positives  the positives of the batch, at least one (EFL's detector)
    picture    each picture's losses by its own positives, then the mean over pictures (torchvision)

A classification loss that takes a `normalizer` (focal, EFL, EQFL, FedLoss) gets it; of any other, a mean over rows, the
sum over rows is divided by it.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import ClassificationLoss
from tailfin.models.assigners import giou_loss, iou, pad_targets, paired_iou
from tailfin.models.backbones import Backbone
from tailfin.models.box_deltas import decode_deltas, encode_deltas
from tailfin.models.dense_anchors import LevelAnchors
from tailfin.models.dense_head import DenseHead
from tailfin.models.dense_ops import flatten_map
from tailfin.models.detections import best_detections
from tailfin.models.detector import (
    Compared,
    Detections,
    Detector,
    Limits,
    Targets,
    known_classes,
    reported,
    valid_cells,
)
from tailfin.models.images import size_limits
from tailfin.models.precision import in_float32
from tailfin.models.roi_align import PyramidRoIAlign

BOX_BINS, BOX_SAMPLES, BOX_CHANNELS = 7, 2, 1024  # of boxes that pre-training contrasts: Faster R-CNN's
LOGIT_SPREAD = 1.0  # standard deviation of a trained head's logits around their first value, roughly


class Outputs(NamedTuple):
    """What a dense detector makes of a batch: B pictures, levels of h x w cells with A anchors each, finest first."""

    image_sizes: list[tuple[int, int]]  # (height, width) without padding
    features: dict[str, Tensor]  # the pyramid's levels [B, channels, h, w]
    anchors: list[Tensor]  # per level [h * w * A, 4], cell by cell in reading order
    logits: list[Tensor]  # per level [B, A * num_logits, h, w], anchor by anchor
    deltas: list[Tensor]  # per level [B, A * 4, h, w]
    quality: list[Tensor]  # per level [B, A, h, w], logits; empty for a detector without


class Matched(NamedTuple):
    """Anchors and their objects; N anchors of all levels, P positive ones over the batch."""

    labels: Tensor  # int64 [B, N]: class, background C, ignored -1
    picture: Tensor  # int64 [P]
    place: Tensor  # int64 [P], the anchor
    objects: Tensor  # int64 [P], the object's row in its picture
    boxes: Tensor  # [P, 4] the object's
    anchors: Tensor  # [P, 4]
    deltas: Tensor  # [P, 4]


class DenseDetector(Detector):
    """Base of the one-stage detectors; see `Detector` for how it is called. A subclass matches and writes its losses.

    Args:
        class_loss: any classification loss; each anchor is a row.
        stds: of the box deltas.
        normalizer: see the head of this file.
        pre_nms: candidates (anchor and class) per level and picture.
        rank: "class": candidates are the best class scores; "product": the best products with the quality. The score
            threshold is on the class score in both.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        head: DenseHead,
        class_loss: ClassificationLoss,
        anchors: LevelAnchors,
        *,
        limits: Limits,
        stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        normalizer: str = "batch",
        pre_nms: int = 1000,
        rank: str = "class",
        channels_last: bool = False,
    ) -> None:
        body = backbone.body
        super().__init__(backbone, limits, channels_last=channels_last, mean=body.mean, std=body.std)
        self.head = head
        self.class_loss = class_loss
        self.anchors = anchors
        self.stds, self.normalizer, self.pre_nms, self.rank = tuple(stds), normalizer, pre_nms, rank
        self.takes_normalizer = "normalizer" in inspect.signature(class_loss.loss).parameters

    # ---- outputs and losses ----------------------------------------------------------------------------------------

    def outputs(self, images: Sequence[Tensor], targets: Targets | None = None) -> Outputs:
        batch = self.batch(images)
        return self.from_features(self.backbone(batch.tensors), batch)

    def from_features(self, features: dict[str, Tensor], batch: ImageList, targets: Targets | None = None) -> Outputs:
        """`outputs` from the pyramid's features of a batch on, for what has them already."""
        levels = list(features.values())
        anchors = self.anchors([level.shape[-2:] for level in levels], batch.tensors.shape[-2:])
        return Outputs(batch.image_sizes, features, anchors, *self.head(levels))

    @abstractmethod
    def assign(self, anchors: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        """Anchors per level [n, 4] and padded objects [B, G, 4], bool [B, G], to int64 [B, N]: the object of each
        anchor, -1 background, -2 ignored."""

    @abstractmethod
    def losses(self, outputs: Outputs, targets: Targets, assigned: Tensor | None = None) -> dict[str, Tensor]:
        """Named losses; `assigned` [B, N] takes the place of `assign`'s."""

    def match(self, outputs: Outputs, targets: Targets, assigned: Tensor | None = None) -> Matched:
        """Anchors and the objects they learn."""
        boxes, labels, valid = pad_targets(targets, outputs.deltas[0].device)
        boxes = boxes.to(outputs.anchors[0].dtype)
        if assigned is None:
            assigned = self.assign(outputs.anchors, boxes, valid)
        own = labels.gather(1, assigned.clamp(min=0))
        own = torch.where(assigned >= 0, own, torch.where(assigned == -1, self.class_loss.num_classes, -1))
        picture, place = torch.where(assigned >= 0)
        objects = assigned[picture, place]
        anchors, deltas = torch.cat(outputs.anchors)[place], flat(outputs.deltas, 4)[picture, place]
        return Matched(own, picture, place, objects, boxes[picture, objects], anchors, deltas)

    def divide_by(self, matched: Matched, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the losses of each picture are divided by, [B], and the sum of `weights` [P], at least 1, a scalar; both
        are of all processes and divided by their number."""
        counts = matched.deltas.new_zeros(len(matched.labels))
        counts = counts.index_add_(0, matched.picture, torch.ones_like(matched.deltas[:, 0]))
        given = counts if self.normalizer == "positives" else counts.clamp(min=1)
        weight = counts.new_zeros(()) if weights is None else weights.sum().to(counts)
        total, weight, processes = sum_over_ranks(given.sum(), weight, torch.ones_like(weight))
        shared = (total.clamp(min=1) / processes).expand(len(counts))
        divisor = given * len(counts) if self.normalizer == "picture" else shared
        return divisor, weight.clamp(min=1) / processes

    def classification(self, outputs: Outputs, matched: Matched, divisor: Tensor, targets: Targets) -> Tensor:
        """The classification loss of all anchors."""
        logits = flat(outputs.logits, self.class_loss.num_logits)
        facts = self.facts(matched, targets)
        together = self.normalizer != "picture"  # else each picture is a call, and the first of it
        pictures = {"pictures": len(logits) if together else 1} if "pictures" in self.class_loss.row_facts else {}
        if together:
            rows: dict[str, Any] = {name: value.flatten(0, 1) for name, value in facts.items()} | pictures
            return self._class_term(logits.flatten(0, 1), matched.labels.flatten(), divisor[0], rows)
        terms = [
            self._class_term(own, labels, by, {name: value[number] for name, value in facts.items()} | pictures)
            for number, (own, labels, by) in enumerate(zip(logits, matched.labels, divisor, strict=True))
        ]
        return torch.stack(terms).sum()

    def _class_term(self, logits: Tensor, labels: Tensor, divisor: Tensor, facts: dict[str, Any]) -> Tensor:
        if self.takes_normalizer:
            return self.class_loss(logits, labels, normalizer=divisor, **facts)
        return self.class_loss(logits, labels, **facts) * ((labels >= 0).sum() / divisor)

    def facts(self, matched: Matched, targets: Targets) -> dict[str, Tensor]:
        """What the loss asks to know about its rows, [B, N] each, and the picture's known classes, [B, N, C]."""
        wanted = known_classes(targets, [matched.labels.shape[1]] * len(targets))
        wanted = {name: value.unflatten(0, matched.labels.shape) for name, value in wanted.items()}
        at = (matched.picture, matched.place)
        if "quality" in self.class_loss.row_facts:
            quality = paired_iou(self.decoded(matched).detach(), matched.boxes)
            wanted["quality"] = quality.new_zeros(matched.labels.shape).index_put_(at, quality)
        if "gt_index" in self.class_loss.row_facts:
            counts = torch.tensor([len(target["boxes"]) for target in targets]).to(matched.labels.device)
            objects = matched.objects + (counts.cumsum(0) - counts)[matched.picture]
            wanted["gt_index"] = torch.full_like(matched.labels, -1).index_put_(at, objects)
        if "picture" in self.class_loss.row_facts:
            pictures = torch.arange(len(matched.labels), device=matched.labels.device) * (self.normalizer != "picture")
            wanted["picture"] = pictures[:, None].expand_as(matched.labels)
        if "memory" in self.class_loss.row_facts:
            wanted["memory"] = torch.zeros_like(matched.labels, dtype=torch.bool)
        return wanted

    def decoded(self, matched: Matched) -> Tensor:
        """[P, 4] predicted boxes of the positive anchors."""
        return decode_deltas(matched.anchors, matched.deltas, self.stds)

    def box_losses(self, matched: Matched, kind: str, beta: float = 0.0) -> Tensor:
        """[P] of each positive anchor: "giou" of the box, "l1" or "smooth_l1" summed over the deltas."""
        if kind == "giou":
            return giou_loss(self.decoded(matched), matched.boxes)
        wanted = encode_deltas(matched.anchors, matched.boxes, self.stds)
        if kind == "l1":
            return F.l1_loss(matched.deltas, wanted, reduction="none").sum(dim=1)
        return F.smooth_l1_loss(matched.deltas, wanted, beta=beta, reduction="none").sum(dim=1)

    # ---- detections ------------------------------------------------------------------------------------------------

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        boxes, scores, labels, kept = self.best(outputs, limits.score_threshold)
        return [
            best_detections(box[keep], score[keep], label[keep], limits)
            for box, score, label, keep in zip(boxes, scores, labels, kept, strict=True)
        ]

    def best(self, outputs: Outputs, threshold: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best candidates of all levels: boxes [B, K, 4], scores and labels [B, K], and bool [B, K], which of them
        there are: class score above the threshold, a box that is not empty within the picture."""
        batch, width = len(outputs.deltas[0]), self.class_loss.num_logits
        values, scores, labels, deltas, anchors = [], [], [], [], []
        for number, own in enumerate(outputs.logits):
            rows = flat([own], width).flatten(0, 1)
            found = reported(self, self.class_loss.scores(rows)).unflatten(0, (batch, -1))  # [B, n, C]
            quality = (
                flat([outputs.quality[number]], 1).sigmoid() if outputs.quality else torch.ones_like(found[..., :1])
            )
            value, place, label = self._level_best(found, quality)
            values.append(value)
            scores.append(value * quality[..., 0].gather(1, place))
            labels.append(label)
            deltas.append(flat([outputs.deltas[number]], 4).gather(1, place[..., None].expand(-1, -1, 4)))
            anchors.append(outputs.anchors[number][place])
        boxes = decode_deltas(torch.cat(anchors, 1).flatten(0, 1), torch.cat(deltas, 1).flatten(0, 1), self.stds)
        limit = boxes.new_tensor([[width, height] * 2 for height, width in outputs.image_sizes])[:, None]
        boxes = torch.minimum(boxes.view(batch, -1, 4).clamp(min=0), limit)
        solid = (boxes[..., 2:] > boxes[..., :2]).all(dim=2)
        return boxes, torch.cat(scores, 1), torch.cat(labels, 1), solid & (torch.cat(values, 1) > threshold)

    def _level_best(self, scores: Tensor, quality: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class score, anchor and class of the `pre_nms` best pairs of a level, [B, K] each, from [B, n, C], [B, n, 1].

        The best K pairs lie in the K anchors with the best best class, so the classes of the others are not sorted.
        """
        batch, count, classes = scores.shape
        factor = quality if self.rank == "product" else torch.ones_like(quality)
        best = scores.amax(dim=2) * factor[..., 0]
        anchors = best.topk(min(self.pre_nms, count), dim=1).indices
        own = scores.gather(1, anchors[..., None].expand(-1, -1, classes))
        ranked = own * factor.gather(1, anchors[..., None])
        pairs = ranked.flatten(1).topk(min(self.pre_nms, ranked[0].numel()), dim=1).indices
        return own.flatten(1).gather(1, pairs), anchors.gather(1, pairs // classes), pairs % classes

    # ---- parts -----------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        head = self.head
        last = nn.ModuleList([head.box] if head.quality is None else [head.box, head.quality])
        if head.scales is not None:
            last.register_parameter("scales", head.scales)
        return {
            "classifier": head.classifier,
            "box": last,
            "head": nn.ModuleList([head.class_tower, head.box_tower]),
            "fpn": self.backbone.fpn,
            "backbone": self.backbone.body,
        }

    @property
    def loss(self) -> ClassificationLoss:
        return self.class_loss

    # ---- what methods and tools ask --------------------------------------------------------------------------------

    @property
    def box_channels(self) -> int:
        """Width of the vector that `box_layers` make of a box."""
        return BOX_CHANNELS

    def box_layers(self) -> tuple[PyramidRoIAlign, nn.Module | None]:
        """What pools boxes, and new layers on it, Faster R-CNN's: this detector has no box head."""
        backbone = self.backbone
        pool = PyramidRoIAlign(backbone.level_names, backbone.level_strides, BOX_BINS, BOX_SAMPLES)
        return pool, TwoMLPHead(backbone.out_channels * BOX_BINS**2, BOX_CHANNELS)

    def annotation_scores(self, images: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Scores of the anchor whose predicted box overlaps each annotation most."""
        outputs = self.outputs(images)
        deltas = flat(outputs.deltas, 4)
        boxes, _, valid = pad_targets(targets, deltas.device)
        anchors = torch.cat(outputs.anchors).expand(len(deltas), -1, 4)
        found = decode_deltas(anchors.flatten(0, 1), deltas.flatten(0, 1), self.stds).view_as(deltas)
        overlap = torch.stack([iou(own, other) for own, other in zip(boxes, found, strict=True)])  # [B, G, N]
        picture, annotation = torch.where(valid)
        place = overlap.argmax(dim=2)[picture, annotation]
        scores = self.class_loss.scores(flat(outputs.logits, self.class_loss.num_logits)[picture, place])
        if outputs.quality:
            scores = scores * flat(outputs.quality, 1)[picture, place].sigmoid()
        return scores, torch.arange(len(scores), device=scores.device)

    def compared(self, teacher: Detector, images: Sequence[Tensor], targets: Targets, *, shared: bool) -> Compared:
        """Eq. 3 on the positive anchors with the teacher's class tower, eq. 2 on a pyramid that trains."""
        teacher = cast(DenseDetector, teacher)
        batch = self.batch(images)
        outputs = self.from_features(self.backbone(batch.tensors), batch)
        matched = self.match(outputs, targets)
        at = (matched.picture, matched.place)
        pyramid = any(value.requires_grad for value in self.backbone.parameters())
        width = self.class_loss.num_logits
        with torch.no_grad():
            taught = teacher.backbone(batch.tensors)
            towers = [teacher.head.class_tower(level) for level in taught.values()]
            wanted = flat([in_float32(teacher.head.classifier, tower) for tower in towers], width)[at]
        logits = [in_float32(self.head.classifier, tower) for tower in towers] if shared else outputs.logits
        sizes = size_limits(batch.image_sizes, wanted.device)
        maps = list(outputs.features.values()) if pyramid else []
        valid = [valid_cells(level.shape[-2:], batch.tensors.shape[-2:], sizes) for level in maps]
        theirs = list(taught.values()) if pyramid else []
        own = flat(logits, width)[at]
        return Compared(self.losses(outputs, targets), maps, theirs, valid, sizes, own[None], wanted[None])

    def rehearsed(self, images: Sequence[Tensor]) -> Outputs:
        """Outputs with logits as spread as a trained head's, the same in every call."""
        outputs = self.outputs(images)
        generator = torch.Generator().manual_seed(0)
        bias = cast(Tensor, self.head.classifier.bias).detach()[:, None, None]
        logits = [
            LOGIT_SPREAD * torch.randn(own.shape, generator=generator).to(own) + bias.to(own) for own in outputs.logits
        ]
        return outputs._replace(logits=logits)

    def candidates(self, outputs: Outputs, limits: Limits) -> int:
        return int(self.best(outputs, limits.score_threshold)[3].sum())


def flat(maps: Sequence[Tensor], width: int) -> Tensor:
    """Levels [B, A * width, h, w] to rows [B, N, width]: level by level, cell by cell, anchor by anchor."""
    return torch.cat([flatten_map(own, width) for own in maps], dim=1)
