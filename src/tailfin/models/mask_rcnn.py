"""Mask R-CNN (He et al., ICCV'17): Faster R-CNN, and a mask for each of its detections.

The mask branch learns on the sampled foreground rows of the box head and outlines the detections that the box head
reports; everything about classes is Faster R-CNN's, so that every classifier, loss and feature module is at home here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.losses.base import ClassificationLoss
from tailfin.models.backbones import Backbone
from tailfin.models.detector import Detections, Limits, Targets
from tailfin.models.faster_rcnn import (
    FasterRCNN,
    Outputs,
    build_box_head,
    build_rpn,
    options_of,
    pyramid_pool,
)
from tailfin.models.features.base import Rows
from tailfin.models.heads.mask import MaskBranch, MaskHead, MaskPredictor
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.models.rpn import RPN
from tailfin.schema.detectors import MaskRCNNConfig
from tailfin.stats import ClassStats


class MaskRCNN(FasterRCNN):
    """Faster R-CNN whose detections have `masks`, probabilities [D, 28, 28] of the detected class within the box.

    Training targets have `masks` [M, H, W] (bool or 0 and 1, in pixels of the picture given) and, where some are
    unknown, `mask_valid` bool [M]: false excuses an object from the mask loss.
    """

    kinds = ("bbox", "segm")

    def __init__(
        self, backbone: Backbone, rpn: RPN, roi_heads: RoIHeads, mask: MaskBranch, *, own_masks: bool, **options: Any
    ) -> None:
        """`own_masks`: every class has a filter of its own; `options` are those of `FasterRCNN`."""
        super().__init__(backbone, rpn, roi_heads, **options)
        self.mask = mask
        self.own_masks = own_masks

    def row_losses(
        self,
        features: dict[str, Tensor],
        rows: Rows,
        image_sizes: list[tuple[int, int]],
        targets: Targets,
        shared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        box = super().row_losses(features, rows, image_sizes, targets, shared)
        return {**box, **self.mask.losses(features, rows, image_sizes, targets, self.loss.num_classes)}

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        return with_masks(super().detections(outputs, limits), [self.mask], outputs)

    def boxes_only(self, outputs: Outputs, limits: Limits) -> Detections:
        return super().detections(outputs, limits)

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "mask": self.mask}

    def class_specific(self) -> tuple[str, ...]:
        return (*super().class_specific(), *(["mask"] if self.own_masks else []))


def with_masks(found: Detections, branches: Sequence[MaskBranch], outputs: Outputs) -> Detections:
    """Detections with `masks`: the mean of the branches' probabilities."""
    boxes = [own["boxes"] for own in found]
    labels = torch.cat([own["labels"] for own in found])
    masks: Tensor | float = 0.0
    for branch in branches:
        masks = masks + branch.probabilities(outputs.features, boxes, labels, outputs.image_sizes) / len(branches)
    assert isinstance(masks, Tensor)
    split = masks.split([len(own) for own in boxes])
    return [{**own, "masks": mask} for own, mask in zip(found, split, strict=True)]


def build_mask_branch(backbone: Backbone, config: MaskRCNNConfig, num_classes: int) -> MaskBranch:
    """The branch of a recipe on a pyramid."""
    pool = pyramid_pool(backbone, config, config.mask_roi_size)
    head = MaskHead(backbone.out_channels, config.mask_channels, config.mask_layers)
    filters = num_classes if config.masks_by_class == "class_specific" else 1
    temperature = config.mask_temperature if config.mask_predictor == "normed" else None
    predictor = MaskPredictor(config.mask_channels, filters, temperature)
    return MaskBranch(pool, head, predictor, style=config.mask_targets, weight=config.mask_loss_weight)


def build_mask_rcnn(
    backbone: Backbone,
    loss: ClassificationLoss,
    config: MaskRCNNConfig,
    limits: Limits,
    stats: ClassStats,
    *,
    channels_last: bool = False,
) -> MaskRCNN:
    """Assemble the detector; the classifier's width and bias come from `loss`."""
    rpn = build_rpn(config, stats, backbone)
    roi_heads = build_box_head(backbone, loss, config, limits, stats)
    mask = build_mask_branch(backbone, config, loss.num_classes)
    own = config.masks_by_class == "class_specific"
    return MaskRCNN(backbone, rpn, roi_heads, mask, own_masks=own, **options_of(config, limits, channels_last))
