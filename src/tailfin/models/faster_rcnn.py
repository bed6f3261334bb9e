"""Faster R-CNN with FPN: torchvision's bricks and tailfin's box head.

    images -> batch -> backbone -> RPN -> proposals                     outputs
        -> sampled rows -> box head -> losses                           losses (training)
        -> box head -> scores, NMS -> detections                        detections (evaluation)

Under autocast only the convolutions and linear layers run in half precision; anchors, deltas, boxes, logits and losses
stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou, nms

from tailfin.losses.base import ClassificationLoss
from tailfin.models.backbones import Backbone
from tailfin.models.detector import Compared, Detections, Detector, Limits, Targets, reported, valid_cells
from tailfin.models.features.base import FeatureModule, Rows
from tailfin.models.heads import box_heads
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.models.images import size_limits
from tailfin.models.precision import in_float32
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.models.row_sampling import Proposals
from tailfin.models.rpn import RPN, Float32Anchors, Float32RPNHead, ResamplingRPN, RPNOutputs
from tailfin.samplers.nms_resampling import THRESHOLDS
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.stats import ClassStats

LOGIT_SPREAD, DELTA_SPREAD = 3.0, 0.2  # standard deviations of a trained box head's outputs, roughly


class Outputs(NamedTuple):
    """What Faster R-CNN makes of a batch; N proposals, images one after another."""

    image_sizes: list[tuple[int, int]]  # (height, width) without padding
    features: dict[str, Tensor]  # the pyramid's levels [B, channels, h, w]
    rpn: RPNOutputs
    proposals: Proposals | list[Tensor]  # of the first stage; in evaluation the last boxes, per image [n, 4]
    logits: Tensor | None = None  # [N, num_logits], in evaluation: training samples among the proposals first
    deltas: Tensor | None = None  # [N, 4] or [N, 4 C]


class FasterRCNN(Detector):
    """A two-stage detector; see `Detector` for how it is called."""

    backbone: Backbone
    rpn: RPN
    roi_heads: RoIHeads

    def __init__(
        self,
        backbone: Backbone,
        rpn: RPN,
        roi_heads: RoIHeads,
        *,
        limits: Limits = Limits(1e-4, 300, 0.5),
        rpn_loss_weight: float = 1.0,
        own_boxes: bool = True,
        channels_last: bool = False,
    ) -> None:
        """`own_boxes`: every class has a box layer of its own."""
        body = backbone.body
        super().__init__(backbone, limits, channels_last=channels_last, mean=body.mean, std=body.std)
        self.rpn = rpn
        self.roi_heads = roi_heads
        self.rpn_loss_weight, self.own_boxes = rpn_loss_weight, own_boxes

    # ---- the three steps -------------------------------------------------------------------------------------------

    def outputs(self, images: Sequence[Tensor], targets: Targets | None = None) -> Outputs:
        batch = self.batch(images)
        return self.from_features(self.backbone(batch.tensors), batch, targets)

    def from_features(self, features: dict[str, Tensor], batch: ImageList, targets: Targets | None = None) -> Outputs:
        """`outputs` from the pyramid's features of a batch on, for what has them already."""
        raw, proposals = self.rpn(batch, features, targets)
        if self.training:
            return Outputs(batch.image_sizes, features, raw, proposals)
        boxes, _ = proposals.split()
        return Outputs(batch.image_sizes, features, raw, *self.second_stage(features, boxes, batch.image_sizes))

    def second_stage(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Boxes per image, logits of each and the deltas that move it to where its object is."""
        return proposals, *self.roi_heads.predict(features, proposals, image_sizes)

    def losses(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        rpn = self.rpn_losses(outputs.rpn, targets)
        rows = self.roi_heads.sample(outputs.proposals, targets)
        return {**self.row_losses(outputs.features, rows, outputs.image_sizes, targets), **rpn}

    def row_losses(
        self,
        features: dict[str, Tensor],
        rows: Rows,
        image_sizes: list[tuple[int, int]],
        targets: Targets,
        shared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Losses of sampled rows; `shared` [N, D] are their features, where the caller has them already."""
        return self.roi_heads.losses(features, rows, image_sizes, targets, shared)

    def rpn_losses(self, raw: RPNOutputs, targets: Targets) -> dict[str, Tensor]:
        """The first stage's losses with their weight."""
        return {name: self.rpn_loss_weight * value for name, value in self.rpn.losses(raw, targets).items()}

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        if outputs.logits is None or outputs.deltas is None or not isinstance(outputs.proposals, list):
            raise ValueError("detections are made of outputs in evaluation mode")
        scores = reported(self, self.loss.scores(outputs.logits))
        return self.roi_heads.detect(scores, outputs.deltas, outputs.proposals, outputs.image_sizes, limits)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        return {
            **self.roi_heads.parts(),
            "rpn": self.rpn,
            "fpn": self.backbone.fpn,
            "backbone": self.backbone.body,
        }

    def class_specific(self) -> tuple[str, ...]:
        """The classifier, and the box layer where it has rows of its own for every class."""
        return ("classifier", "box") if self.own_boxes else ("classifier",)

    @property
    def loss(self) -> ClassificationLoss:
        return self.roi_heads.loss

    @property
    def features(self) -> FeatureModule | None:
        return self.roi_heads.extra_rows

    @property
    def num_proposals(self) -> int:  # type: ignore[override]
        return self.rpn._post_nms_top_n["testing"]

    # ---- what methods and tools ask --------------------------------------------------------------------------------

    @property
    def box_channels(self) -> int:
        """Width of a box's shared vector."""
        return self.roi_heads.predictor.cls_score.in_features

    def box_layers(self) -> tuple[PyramidRoIAlign, nn.Module | None]:
        """What pools boxes, and new layers on it: none, the box head's own make the vector."""
        return self.roi_heads.pool, None

    def annotation_scores(self, images: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor]:
        """Scores of the proposal that overlaps each annotation most."""
        batch = self.batch(images)
        features = self.backbone(batch.tensors)
        boxes, _ = self.rpn(batch, features)[1].split()
        chosen, place, start = [], [], 0
        for own, target in zip(boxes, targets, strict=True):
            count = len(target["boxes"]) if len(own) else 0
            best = box_iou(target["boxes"], own).argmax(1) if count else own.new_zeros(0, dtype=torch.int64)
            chosen.append(own[best])
            place.append(torch.arange(start, start + count, device=own.device))
            start += len(target["boxes"])
        _, logits, _ = self.second_stage(features, chosen, batch.image_sizes)
        return self.loss.scores(logits), torch.cat(place)

    def proposals(self, images: Sequence[Tensor], top: int, nms_iou: float) -> Detections:
        """Boxes and objectness of the RPN, after NMS over all levels; more of them than the recipe keeps, if asked."""
        batch = self.batch(images)
        raw = self.rpn.outputs(batch, self.backbone(batch.tensors))
        boxes, scores = self.rpn.propose_more(raw, batch.image_sizes, 2 * top, nms_iou).split()
        results = []
        for own, value in zip(boxes, scores, strict=True):
            keep = nms(own, value, nms_iou)[:top]
            results.append({"boxes": own[keep], "scores": value[keep]})
        return results

    def sampled_rows(self, images: Sequence[Tensor], targets: Targets) -> tuple[Tensor, Tensor, Tensor | None]:
        """Shared features [N, D], labels [N] and checked classes (`known` of a loss) of the rows that training would
        sample; nothing in the model changes, batch norms keep their statistics."""
        self.backbone.eval()
        batch = self.batch(images)
        features = self.backbone(batch.tensors)
        self.train(self.training)
        raw, proposals = self.rpn(batch, features, targets)
        self.rpn.losses(raw, targets)  # its draws come before those of the rows, as in a training step
        heads = self.roi_heads
        rows = heads.sample(proposals, targets)
        return heads.head(heads.pool(features, rows.boxes, batch.image_sizes, rows.places)), rows.labels, rows.known

    def pooler(self, images: Sequence[Tensor]) -> tuple[Callable[[list[Tensor]], Tensor], list[tuple[int, int]]]:
        """A function from boxes per image to pooled features [N, channels, size, size], and the images' sizes."""
        batch = self.batch(images)
        features = self.backbone(batch.tensors)
        return lambda boxes: self.roi_heads.pool(features, boxes, batch.image_sizes), batch.image_sizes

    def untaught(self) -> str:
        if self.roi_heads.takes_extra_rows:
            return ""
        return "distillation needs a box head of one pass and one classifier, not pcb or simcal"

    def compared(self, teacher: Detector, images: Sequence[Tensor], targets: Targets, *, shared: bool) -> Compared:
        """Eq. 3 on the student's sampled proposals with the teacher's features, eq. 2 on a pyramid that trains."""
        teacher = cast(FasterRCNN, teacher)
        batch = self.batch(images)
        features = self.backbone(batch.tensors)
        raw, proposals = self.rpn(batch, features, targets)
        rpn = self.rpn_losses(raw, targets)
        heads, sizes = self.roi_heads, batch.image_sizes
        rows = heads.sample(proposals, targets)
        own = heads.head(heads.pool(features, rows.boxes, sizes, rows.places))
        losses = {**self.row_losses(features, rows, sizes, targets, own), **rpn}
        pyramid = any(p.requires_grad for p in self.backbone.parameters())
        trunk = pyramid or any(p.requires_grad for p in heads.head.parameters())
        taught = features
        with torch.no_grad():
            if pyramid:
                taught = teacher.backbone(batch.tensors)
            # where nothing below the classifier trains, both have the same features
            theirs = own.detach()
            if trunk:
                theirs = teacher.roi_heads.head(teacher.roi_heads.pool(taught, rows.boxes, sizes, rows.places))
            wanted = in_float32(teacher.roi_heads.predictor.cls_score, theirs)
        logits = in_float32(heads.predictor.cls_score, theirs if shared else own)
        scale = size_limits(sizes, own.device)
        levels = list(features.values()) if pyramid else []
        valid = [valid_cells(level.shape[-2:], batch.tensors.shape[-2:], scale) for level in levels]
        maps = list(taught.values()) if pyramid else []
        return Compared(losses, levels, maps, valid, scale, logits[None], wanted[None])

    def rehearsed(self, images: Sequence[Tensor]) -> Outputs:
        """Outputs with the full number of proposals at random places, and with logits and deltas as spread as a trained
        head's; the same in every call."""
        batch = self.batch(images)
        features = self.backbone(batch.tensors)
        raw, found = self.rpn(batch, features)
        drawn = [random_boxes(self.num_proposals, size).to(found.boxes) for size in batch.image_sizes]
        boxes, logits, deltas = self.second_stage(features, drawn, batch.image_sizes)
        generator = torch.Generator().manual_seed(0)
        noise = LOGIT_SPREAD * torch.randn(logits.shape, generator=generator)
        logits = noise.to(logits) + self.loss.prior_bias().to(logits)
        deltas = (DELTA_SPREAD * torch.randn(deltas.shape, generator=generator)).to(deltas)
        return Outputs(batch.image_sizes, features, raw, boxes, logits, deltas)

    def candidates(self, outputs: Outputs, limits: Limits) -> int:
        assert outputs.logits is not None
        return int((self.loss.scores(outputs.logits) > limits.score_threshold).sum())


def random_boxes(number: int, size: tuple[int, int]) -> Tensor:
    """[number, 4] boxes of a twentieth to a half of the picture's sides (H, W), the same in every call."""
    generator = torch.Generator().manual_seed(0)
    limit = torch.tensor([size[1], size[0]], dtype=torch.float32)
    sides = limit * (0.05 + 0.45 * torch.rand((number, 2), generator=generator))
    corner = (limit - sides) * torch.rand((number, 2), generator=generator)
    return torch.cat([corner, corner + sides], dim=1)


def build_faster_rcnn(
    backbone: Backbone,
    loss: ClassificationLoss,
    config: FasterRCNNConfig,
    limits: Limits,
    stats: ClassStats,
    *,
    channels_last: bool = False,
) -> FasterRCNN:
    """Assemble the detector; the classifier's width and bias come from `loss`."""
    rpn = build_rpn(config, stats, backbone)
    roi_heads = build_box_head(backbone, loss, config, limits, stats)
    return FasterRCNN(backbone, rpn, roi_heads, **options_of(config, limits, channels_last))


def options_of(config: FasterRCNNConfig, limits: Limits, channels_last: bool) -> dict[str, Any]:
    """The keywords of `FasterRCNN`."""
    return {
        "limits": limits,
        "rpn_loss_weight": config.rpn_loss_weight,
        "own_boxes": config.box_regression == "class_specific",
        "channels_last": channels_last,
    }


def build_rpn(config: FasterRCNNConfig, stats: ClassStats, backbone: Backbone) -> RPN:
    """The region proposal network on the pyramid."""
    exact = config.anchor_style == "exact"
    anchors = Float32Anchors(
        sizes=tuple((size,) for size in config.anchor_sizes),
        aspect_ratios=(tuple(config.anchor_ratios),) * len(config.anchor_sizes),
        exact=exact,
        strides=backbone.level_strides if exact else None,
    )
    rpn_kind: Callable[..., RPN] = RPN
    if config.rpn_nms_resampling != "none":
        thresholds = (*THRESHOLDS[:2], config.rpn_nms)
        rpn_kind = partial(ResamplingRPN, stats, scheme=config.rpn_nms_resampling, thresholds=thresholds)
    return rpn_kind(
        anchors,
        Float32RPNHead(backbone.out_channels, anchors.num_anchors_per_location()[0]),
        fg_iou_thresh=config.rpn_fg_iou,
        bg_iou_thresh=config.rpn_bg_iou,
        batch_size_per_image=config.rpn_batch,
        positive_fraction=config.rpn_fg_fraction,
        pre_nms_top_n=dict(zip(("training", "testing"), config.rpn_pre_nms, strict=True)),
        post_nms_top_n=dict(zip(("training", "testing"), config.rpn_post_nms, strict=True)),
        nms_thresh=config.rpn_nms,
        box_loss=config.rpn_box_loss,
        min_pos_iou=config.rpn_min_pos_iou,
        low_quality=config.rpn_low_quality,
    )


def build_box_head(
    backbone: Backbone,
    loss: ClassificationLoss,
    config: FasterRCNNConfig,
    limits: Limits,
    stats: ClassStats,
    **options: Any,
) -> RoIHeads:
    """A box head on the pyramid; `options` of `RoIHeads` take the place of the recipe's."""
    own: dict[str, Any] = {
        "fg_iou": config.roi_fg_iou,
        "batch": config.roi_batch,
        "fg_fraction": config.roi_fg_fraction,
        "box_loss": config.box_loss,
        "box_loss_beta": config.box_loss_beta,
        "box_loss_weight": config.box_loss_weight,
        "limits": limits,
    }
    pool = pyramid_pool(backbone, config, config.roi_size)
    return box_heads(config, loss, stats, pool, backbone.out_channels, **{**own, **options})


def pyramid_pool(backbone: Backbone, config: FasterRCNNConfig, size: int) -> PyramidRoIAlign:
    """RoIAlign to `size` bins on the levels of the pyramid that come from the body."""
    strides = backbone.strides
    return PyramidRoIAlign(list(strides), list(strides.values()), size, config.roi_sampling, config.roi_aligned)
