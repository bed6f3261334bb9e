"""A detector of objects of any class, after OLN (Kim et al., RA-L'22): it learns how well a box lies, not its class.

    pyramid -> per cell one anchor: centerness and a box -> best boxes, unsuppressed -> RoI head: IoU and a finer box

A box's score is the geometric mean of its centerness and the IoU it claims. As published, only boxes near an annotated
object take part in the losses, so objects that nobody annotated are not pushed down as background, as a classifier
would do; `background` gives some of the rest a share, for few pictures or a random start. Class labels are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import box_iou, clip_boxes_to_image, generalized_box_iou_loss, nms

from tailfin.models.backbones import Backbone
from tailfin.models.detector import Detections, Detector, Limits, Targets
from tailfin.models.precision import in_float32
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.models.rpn import Float32Anchors, Float32RPNHead
from tailfin.schema.detectors import LocalizerConfig

MIN_SIDE = 1.0  # pixels of the picture given; thinner boxes are dropped
BACKGROUND_IOU = 0.1  # an anchor below it belongs to no object


class Outputs(NamedTuple):
    """What the localizer makes of a batch; B pictures, A anchors each."""

    image_sizes: list[tuple[int, int]]
    features: dict[str, Tensor]
    logits: Tensor  # [B, A] centerness
    decoded: Tensor  # [B, A, 4] boxes
    anchors: list[Tensor]  # per picture [A, 4]
    boxes: list[Tensor]  # per picture the best [n, 4]
    centerness: list[Tensor]  # and theirs, in 0..1 [n]


class Localizer(Detector):
    """Boxes around objects of any class; see `Detector` for how it is called.

    Of the targets only `boxes` are read. Labels of detections are all 0, scores lie in 0..1.
    """

    backbone: Backbone

    def __init__(
        self,
        backbone: Backbone,
        rpn: CenternessRPN,
        roi_heads: IoUHead,
        *,
        limits: Limits = Limits(0.0, 1500, 0.7),
        channels_last: bool = False,
    ) -> None:
        body = backbone.body
        super().__init__(backbone, limits, channels_last=channels_last, mean=body.mean, std=body.std)
        self.rpn = rpn
        self.roi_heads = roi_heads

    def outputs(self, images: Sequence[Tensor], targets: Targets | None = None) -> Outputs:
        batch = self.batch(images)
        features = self.backbone(batch.tensors)
        logits, decoded, anchors = self.rpn(batch, features)
        boxes, centerness = self.rpn.best(logits, decoded, batch.image_sizes)
        return Outputs(batch.image_sizes, features, logits, decoded, anchors, boxes, centerness)

    def losses(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        truth = [target["boxes"] for target in targets]
        first = self.rpn.losses(outputs.logits, outputs.decoded, outputs.anchors, truth)
        return {**first, **self.roi_heads.losses(outputs.features, outputs.boxes, truth, outputs.image_sizes)}

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        return self.roi_heads.detect(outputs.features, outputs.boxes, outputs.centerness, outputs.image_sizes, limits)

    def proposals(self, images: Sequence[Tensor], top: int, nms_iou: float) -> Detections:
        """Its detections are proposals."""
        found = self.detections(self.outputs(images), Limits(0.0, top, nms_iou))
        return [{"boxes": own["boxes"].float(), "scores": own["scores"].float()} for own in found]

    def parts(self) -> dict[str, nn.Module]:
        return {
            "box": self.roi_heads.box,
            "rpn": self.rpn,
            "head": self.roi_heads.head,
            "fpn": self.backbone.fpn,
            "backbone": self.backbone.body,
        }

    def class_specific(self) -> tuple[str, ...]:
        return ()


class CenternessRPN(nn.Module):
    """One anchor per cell, its centerness for the object it belongs to, and a box.

    `rpn(batch, features)` returns the centerness logits [B, A] and boxes [B, A, 4] of all anchors, and these per
    picture [A, 4].
    """

    def __init__(
        self,
        head: RPNHead,
        anchors: AnchorGenerator,
        *,
        fg_iou: float,
        batch: int,
        proposals: int,
        centerness_weight: float,
        box_weight: float,
        background: float = 0.0,
    ) -> None:
        super().__init__()
        self.head = head
        self.anchors = anchors
        self.matcher = Matcher(fg_iou, min(fg_iou, BACKGROUND_IOU), allow_low_quality_matches=True)
        self.background = background
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.batch, self.proposals = batch, proposals
        self.centerness_weight, self.box_weight = centerness_weight, box_weight

    def forward(self, images: ImageList, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        levels = list(features.values())
        logits, deltas = self.head(levels)
        anchors = self.anchors(images, levels)
        logits, deltas = concat_box_prediction_layers(logits, deltas)  # [B * A, 1], [B * A, 4]
        decoded = self.coder.decode_single(deltas, torch.cat(anchors)).view(len(anchors), -1, 4)
        return logits.view(len(anchors), -1), decoded, anchors

    @torch.no_grad()
    def best(
        self, logits: Tensor, decoded: Tensor, image_sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Per picture the boxes [n, 4] of highest centerness, without suppression, and their centerness in 0..1 [n]."""
        boxes, scores = [], []
        best, rows = logits.topk(min(self.proposals, logits.shape[1]), dim=1)
        for own, row, value, size in zip(decoded, rows, best, image_sizes, strict=True):
            found = clip_boxes_to_image(own[row], size)
            solid = ((found[:, 2:] - found[:, :2]) >= MIN_SIDE).all(dim=1)
            boxes.append(found[solid])
            scores.append(value[solid].sigmoid())
        return boxes, scores

    def losses(self, logits: Tensor, boxes: Tensor, anchors: list[Tensor], truth: list[Tensor]) -> dict[str, Tensor]:
        """L1 on the centerness and the generalised-IoU loss on the box, over sampled anchors near an object.

        Args:
            logits: [B, A].
            boxes: decoded, [B, A, 4].
            anchors, truth: per picture [A, 4] and [M, 4].
        """
        logits_near, boxes_near, wanted, centres, matched = [], [], [], [], []
        for number, (own, objects) in enumerate(zip(anchors, truth, strict=True)):
            rows, match = sampled_matches(own, objects, self.matcher, self.batch, self.background)
            logits_near.append(logits[number, rows])
            boxes_near.append(boxes[number, rows])
            wanted.append(_objects(objects.to(own), match))
            centres.append((own[rows, :2] + own[rows, 2:]) / 2)
            matched.append(match >= 0)
        foreground, objects = torch.cat(matched), torch.cat(wanted)
        target = torch.where(foreground, centerness(torch.cat(centres), objects), 0.0)
        centerness_loss = F.l1_loss(torch.cat(logits_near).sigmoid(), target, reduction="sum") / max(len(target), 1)
        near = torch.cat(boxes_near)[foreground]
        box_loss = generalized_box_iou_loss(near, objects[foreground], reduction="sum") / max(len(near), 1)
        return {
            "loss_centerness": self.centerness_weight * centerness_loss,
            "loss_rpn_box_reg": self.box_weight * box_loss,
        }


