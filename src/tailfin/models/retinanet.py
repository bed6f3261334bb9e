"""RetinaNet (Lin et al., ICCV'17): nine anchors per cell of P3 to P7, matched by IoU, any loss on their classes.

    anchor with IoU >= 0.5 learns its object, < 0.4 background, between neither; every object has at least one anchor
    loss = classification over all anchors + L1 of the positives' deltas, both divided by the number of positives

Defaults are mmdetection's: further levels from C5, an object's best anchors are taken whatever they were. With
`detector: {fpn_convs: pyramid, anchor_style: torchvision, low_quality: keep_owner, normalizer: picture}` and the focal
loss it is torchvision's `retinanet_resnet50_fpn`, and loads its weights (`tailfin.models.convert_torchvision`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tailfin.losses.base import ClassificationLoss
from tailfin.models.assigners import max_iou_batch
from tailfin.models.backbones import Backbone
from tailfin.models.dense import DenseDetector, Outputs
from tailfin.models.dense_anchors import LevelAnchors, cell_anchors, whole_pixel_anchors
from tailfin.models.dense_head import DenseHead, starting_bias
from tailfin.models.detector import Limits, Targets
from tailfin.schema.detectors import RetinaNetConfig


class RetinaNet(DenseDetector):
    """A one-stage detector; see `Detector` for how it is called."""

    def __init__(self, *parts: Any, config: RetinaNetConfig, **options: Any) -> None:
        """`parts` and `options` are those of `DenseDetector`."""
        super().__init__(*parts, **options)
        self.config = config

    def assign(self, anchors: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        config, low = self.config, self.config.low_quality
        return max_iou_batch(
            torch.cat(list(anchors)),
            boxes,
            valid,
            config.pos_iou,
            config.neg_iou,
            low_quality=low != "none",
            keep_owner=low == "keep_owner",
        )

    def losses(self, outputs: Outputs, targets: Targets, assigned: Tensor | None = None) -> dict[str, Tensor]:
        config = self.config
        matched = self.match(outputs, targets, assigned)
        divisor, _ = self.divide_by(matched)
        box = self.box_losses(matched, config.box_loss, config.smooth_l1_beta) / divisor[matched.picture]
        return {
            "loss_classifier": self.classification(outputs, matched, divisor, targets),
            "loss_box_reg": config.box_loss_weight * box.sum(),
        }


def build_retinanet(
    backbone: Backbone,
    loss: ClassificationLoss,
    config: RetinaNetConfig,
    limits: Limits,
    *,
    channels_last: bool = False,
) -> RetinaNet:
    """Assemble the detector; the classifier's width comes from `loss`."""
    strides = backbone.level_strides
    make = whole_pixel_anchors if config.anchor_style == "torchvision" else cell_anchors
    cells = [make(config.anchor_scale * stride, config.octaves, config.anchor_ratios) for stride in strides]
    anchors = LevelAnchors(cells, None if config.anchor_style == "torchvision" else strides)
    head = DenseHead(
        backbone.out_channels,
        anchors.per_cell,
        loss.num_logits,
        starting_bias(loss, config.prior),
        convs=config.head_convs,
        norm=config.head_norm,
    )
    return RetinaNet(
        backbone,
        head,
        loss,
        anchors,
        config=config,
        limits=limits,
        normalizer=config.normalizer,
        pre_nms=config.pre_nms,
        channels_last=channels_last,
    )
