"""The region proposal network: torchvision's weights and rules, for all pictures of a batch at once, in steps.

    raw = rpn.outputs(batch, features)                 objectness, deltas, anchors
    proposals = rpn.propose(raw, image_sizes)          decoded, clipped, suppressed within each level, best first
    raw, proposals = rpn(batch, features)              both
    losses = rpn.losses(raw, targets)                  of sampled anchors

Anchors, objectness, deltas and boxes are float32 under autocast as well: half precision moves large boxes by pixels.
Nothing is read back to the host but what the suppression leaves, once for a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import nms

from tailfin.models.assigners import BACKGROUND, iou, max_iou_batch, pad_targets
from tailfin.models.box_deltas import encode_deltas
from tailfin.models.dense_anchors import LevelAnchors, cell_anchors
from tailfin.models.images import size_limits
from tailfin.models.row_sampling import Proposals, sample_rows
from tailfin.samplers.nms_resampling import (
    BACKGROUND_IOU,
    THRESHOLDS,
    class_groups,
    linear_resampling,
    linear_thresholds,
)
from tailfin.stats import ClassStats


class Float32Anchors(AnchorGenerator):
    """torchvision's anchors in float32 whatever the features' type: half precision moves large anchors by pixels.

    `exact` sides are not rounded to whole pixels, as in mmdetection, and levels are as many pixels apart as `strides`
    say (none: as the sizes of picture and level suggest, torchvision's rule).
    """

    def __init__(
        self,
        sizes: tuple[tuple[int, ...], ...],
        aspect_ratios: tuple[tuple[float, ...], ...],
        *,
        exact: bool = False,
        strides: Sequence[int] | None = None,
    ) -> None:
        super().__init__(sizes, aspect_ratios)
        cells = list(self.cell_anchors)
        if exact:  # in a cell the ratio changes slowest, as in torchvision's
            cells = [
                torch.cat([cell_anchors(side, 1, ratios) for side in own])
                for own, ratios in zip(sizes, aspect_ratios, strict=True)
            ]
        self.levels = LevelAnchors(cells, strides)  # buffers: nothing is uploaded in a step

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Per picture the same [A, 4]."""
        shapes = [level.shape[-2:] for level in feature_maps]
        anchors = torch.cat(self.levels(shapes, image_list.tensors.shape[-2:]))
        return [anchors] * len(image_list.image_sizes)


class Float32RPNHead(RPNHead):
    """Objectness and deltas leave the head in float32, so that boxes are decoded in it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [value.float() for value in objectness], [value.float() for value in deltas]


class RPNOutputs(NamedTuple):
    """What the network says about every anchor of a batch; B pictures, A anchors each."""

    objectness: Tensor  # [B, A]
    deltas: Tensor  # [B, A, 4]
    anchors: Tensor  # [A, 4]
    per_level: list[int]  # anchors of each level
    left_out: Tensor | None = None  # bool [B, A], anchors that are nobody's background


class Candidates(NamedTuple):
    """The best anchors of every level as boxes, K per picture, each level's by descending logit."""

    boxes: Tensor  # [B, K, 4] within the picture
    logits: Tensor  # [B, K]; -inf where the box is empty
    per_level: list[int]


class RPN(RegionProposalNetwork):
    """torchvision's network; its proposals, and what its losses are made of, come from one call.

    Args:
        box_loss: "smooth_l1", torchvision's with beta 1/9, or "l1".
        min_pos_iou: IoU from which an object's best anchors are positive, whatever they overlap it by otherwise.
        low_quality: such an anchor stays with the object that it overlaps most ("keep_owner", torchvision) or learns
            the one that claims it ("take", mmdetection); "none": there are no such anchors.

    Further arguments are those of torchvision's `RegionProposalNetwork`.
    """

    def __init__(
        self,
        *arguments: Any,
        box_loss: str = "smooth_l1",
        min_pos_iou: float = 0.0,
        low_quality: str = "keep_owner",
        **options: Any,
    ) -> None:
        super().__init__(*arguments, **options)
        self.fg_iou, self.bg_iou = options["fg_iou_thresh"], options["bg_iou_thresh"]
        self.batch, self.fg_fraction = options["batch_size_per_image"], options["positive_fraction"]
        self.box_loss, self.min_pos_iou, self.low_quality = box_loss, min_pos_iou, low_quality

    def forward(  # type: ignore[override]
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[RPNOutputs, Proposals]:
        raw = self.outputs(images, features)
        return raw, self.propose(raw, images.image_sizes, targets)

    def outputs(self, images: ImageList, features: dict[str, Tensor]) -> RPNOutputs:
        """Objectness and deltas of every anchor."""
        levels = list(features.values())
        objectness, deltas = self.head(levels)
        anchors = self.anchor_generator(images, levels)[0]
        batch, per_level = len(levels[0]), [values[0].numel() for values in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        return RPNOutputs(objectness.view(batch, -1), deltas.view(batch, -1, 4), anchors, per_level)

    # ---- proposals -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def propose(
        self,
        raw: RPNOutputs,
        image_sizes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> Proposals:
        """Boxes and objectness in 0..1 of every picture, best first, without gradients; `targets` are for a network
        whose proposals depend on them in training."""
        found = self.candidates(raw, image_sizes)
        return self.best(found, kept_by_nms(found, self.nms_thresh))

    def propose_more(
        self, raw: RPNOutputs, image_sizes: list[tuple[int, int]], count: int, nms_iou: float
    ) -> Proposals:
        """`propose` with at least `count` boxes per level before the suppression and per picture after it, and with a
        suppression within each level that is no stricter than `nms_iou`."""
        wider = copy.copy(self)  # shares all weights; the limits are its own
        wider.nms_thresh = max(nms_iou, self.nms_thresh)
        wider._pre_nms_top_n = {key: max(value, count) for key, value in self._pre_nms_top_n.items()}
        wider._post_nms_top_n = {key: max(value, count) for key, value in self._post_nms_top_n.items()}
        return RPN.propose(wider, raw, image_sizes)

    @torch.no_grad()
    def candidates(self, raw: RPNOutputs, image_sizes: list[tuple[int, int]]) -> Candidates:
        """The best anchors of every level, decoded."""
        picked, start = [], 0
        for count in raw.per_level:
            own = raw.objectness[:, start : start + count]
            picked.append(own.topk(min(self.pre_nms_top_n(), count), dim=1).indices + start)
            start += count
        place = torch.cat(picked, dim=1)
        deltas = raw.deltas.gather(1, place[..., None].expand(-1, -1, 4))
        boxes = self.box_coder.decode_single(deltas.flatten(0, 1), raw.anchors[place].flatten(0, 1))
        boxes = boxes.view(*place.shape, 4)
        boxes = torch.minimum(boxes.clamp(min=0), size_limits(image_sizes, boxes.device)[:, None])
        solid = ((boxes[..., 2:] - boxes[..., :2]) >= self.min_size).all(dim=2)
        logits = raw.objectness.gather(1, place)
        return Candidates(boxes, torch.where(solid, logits, -torch.inf), [own.shape[1] for own in picked])

    def best(self, found: Candidates, kept: Tensor) -> Proposals:
        """The best of the candidates that are `kept`, bool [B, K]."""
        ranked = torch.where(kept, found.logits, -torch.inf)
        logits, place = ranked.topk(min(self.post_nms_top_n(), ranked.shape[1]), dim=1)
        boxes = found.boxes.gather(1, place[..., None].expand(-1, -1, 4))
        return Proposals(boxes, logits.sigmoid(), logits > -torch.inf)

    # ---- losses ----------------------------------------------------------------------------------------------------

    def losses(self, raw: RPNOutputs, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`loss_rpn_objectness` and `loss_rpn_box_reg` over sampled anchors."""
        device = raw.deltas.device
        truth, _, real = pad_targets(targets, device)
        assigned = max_iou_batch(
            raw.anchors,
            truth,
            real,
            self.fg_iou,
            self.bg_iou,
            self.min_pos_iou,
            self.low_quality != "none",
            self.low_quality == "keep_owner",
            counts=[len(target["boxes"]) for target in targets],
        )
        background = assigned == BACKGROUND
        if raw.left_out is not None:
            background &= ~raw.left_out
        index, drawn = sample_rows(assigned >= 0, background, self.batch, self.fg_fraction)
        owner = assigned.gather(1, index)
        positive = (owner >= 0) & drawn
        total = drawn.sum().clamp(min=1)
        objectness = F.binary_cross_entropy_with_logits(
            raw.objectness.gather(1, index), positive.float(), weight=drawn.float(), reduction="sum"
        )
        anchors = raw.anchors[index]
        corners = (-1, -1, 4)
        objects = truth.gather(1, owner.clamp(min=0)[..., None].expand(corners))
        objects = torch.where(positive[..., None], objects, anchors)  # a background anchor's target is 0
        wanted = encode_deltas(anchors.flatten(0, 1), objects.flatten(0, 1)).view(anchors.shape)
        found = raw.deltas.gather(1, index[..., None].expand(corners))
        if self.box_loss == "l1":
            distance = F.l1_loss(found, wanted, reduction="none")
        else:
            distance = F.smooth_l1_loss(found, wanted, beta=1 / 9, reduction="none")
        box = torch.where(positive[..., None], distance, 0.0).sum()
        return {"loss_rpn_objectness": objectness / total, "loss_rpn_box_reg": box / total}


def kept_by_nms(found: Candidates, iou: float, wanted: Tensor | None = None) -> Tensor:
    """bool [B, K]: what suppression within each picture and level keeps; empty boxes are never kept.

    One call of `nms` for the batch on an accelerator, which is its one read back to the host. On CPUs, where its time
    grows with the square of the boxes, one call for each picture and level.

    Args:
        wanted: bool [B, K], boxes that take part; by default all.
    """
    boxes, scores = found.boxes, found.logits
    if wanted is not None:
        scores = torch.where(wanted, scores, -torch.inf)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    if boxes.device.type == "cpu":
        for picture in range(len(boxes)):
            start = 0
            for count in found.per_level:
                part = slice(start, start + count)
                kept[picture, start + nms(boxes[picture, part], scores[picture, part], iou)] = True
                start += count
    else:
        exact = torch.float64 if boxes.device.type != "mps" else torch.float32  # see `nms_per_class`
        level = torch.cat([boxes.new_full((n,), i, dtype=exact) for i, n in enumerate(found.per_level)])
        place = level + len(found.per_level) * torch.arange(len(boxes), device=boxes.device)[:, None]
        moved = boxes.to(exact) + (place * (boxes.max().to(exact) + 1))[..., None]
        keep = nms(moved.flatten(0, 1), scores.to(exact).flatten(), iou)
        kept.view(-1).index_fill_(0, keep, True)
    return kept & (scores > -torch.inf)


class ResamplingRPN(RPN):
    """The RPN whose training proposals are resampled by the frequency of the objects they lie on (Forest R-CNN).

    Targets need `labels` (0..C-1) beside `boxes`. Weights, losses and test-time proposals are those of the plain RPN.
    """

    groups: Tensor
    class_thresholds: Tensor

    def __init__(
        self,
        stats: ClassStats,
        *arguments: Any,
        scheme: str = "discrete",
        thresholds: Sequence[float] = THRESHOLDS,
        **options: Any,
    ) -> None:
        """`arguments` and `options` are those of `RPN`."""
        super().__init__(*arguments, **options)
        if scheme not in ("discrete", "linear"):
            raise ValueError(f'scheme must be "discrete" or "linear" (given: "{scheme}")')
        if len(thresholds) != 3 or not all(0 < value <= 1 for value in thresholds):
            raise ValueError(f"thresholds must be three IoUs, rare, common, frequent (given: {tuple(thresholds)})")
        self.scheme, self.thresholds = scheme, tuple(thresholds)
        self.register_buffer("groups", class_groups(stats), persistent=False)
        self.register_buffer("class_thresholds", linear_thresholds(stats, thresholds), persistent=False)

    @torch.no_grad()
    def propose(
        self,
        raw: RPNOutputs,
        image_sizes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> Proposals:
        if not self.training or targets is None:
            return super().propose(raw, image_sizes)
        found = self.candidates(raw, image_sizes)
        kept = self._discrete(found, targets) if self.scheme == "discrete" else self._linear(found, targets)
        return self.best(found, kept)

    def _discrete(self, found: Candidates, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        """`discrete_resampling` for the batch: a suppression for each group of classes."""
        truth, labels, real = pad_targets(targets, found.boxes.device)
        overlaps = iou(found.boxes, truth) >= BACKGROUND_IOU  # [B, K, G]
        group = torch.where(real, self.groups[labels], -1)
        on_rare, on_common = ((overlaps & (group == own)[:, None]).any(dim=2) for own in (0, 1))
        rare, common, rest = (kept_by_nms(found, threshold) for threshold in self.thresholds)
        return (on_rare & rare) | (on_common & common) | (rest & ~on_rare & ~on_common)

    def _linear(self, found: Candidates, targets: Sequence[dict[str, Tensor]]) -> Tensor:
        """`linear_resampling` picture by picture."""
        counts = torch.tensor(found.per_level)
        levels = torch.arange(len(counts)).repeat_interleave(counts).to(found.boxes.device)
        kept = torch.zeros_like(found.logits, dtype=torch.bool)
        for own, boxes, logits, target in zip(kept, found.boxes, found.logits, targets, strict=True):
            truth, labels = target["boxes"].to(boxes), target["labels"].to(boxes.device)
            own[linear_resampling(boxes, logits, levels, truth, labels, self.class_thresholds)] = True
        return kept & (found.logits > -torch.inf)