class IoUHead(nn.Module):
    """Second stage: a finer box for each proposal, and the IoU that the proposal has with its object."""

    def __init__(
        self,
        pool: PyramidRoIAlign,
        head: nn.Module,
        channels: int,
        *,
        fg_iou: float,
        batch: int,
        iou_weight: float,
        box_weight: float,
        background: float = 0.0,
    ) -> None:
        super().__init__()
        self.pool = pool
        self.head = head
        self.iou = nn.Linear(channels, 1)
        self.box = nn.Linear(channels, 4)
        for layer, deviation in ((self.iou, 0.01), (self.box, 0.001)):
            nn.init.normal_(layer.weight, std=deviation)
            nn.init.zeros_(layer.bias)
        self.matcher = Matcher(fg_iou, fg_iou, allow_low_quality_matches=False)
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.background = background
        self.batch = batch
        self.iou_weight, self.box_weight = iou_weight, box_weight

    def predict(
        self, features: dict[str, Tensor], boxes: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """IoU in 0..1 [N] and deltas [N, 4] of all boxes, images one after another, in float32."""
        shared = self.head(self.pool(features, boxes, image_sizes))
        return in_float32(self.iou, shared).sigmoid().squeeze(1), in_float32(self.box, shared)

    def losses(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        truth: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """L1 on the IoU and on the deltas, over sampled proposals (and the objects themselves) near an object."""
        near, wanted, matched = [], [], []
        with torch.no_grad():
            for own, objects in zip(boxes, truth, strict=True):
                objects = objects.to(own)
                own = torch.cat([own, objects])
                rows, match = sampled_matches(own, objects, self.matcher, self.batch, self.background)
                near.append(own[rows])
                wanted.append(_objects(objects, match))
                matched.append(match >= 0)
            every, found, foreground = torch.cat(near), torch.cat(wanted), torch.cat(matched)
            overlap = torch.where(foreground, paired_iou(every, found), 0.0)
            deltas_wanted = self.coder.encode_single(found[foreground], every[foreground])
        scores, deltas = self.predict(features, near, image_sizes)
        iou_loss = F.l1_loss(scores, overlap, reduction="sum") / max(len(every), 1)
        box_loss = F.l1_loss(deltas[foreground], deltas_wanted, reduction="sum") / max(len(deltas_wanted), 1)
        return {"loss_iou": self.iou_weight * iou_loss, "loss_box_reg": self.box_weight * box_loss}

    def detect(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        centerness: list[Tensor],
        image_sizes: list[tuple[int, int]],
        limits: Limits,
    ) -> list[dict[str, Tensor]]:
        """Refined boxes, scored by sqrt(centerness x IoU), after NMS."""
        scores, deltas = self.predict(features, boxes, image_sizes)
        counts = [len(own) for own in boxes]
        found = self.coder.decode_single(deltas, torch.cat(boxes)).split(counts)
        results = []
        for own, score, centre, size in zip(found, scores.split(counts), centerness, image_sizes, strict=True):
            own = clip_boxes_to_image(own, size)
            value = (score * centre).sqrt()
            solid = ((own[:, 2:] - own[:, :2]) >= MIN_SIDE).all(dim=1) & (value > limits.score_threshold)
            own, value = own[solid], value[solid]
            keep = nms(own, value, limits.nms)
            keep = keep[: limits.max_dets] if limits.max_dets >= 0 else keep
            results.append({"boxes": own[keep], "scores": value[keep], "labels": torch.zeros_like(keep)})
        return results


def sampled_matches(
    boxes: Tensor, objects: Tensor, matcher: Matcher, most: int, background: float = 0.0
) -> tuple[Tensor, Tensor]:
    """At most `most` rows of `boxes`, drawn at random: those that match an object, and for every share 1 - `background`
    of them a share `background` that match none. Returns rows and the object of each, -1 for none.
    """
    if len(objects):
        match = matcher(box_iou(objects.to(boxes), boxes))
    else:
        match = torch.full((len(boxes),), Matcher.BELOW_LOW_THRESHOLD, dtype=torch.int64, device=boxes.device)
    near = _some(torch.where(match >= 0)[0], most if background == 0 else round(most * (1 - background)))
    if background == 0:
        return near, match[near]
    ratio = background / (1 - background)
    count = round(min(ratio * len(near), most - len(near))) if len(objects) else round(most * background)
    rows = torch.cat([near, _some(torch.where(match == Matcher.BELOW_LOW_THRESHOLD)[0], count)])
    return rows, match[rows]


def _some(rows: Tensor, most: int) -> Tensor:
    return rows if len(rows) <= most else rows[torch.randperm(len(rows), device=rows.device)[:most]]


def _objects(objects: Tensor, match: Tensor) -> Tensor:
    """The object of each row [N, 4]; rows without one get any box."""
    if len(objects) == 0:
        return objects.new_zeros((len(match), 4))
    return objects[match.clamp(min=0)]


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """1 in the middle of a box, 0 at its border and outside: sqrt of the ratios of opposite distances; [N] of [N, 2]
    points and their boxes [N, 4]."""
    before, after = (points - boxes[:, :2]).clamp(min=0), (boxes[:, 2:] - points).clamp(min=0)
    ratio = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)
    return ratio.prod(dim=1).sqrt()


def paired_iou(first: Tensor, second: Tensor) -> Tensor:
    """IoU [N] of boxes [N, 4] row by row."""
    low, high = torch.maximum(first[:, :2], second[:, :2]), torch.minimum(first[:, 2:], second[:, 2:])
    shared = (high - low).clamp(min=0).prod(dim=1)
    areas = (first[:, 2:] - first[:, :2]).prod(dim=1) + (second[:, 2:] - second[:, :2]).prod(dim=1)
    return shared / (areas - shared).clamp(min=1e-6)


def build_localizer(backbone: Backbone, config: LocalizerConfig, *, channels_last: bool = False) -> Localizer:
    """Assemble the detector on a pyramid."""
    channels = backbone.out_channels
    anchors = Float32Anchors(
        sizes=tuple((size,) for size in config.anchor_sizes), aspect_ratios=((1.0,),) * len(config.anchor_sizes)
    )
    rpn = CenternessRPN(
        Float32RPNHead(channels, 1),
        anchors,
        fg_iou=config.rpn_fg_iou,
        batch=config.rpn_batch,
        proposals=config.rpn_proposals,
        centerness_weight=config.centerness_weight,
        box_weight=config.rpn_box_weight,
        background=config.background,
    )
    strides = backbone.strides
    roi_heads = IoUHead(
        PyramidRoIAlign(list(strides), list(strides.values()), config.roi_size, config.roi_sampling),
        TwoMLPHead(channels * config.roi_size**2, config.head_channels),
        config.head_channels,
        fg_iou=config.roi_fg_iou,
        batch=config.roi_batch,
        iou_weight=config.iou_weight,
        box_weight=config.box_weight,
        background=config.background,
    )
    limits = Limits(0.0, config.max_proposals, config.nms)
    return Localizer(backbone, rpn, roi_heads, limits=limits, channels_last=channels_last)
