"""ATSS (Zhang et al., CVPR'20): one square anchor per cell of P3 to P7, and as many positives as an object's IoUs say.

    loss = classification over all anchors / positives
         + 2 * sum(q (1 - GIoU)) / sum(q) + sum(BCE(quality, q)) / positives             over the positives

q is the centerness of the anchor in its object; with `detector.quality: iou` the IoU of the predicted box, as in the
detector of the equalized focal loss (`anchor_scales: [6, 8]`, `topk: 18`, `delta_stds: [1, 1, 1, 1]`, `rank: product`,
`normalizer: positives`, `box_loss_weight: 1`). A detection's score is class score x quality, no root is taken; the
score threshold is on the class score, and so is the choice of the candidates (mmdetection) unless `rank: product`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from tailfin.losses.base import ClassificationLoss
from tailfin.models.assigners import atss_batch, centerness, paired_iou
from tailfin.models.backbones import Backbone
from tailfin.models.dense import DenseDetector, Outputs, flat
from tailfin.models.dense_anchors import LevelAnchors, square_anchors
from tailfin.models.dense_head import DenseHead, starting_bias
from tailfin.models.detector import Limits, Targets
from tailfin.schema.detectors import ATSSConfig


class ATSS(DenseDetector):
    """A one-stage detector; see `Detector` for how it is called."""

    def __init__(self, *parts: Any, config: ATSSConfig, **options: Any) -> None:
        """`parts` and `options` are those of `DenseDetector`."""
        super().__init__(*parts, **options)
        self.config = config

    def assign(self, anchors: Sequence[Tensor], boxes: Tensor, valid: Tensor) -> Tensor:
        return atss_batch(anchors, boxes, valid, self.config.topk)

    def losses(self, outputs: Outputs, targets: Targets, assigned: Tensor | None = None) -> dict[str, Tensor]:
        config = self.config
        matched = self.match(outputs, targets, assigned)
        if config.quality == "iou":
            wanted = paired_iou(self.decoded(matched).detach(), matched.boxes)
        else:
            wanted = centerness(matched.anchors, matched.boxes)
        divisor, weight = self.divide_by(matched, wanted)
        box = (wanted * self.box_losses(matched, "giou")).sum() / weight
        found = flat(outputs.quality, 1)[matched.picture, matched.place, 0]
        quality = F.binary_cross_entropy_with_logits(found, wanted, reduction="sum") / divisor[0]
        return {
            "loss_classifier": self.classification(outputs, matched, divisor, targets),
            "loss_box_reg": config.box_loss_weight * box,
            f"loss_{config.quality}": config.quality_weight * quality,
        }


def build_atss(
    backbone: Backbone, loss: ClassificationLoss, config: ATSSConfig, limits: Limits, *, channels_last: bool = False
) -> ATSS:
    """Assemble the detector; the classifier's width comes from `loss`."""
    strides = backbone.level_strides
    cells = [square_anchors([scale * stride for scale in config.anchor_scales]) for stride in strides]
    head = DenseHead(
        backbone.out_channels,
        len(config.anchor_scales),
        loss.num_logits,
        starting_bias(loss, config.prior),
        convs=config.head_convs,
        norm=config.head_norm,
        quality=True,
        scaled=len(strides),
    )
    return ATSS(
        backbone,
        head,
        loss,
        LevelAnchors(cells, strides),
        config=config,
        limits=limits,
        stds=config.delta_stds,
        normalizer=config.normalizer,
        pre_nms=config.pre_nms,
        rank=config.rank,
        channels_last=channels_last,
    )
