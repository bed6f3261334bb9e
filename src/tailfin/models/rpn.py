"""The region proposal network: torchvision's, in steps that can be called one by one, and with NMS resampling.

    raw = rpn.outputs(batch, features)                 objectness, deltas, anchors
    boxes, scores = rpn.propose(raw, image_sizes)      decoded, clipped, suppressed within each level, best first
    raw, boxes, scores = rpn(batch, features)          both
    losses = rpn.losses(raw, targets)                  of sampled anchors

Anchors, objectness, deltas and boxes are float32 under autocast as well: half precision moves large boxes by pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead, concat_box_prediction_layers
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

from tailfin.models.dense_anchors import cell_anchors
from tailfin.samplers.nms_resampling import (
    THRESHOLDS,
    class_groups,
    discrete_resampling,
    linear_resampling,
    linear_thresholds,
)
from tailfin.stats import ClassStats


class Float32Anchors(AnchorGenerator):
    """Anchors in float32 whatever the features' type: half precision moves large anchors by pixels."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class ExactAnchors(Float32Anchors):
    """Anchors whose sides are not rounded, on cells of the given strides: detectron2's and mmdetection's. torchvision
    rounds corners to whole pixels and divides the padded picture by the level's cells.

    Args:
        strides: pixels per cell of each level.
        more: those of torchvision's `AnchorGenerator`.
    """

    def __init__(self, strides: Sequence[int], **more: Any) -> None:
        super().__init__(**more)
        self.strides = tuple(strides)
        self.cell_anchors = [
            cell_anchors(float(sizes[0]), 1, ratios).float()
            for sizes, ratios in zip(self.sizes, self.aspect_ratios, strict=True)
        ]

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Per picture [A, 4], level by level."""
        shapes = [[int(side) for side in own.shape[-2:]] for own in feature_maps]
        device = feature_maps[0].device
        self.set_cell_anchors(torch.float32, device)
        steps = [[torch.tensor(stride, device=device)] * 2 for stride in self.strides]
        anchors = torch.cat(self.grid_anchors(shapes, steps))
        return [anchors for _ in image_list.image_sizes]


class Float32RPNHead(RPNHead):
    """Objectness and deltas leave the head in float32, so that boxes are decoded in it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [value.float() for value in objectness], [value.float() for value in deltas]


class RPNOutputs(NamedTuple):
    """What the network says about every anchor of a batch; B pictures, A anchors each."""

    objectness: Tensor  # [B * A, 1]
    deltas: Tensor  # [B * A, 4]
    anchors: list[Tensor]  # per picture [A, 4]
    per_level: list[int]  # anchors of each level


class RPN(RegionProposalNetwork):
    """torchvision's network; its proposals, and what its losses are made of, come from one call."""

    def forward(  # type: ignore[override]
        self, images: ImageList, features: dict[str, Tensor], targets: Sequence[dict[str, Tensor]] | None = None
    ) -> tuple[RPNOutputs, list[Tensor], list[Tensor]]:
        raw = self.outputs(images, features)
        return raw, *self.propose(raw, images.image_sizes, targets)

    def outputs(self, images: ImageList, features: dict[str, Tensor]) -> RPNOutputs:
        """Objectness and deltas of every anchor."""
        levels = list(features.values())
        objectness, deltas = self.head(levels)
        anchors = self.anchor_generator(images, levels)
        per_level = [values[0].numel() for values in objectness]
        objectness, deltas = concat_box_prediction_layers(objectness, deltas)
        return RPNOutputs(objectness, deltas, anchors, per_level)

    def propose(
        self,
        raw: RPNOutputs,
        image_sizes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes [n, 4] and objectness in 0..1 [n] per picture, best first, without gradients; `targets` are for a
        network whose proposals depend on them in training."""
        boxes = self._decoded(raw)
        return self.filter_proposals(boxes, raw.objectness, image_sizes, raw.per_level)

    def propose_more(
        self, raw: RPNOutputs, image_sizes: list[tuple[int, int]], count: int, nms_iou: float
    ) -> tuple[list[Tensor], list[Tensor]]:
        """`propose` with at least `count` boxes per level before the suppression and per picture after it, and with a
        suppression within each level that is no stricter than `nms_iou`."""
        boxes = self._decoded(raw)
        wider = copy.copy(self)  # shares all weights; the limits are its own
        wider.nms_thresh = max(nms_iou, self.nms_thresh)
        wider._pre_nms_top_n = {key: max(value, count) for key, value in self._pre_nms_top_n.items()}
        wider._post_nms_top_n = {key: max(value, count) for key, value in self._post_nms_top_n.items()}
        return RegionProposalNetwork.filter_proposals(wider, boxes, raw.objectness, image_sizes, raw.per_level)

    def _decoded(self, raw: RPNOutputs) -> Tensor:
        """Boxes [B, A, 4] of all anchors, without gradients."""
        return self.box_coder.decode(raw.deltas.detach(), raw.anchors).view(len(raw.anchors), -1, 4)

    def losses(self, raw: RPNOutputs, targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """`loss_rpn_objectness` and `loss_rpn_box_reg` over sampled anchors."""
        labels, matched = self.assign_targets_to_anchors(raw.anchors, list(targets))
        wanted = self.box_coder.encode(matched, raw.anchors)
        objectness, box = self.compute_loss(raw.objectness, raw.deltas, labels, wanted)
        return {"loss_rpn_objectness": objectness, "loss_rpn_box_reg": box}


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
        """`arguments` and `options` are those of torchvision's `RegionProposalNetwork`."""
        super().__init__(*arguments, **options)
        if scheme not in ("discrete", "linear"):
            raise ValueError(f'scheme must be "discrete" or "linear" (given: "{scheme}")')
        if len(thresholds) != 3 or not all(0 < value <= 1 for value in thresholds):
            raise ValueError(f"thresholds must be three IoUs, rare, common, frequent (given: {tuple(thresholds)})")
        self.scheme, self.thresholds = scheme, tuple(thresholds)
        self.register_buffer("groups", class_groups(stats), persistent=False)
        self.register_buffer("class_thresholds", linear_thresholds(stats, thresholds), persistent=False)

    def propose(
        self,
        raw: RPNOutputs,
        image_sizes: list[tuple[int, int]],
        targets: Sequence[dict[str, Tensor]] | None = None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        if not self.training or targets is None:
            return super().propose(raw, image_sizes)
        decoded = self._decoded(raw)
        objectness = raw.objectness.detach().reshape(len(decoded), -1)
        best = self._get_top_n_idx(objectness, raw.per_level)
        level_of = torch.repeat_interleave(torch.tensor(raw.per_level, device=best.device))[best]
        boxes_per_image, scores_per_image = [], []
        for own, logits, rows, levels, shape, target in zip(
            decoded, objectness, best, level_of, image_sizes, targets, strict=True
        ):
            boxes, scores = clip_boxes_to_image(own[rows], shape), logits[rows].sigmoid()
            usable = remove_small_boxes(boxes, self.min_size)
            usable = usable[scores[usable] >= self.score_thresh]
            boxes, scores, levels = boxes[usable], scores[usable], levels[usable]
            labels = target["labels"].to(boxes.device)
            truth = target["boxes"].to(boxes)
            if self.scheme == "discrete":
                kept = discrete_resampling(boxes, scores, levels, truth, self.groups[labels], self.thresholds)
            else:
                kept = linear_resampling(boxes, scores, levels, truth, labels, self.class_thresholds)
            kept = kept[: self.post_nms_top_n()]
            boxes_per_image.append(boxes[kept])
            scores_per_image.append(scores[kept])
        return boxes_per_image, scores_per_image
