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
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, nms

from tailfin.models.assigners import BACKGROUND, giou_loss, max_iou_batch, pad_boxes, paired_iou
from tailfin.models.backbones import Backbone
from tailfin.models.detector import Detections, Detector, Limits, Targets
from tailfin.models.images import size_limits
from tailfin.models.precision import in_float32
from tailfin.models.roi_align import Places, PyramidRoIAlign
from tailfin.models.row_sampling import Proposals, chosen_rows
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
    anchors: Tensor  # [A, 4]
    best: Proposals  # per picture the boxes of highest centerness; its scores are theirs, in 0..1


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
        best = self.rpn.best(logits, decoded, batch.image_sizes)
        return Outputs(batch.image_sizes, features, logits, decoded, anchors, best)

    def losses(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        first = self.rpn.losses(outputs.logits, outputs.decoded, outputs.anchors, targets)
        return {**first, **self.roi_heads.losses(outputs.features, outputs.best, targets, outputs.image_sizes)}

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        return self.roi_heads.detect(outputs.features, outputs.best, outputs.image_sizes, limits)

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

    `rpn(batch, features)` returns the centerness logits [B, A] and boxes [B, A, 4] of all anchors, and these [A, 4].
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
        self.fg_iou = fg_iou
        self.background = background
        self.coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
        self.batch, self.proposals = batch, proposals
        self.centerness_weight, self.box_weight = centerness_weight, box_weight

    def forward(self, images: ImageList, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        levels = list(features.values())
        logits, deltas = self.head(levels)
        batch, anchors = len(levels[0]), self.anchors(images, levels)[0]
        logits, deltas = concat_box_prediction_layers(logits, deltas)  # [B * A, 1], [B * A, 4]
        decoded = self.coder.decode_single(deltas, anchors.repeat(batch, 1)).view(batch, -1, 4)
        return logits.view(batch, -1), decoded, anchors

    @torch.no_grad()
    def best(self, logits: Tensor, decoded: Tensor, image_sizes: list[tuple[int, int]]) -> Proposals:
        """The boxes of highest centerness of every picture, without suppression."""
        best, rows = logits.topk(min(self.proposals, logits.shape[1]), dim=1)
        boxes = decoded.gather(1, rows[..., None].expand(-1, -1, 4))
        boxes = torch.minimum(boxes.clamp(min=0), size_limits(image_sizes, boxes.device)[:, None])
        solid = ((boxes[..., 2:] - boxes[..., :2]) >= MIN_SIDE).all(dim=2)
        return Proposals(boxes, best.sigmoid(), solid)

    def losses(self, logits: Tensor, boxes: Tensor, anchors: Tensor, targets: Targets) -> dict[str, Tensor]:
        """L1 on the centerness and the generalised-IoU loss on the box, over sampled anchors near an object.

        Args:
            logits: [B, A].
            boxes: decoded, [B, A, 4].
            anchors: [A, 4].
        """
        truth, real = pad_boxes([target["boxes"] for target in targets], anchors.device, anchors.dtype)
        counts = [len(target["boxes"]) for target in targets]
        lower = min(self.fg_iou, BACKGROUND_IOU)
        assigned = max_iou_batch(anchors, truth, real, self.fg_iou, lower, keep_owner=True, counts=counts)
        index, drawn = sample_near(assigned, real.any(dim=1), self.batch, self.background)
        owner = assigned.gather(1, index)
        corners = (-1, -1, 4)
        objects = truth.gather(1, owner.clamp(min=0)[..., None].expand(corners))
        foreground = drawn & (owner >= 0)
        own = anchors[index]
        target = torch.where(foreground, centerness((own[..., :2] + own[..., 2:]) / 2, objects), 0.0)
        apart = (logits.gather(1, index).sigmoid() - target).abs()
        near = boxes.gather(1, index[..., None].expand(corners))
        near = torch.where(foreground[..., None], near, own)  # whatever has no object must not give NaN
        objects = torch.where(foreground[..., None], objects, own)
        box_loss = torch.where(foreground, giou_loss(near, objects), 0.0).sum() / foreground.sum().clamp(min=1)
        centerness_loss = torch.where(drawn, apart, 0.0).sum() / drawn.sum().clamp(min=1)
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
        self.fg_iou = fg_iou
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))
        self.background = background
        self.batch = batch
        self.iou_weight, self.box_weight = iou_weight, box_weight

    def predict(
        self,
        features: dict[str, Tensor],
        boxes: list[Tensor],
        image_sizes: list[tuple[int, int]],
        places: Places | None = None,
    ) -> tuple[Tensor, Tensor]:
        """IoU in 0..1 [N] and deltas [N, 4] of all boxes, images one after another, in float32."""
        shared = self.head(self.pool(features, boxes, image_sizes, places))
        return in_float32(self.iou, shared).sigmoid().squeeze(1), in_float32(self.box, shared)

    def losses(
        self,
        features: dict[str, Tensor],
        proposals: Proposals,
        targets: Targets,
        image_sizes: list[tuple[int, int]],
    ) -> dict[str, Tensor]:
        """L1 on the IoU and on the deltas, over sampled proposals (and the objects themselves) near an object."""
        with torch.no_grad():
            given = proposals.boxes
            truth, real = pad_boxes([target["boxes"] for target in targets], given.device, given.dtype)
            counts = [len(target["boxes"]) for target in targets]
            boxes, there = torch.cat([given, truth], 1), torch.cat([proposals.valid, real], 1)
            assigned = max_iou_batch(boxes, truth, real, self.fg_iou, self.fg_iou, low_quality=False, counts=counts)
            assigned = torch.where(there, assigned, BACKGROUND - 1)
            index, drawn = sample_near(assigned, real.any(dim=1), self.batch, self.background)
            picture = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(index)
            own = boxes.gather(1, index[..., None].expand(-1, -1, 4))
            levels = len(self.pool.featmap_names)
            chosen = chosen_rows(drawn, picture, len(boxes), self.pool.levels(own), levels)
            every, picture = own.flatten(0, 1)[chosen.rows], picture.flatten()[chosen.rows]
            owner = assigned[picture, index.flatten()[chosen.rows]]
            foreground = owner >= 0
            objects = torch.where(foreground[:, None], truth[picture, owner.clamp(min=0)], every)
            overlap = torch.where(foreground, paired_iou(every, objects), 0.0)
            wanted = self.coder.encode_single(objects, every)
        near = list(every.split(chosen.per_picture))
        scores, deltas = self.predict(features, near, image_sizes, Places(picture, chosen.per_level))
        iou_loss = F.l1_loss(scores, overlap, reduction="sum") / max(len(every), 1)
        distance = torch.where(foreground[:, None], (deltas - wanted).abs(), 0.0).sum()
        box_loss = distance / foreground.sum().clamp(min=1)
        return {"loss_iou": self.iou_weight * iou_loss, "loss_box_reg": self.box_weight * box_loss}

    def detect(
        self,
        features: dict[str, Tensor],
        proposals: Proposals,
        image_sizes: list[tuple[int, int]],
        limits: Limits,
    ) -> list[dict[str, Tensor]]:
        """Refined boxes, scored by sqrt(centerness x IoU), after NMS."""
        boxes = [own[valid] for own, valid in zip(proposals.boxes, proposals.valid, strict=True)]
        centerness = [own[valid] for own, valid in zip(proposals.scores, proposals.valid, strict=True)]
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


