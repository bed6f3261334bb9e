"""Faster R-CNN with FPN: torchvision's bricks and tailfin's box head.

    images -> batch -> backbone -> RPN -> RoI heads -> losses (training) or detections (evaluation)

Under autocast only the convolutions and linear layers run in half precision; anchors, deltas, boxes, logits and losses
stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from tailfin.losses.base import ClassificationLoss
from tailfin.models.heads import box_heads
from tailfin.models.heads.roi_heads import RoIHeads, Targets
from tailfin.models.images import batch_images
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.samplers.nms_resampling import THRESHOLDS, ResamplingRPN
from tailfin.schema.detectors import FasterRCNN as FasterRCNNConfig
from tailfin.schema.recipe import Evaluation
from tailfin.stats import ClassStats


class FasterRCNN(nn.Module):
    """A two-stage detector as a function of pictures.

    Training: `model(images, targets)` returns named losses; targets are dicts of boxes float32 [M, 4] (xyxy, pixels of
    the picture given) and labels int64 [M]. Evaluation: `model(images)` returns one dict of boxes, scores and labels
    per picture. Pictures are [3, H, W], uint8 or float in 0..1, already resized.
    """

    kinds: tuple[str, ...] = ("bbox",)

    def __init__(
        self,
        backbone: BackboneWithFPN,
        rpn: RegionProposalNetwork,
        roi_heads: RoIHeads,
        *,
        rpn_loss_weight: float = 1.0,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.rpn_loss_weight = rpn_loss_weight
        self.channels_last = channels_last

    def forward(
        self, images: Sequence[Tensor], targets: Targets | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        batch = batch_images(images, channels_last=self.channels_last)
        return self.from_features(batch, self.backbone(batch.tensors), targets)

    def from_features(
        self, batch: ImageList, features: dict[str, Tensor], targets: Targets | None = None
    ) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        """`forward` from the pyramid's features of a batch on, for what has them already."""
        proposals, rpn_losses = self.rpn(batch, features, targets if self.training else None)
        detections, losses = self.roi_heads(features, proposals, batch.image_sizes, targets)
        if not self.training:
            return detections
        for name, value in rpn_losses.items():
            losses[name.replace("loss_objectness", "loss_rpn_objectness")] = self.rpn_loss_weight * value
        return losses

    @property
    def limits(self) -> nn.Module:
        """Where `score_threshold` and `max_dets` are."""
        return self.roi_heads

    def parts(self) -> dict[str, nn.Module]:
        """Parts that a stage may train, by the names of a recipe's `second.trains`."""
        return {
            **self.roi_heads.parts(),
            "rpn": self.rpn,
            "fpn": self.backbone.fpn,
            "backbone": self.backbone.body,
        }

    def freeze_all_but(self, trained: Sequence[str]) -> None:
        """Freeze every part not named: no gradients are computed or kept for it, and its norms stay as they are."""
        for name, part in self.parts().items():
            if name not in trained:
                part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> FasterRCNN:
        """Training or evaluation mode; a batch norm whose weights are frozen keeps its statistics in both."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self


class _Float32Anchors(AnchorGenerator):
    """Anchors in float32 whatever the features' type: half precision moves large anchors by pixels."""

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        super().set_cell_anchors(torch.float32, device)


class _Float32RPNHead(RPNHead):
    """Objectness and deltas leave the head in float32, so that boxes are decoded in it."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [value.float() for value in objectness], [value.float() for value in deltas]


def build_faster_rcnn(
    backbone: BackboneWithFPN,
    loss: ClassificationLoss,
    config: FasterRCNNConfig,
    evaluation: Evaluation,
    stats: ClassStats,
    *,
    channels_last: bool = False,
) -> FasterRCNN:
    """Assemble the detector; the classifier's width and bias come from `loss`."""
    channels = backbone.out_channels
    anchors = _Float32Anchors(
        sizes=tuple((size,) for size in config.anchor_sizes),
        aspect_ratios=(tuple(config.anchor_ratios),) * len(config.anchor_sizes),
    )
    rpn_kind: Callable[..., RegionProposalNetwork] = RegionProposalNetwork
    if config.rpn_nms_resampling != "none":
        thresholds = (*THRESHOLDS[:2], config.rpn_nms)
        rpn_kind = partial(ResamplingRPN, stats, scheme=config.rpn_nms_resampling, thresholds=thresholds)
    rpn = rpn_kind(
        anchors,
        _Float32RPNHead(channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=config.rpn_fg_iou,
        bg_iou_thresh=config.rpn_bg_iou,
        batch_size_per_image=config.rpn_batch,
        positive_fraction=config.rpn_fg_fraction,
        pre_nms_top_n=dict(zip(("training", "testing"), config.rpn_pre_nms, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), config.rpn_post_nms, strict=True)),
        nms_thresh=config.rpn_nms,
    )
    levels = [str(level) for level in range(len(config.fpn_layers))]
    strides = [2 ** (layer + 1) for layer in config.fpn_layers]
    roi_heads = box_heads(
        config,
        loss,
        stats,
        PyramidRoIAlign(levels, strides, config.roi_size, config.roi_sampling),
        channels,
        fg_iou=config.roi_fg_iou,
        batch=config.roi_batch,
        fg_fraction=config.roi_fg_fraction,
        box_loss=config.box_loss,
        box_loss_weight=config.box_loss_weight,
        score_threshold=evaluation.score_threshold,
        nms=evaluation.nms,
        max_dets=evaluation.max_dets,
    )
    return FasterRCNN(backbone, rpn, roi_heads, rpn_loss_weight=config.rpn_loss_weight, channels_last=channels_last)