@torch.no_grad()
def sample_near(assigned: Tensor, some: Tensor, most: int, background: float = 0.0) -> tuple[Tensor, Tensor]:
    """At most `most` rows of every picture, drawn at random: those that have an object, and for every share 1 -
    `background` of them a share `background` that have none.

    Args:
        assigned: int64 [B, N], of each row the object, -1 for none, below for rows that are not drawn.
        some: bool [B], whether the picture has objects.

    Returns:
        int64 [B, S] rows and bool [B, S], which of them are drawn.
    """
    keys = torch.rand(assigned.shape, device=assigned.device)
    rows = assigned.shape[1]
    near_most = min(rows, most if background == 0 else round(most * (1 - background)))
    key, near = torch.where(assigned >= 0, keys, -1.0).topk(near_most, dim=1)
    found = key >= 0
    if background == 0:
        return near, found
    count = found.sum(1)
    share = torch.minimum(background / (1 - background) * count, most - count).round()
    share = torch.where(some, share, round(most * background))
    key, far = torch.where(assigned == BACKGROUND, keys, -1.0).topk(min(rows, most), dim=1)
    taken = (key >= 0) & (torch.arange(far.shape[1], device=far.device) < share[:, None])
    return torch.cat([near, far], dim=1), torch.cat([found, taken], dim=1)


def centerness(points: Tensor, boxes: Tensor) -> Tensor:
    """1 in the middle of a box, 0 at its border and outside: sqrt of the ratios of opposite distances; [...] of
    [..., 2] points and their boxes [..., 4]."""
    before, after = (points - boxes[..., :2]).clamp(min=0), (boxes[..., 2:] - points).clamp(min=0)
    ratio = torch.minimum(before, after) / torch.maximum(before, after).clamp(min=1e-6)
    return ratio.prod(dim=-1).sqrt()


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
