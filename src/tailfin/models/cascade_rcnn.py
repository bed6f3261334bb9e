"""Cascade R-CNN (Cai and Vasconcelos, CVPR'18), with masks where they are wanted (Cascade Mask R-CNN).

    proposals -> stage 1 (IoU 0.5) -> refined boxes -> stage 2 (0.6) -> refined boxes -> stage 3 (0.7)

A stage is a box head with a classification loss, statistics and a feature module of its own. In training each stage
draws rows anew among the boxes of the one before and the objects, and its losses, masks' included, count 1, 0.5, 0.25.
In evaluation boxes pass all three; the logits are averaged before the loss makes scores of them (mmdetection), and the
last stage's deltas give the boxes. `CascadeHeads.next_proposals` and the box heads' `sample`, `losses_of` and `detect`
are the steps one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.softmax import Softmax
from tailfin.models.backbones import Backbone
from tailfin.models.cascade import refine_boxes
from tailfin.models.detector import Detections, Limits, Targets
from tailfin.models.faster_rcnn import FasterRCNN, Outputs, build_box_head, build_rpn, options_of
from tailfin.models.features.base import FeatureModule, Rows
from tailfin.models.heads.mask import MaskBranch
from tailfin.models.heads.roi_heads import RoIHeads
from tailfin.models.images import pictures_of, size_limits
from tailfin.models.mask_rcnn import build_mask_branch, with_masks
from tailfin.models.row_sampling import Proposals, padded
from tailfin.models.rpn import RPN
from tailfin.schema.detectors import CascadeRCNNConfig
from tailfin.stats import ClassStats

TINY = 1e-30  # below every probability that matters


class CascadeHeads(nn.Module):
    """The box heads of the stages, in order; `weights` are those of the stages' losses."""

    def __init__(self, stages: Iterable[RoIHeads], weights: Sequence[float]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.weights = tuple(weights)
        if len(self.weights) != len(self.stages):
            raise ValueError(f"{len(self.stages)} stages need as many weights (given: {len(self.weights)})")

    def heads(self) -> list[RoIHeads]:
        """The stages' box heads."""
        return [stage for stage in self.stages if isinstance(stage, RoIHeads)]

    def parts(self) -> dict[str, nn.Module]:
        """Each part of all stages together."""
        every = [stage.parts() for stage in self.heads()]
        return {name: nn.ModuleList([parts[name] for parts in every]) for name in every[0]}

    @torch.no_grad()
    def next_proposals(
        self,
        stage: int,
        boxes: list[Tensor],
        logits: Tensor,
        deltas: Tensor,
        image_sizes: list[tuple[int, int]],
        rows: Rows | None = None,
    ) -> list[Tensor] | Proposals:
        """Boxes that the stage after number `stage` looks at, its input moved by the stage's own deltas: per image
        [n, 4], and padded to one size where `rows` are given.

        A box head with deltas for every class moves a training row by those of its object's class, any other box by
        those of the best foreground class. `rows` are the sampled rows of training; those that are an object's own box
        are left out, since the objects join anew.
        """
        heads = self.heads()[stage]
        counts = [len(own) for own in boxes]
        agnostic = deltas.shape[1] == 4
        labels = None
        if not agnostic:
            labels = heads.loss.scores(logits).argmax(dim=1)
            if rows is not None:
                labels = torch.where(rows.labels < heads.loss.num_classes, rows.labels, labels)
        every = torch.cat(boxes)
        picture = pictures_of(counts, every.device) if rows is None else rows.places.picture
        refined = refine_boxes(every, deltas, labels, None, heads.box_stds, agnostic)
        limits = size_limits(image_sizes, every.device).to(refined)[picture]
        refined = torch.minimum(refined.clamp(min=0), limits)
        if rows is None:
            return list(refined.split(counts))
        joined = padded(list(refined.split(counts)))
        added = padded(list(rows.added[:, None].expand(-1, 4).split(counts))).boxes[..., 0]
        return joined._replace(valid=joined.valid & ~added)

    def detect(self, scores: Tensor, deltas: Tensor, *rest: Any) -> Detections:
        """Detections of the last stage, see `RoIHeads.detect`."""
        return self.heads()[-1].detect(scores, deltas, *rest)


class CascadeRCNN(FasterRCNN):
    """Faster R-CNN with a cascade of box heads; `masks` has a mask branch per stage, or none at all.

    Losses are numbered by stage: loss_classifier_1, loss_box_reg_1, (loss_mask_1,) ...
    """

    roi_heads: CascadeHeads  # type: ignore[assignment]

    def __init__(
        self,
        backbone: Backbone,
        rpn: RPN,
        roi_heads: CascadeHeads,
        masks: Sequence[MaskBranch] = (),
        *,
        own_masks: bool = False,
        mean: str = "logits",
        **options: Any,
    ) -> None:
        """`own_masks`: every class has a mask filter of its own; `mean`: of which the stages' is taken, "logits" or
        "scores", the probabilities of a softmax (detectron2); `options` are those of `FasterRCNN`."""
        super().__init__(backbone, rpn, roi_heads, **options)  # type: ignore[arg-type]
        self.masks = nn.ModuleList(masks)
        self.own_masks = own_masks
        self.mean_of = mean
        if masks:
            self.kinds = ("bbox", "segm")

    def branches(self) -> list[MaskBranch]:
        """The stages' mask branches; empty without masks."""
        return [branch for branch in self.masks if isinstance(branch, MaskBranch)]

    # ---- the three steps -------------------------------------------------------------------------------------------

    def second_stage(
        self, features: dict[str, Tensor], proposals: list[Tensor], image_sizes: list[tuple[int, int]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """The last stage's boxes, the mean logits of all stages (of probabilities: the mean's logarithms, which a
        softmax turns into that mean), the last one's deltas."""
        heads, every = self.roi_heads.heads(), []
        for stage, own in enumerate(heads):
            logits, deltas = own.predict(features, proposals, image_sizes)
            every.append(logits if self.mean_of == "logits" else logits.softmax(dim=1))
            if stage + 1 < len(heads):
                moved = self.roi_heads.next_proposals(stage, proposals, logits, deltas, image_sizes)
                assert isinstance(moved, list)
                proposals = moved
        mean = torch.stack(every).mean(dim=0)
        return proposals, mean if self.mean_of == "logits" else mean.clamp(min=TINY).log(), deltas

    def losses(self, outputs: Outputs, targets: Targets) -> dict[str, Tensor]:
        rpn = self.rpn_losses(outputs.rpn, targets)
        features, sizes, proposals = outputs.features, outputs.image_sizes, outputs.proposals
        heads, branches = self.roi_heads.heads(), self.branches()
        losses: dict[str, Tensor] = {}
        for stage, (own, weight) in enumerate(zip(heads, self.roi_heads.weights, strict=True)):
            rows = own.sample(proposals, targets)
            trained = own.train_rows(features, rows, sizes, targets)
            found = dict(trained.losses)
            if branches:
                found |= branches[stage].losses(features, rows, sizes, targets, own.loss.num_classes)
            losses |= {f"{name}_{stage + 1}": weight * value for name, value in found.items()}
            if stage + 1 < len(heads):
                proposals = self.roi_heads.next_proposals(
                    stage, rows.boxes, trained.logits, trained.deltas, sizes, rows
                )
        return {**losses, **rpn}

    def detections(self, outputs: Outputs, limits: Limits) -> Detections:
        found, branches = super().detections(outputs, limits), self.branches()
        return with_masks(found, branches, outputs) if branches else found

    def boxes_only(self, outputs: Outputs, limits: Limits) -> Detections:
        return super().detections(outputs, limits)

    # ---- parts -----------------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), **({"mask": self.masks} if len(self.masks) else {})}

    def class_specific(self) -> tuple[str, ...]:
        return (*super().class_specific(), *(["mask"] if self.own_masks else []))

    @property
    def loss(self) -> ClassificationLoss:
        """The last stage's; those of the others make scores by the same rule."""
        return self.roi_heads.heads()[-1].loss

    @property
    def features(self) -> FeatureModule | None:
        """The last stage's; the others have one of the same kind."""
        return self.roi_heads.heads()[-1].extra_rows

    def method_state(self) -> list[nn.Module]:
        heads = self.roi_heads.heads()
        return [module for own in heads for module in (own.loss, own.extra_rows) if module is not None]

    def untaught(self) -> str:
        return "distillation needs one box head with one classifier, and a cascade has one per stage"


def build_cascade_rcnn(
    backbone: Backbone,
    loss: ClassificationLoss,
    config: CascadeRCNNConfig,
    limits: Limits,
    stats: ClassStats,
    *,
    channels_last: bool = False,
) -> CascadeRCNN:
    """Assemble the detector; each stage has a copy of `loss`, of which it makes its own statistics."""
    if config.stage_mean == "scores" and not isinstance(loss, Softmax):
        raise UserError(
            f"detector.stage_mean scores takes the mean of softmax probabilities, and the loss {type(loss).__name__} "
            "has other scores: set detector.stage_mean=logits"
        )
    rpn = build_rpn(config, stats, backbone)
    stages = [
        build_box_head(backbone, copy.deepcopy(loss), config, limits, stats, fg_iou=iou, box_stds=stds)
        for iou, stds in zip(config.stage_ious, config.stage_stds, strict=True)
    ]
    masks = [build_mask_branch(backbone, config, loss.num_classes) for _ in stages] if config.masks else []
    return CascadeRCNN(
        backbone,
        rpn,
        CascadeHeads(stages, config.stage_weights),
        masks,
        own_masks=config.masks and config.masks_by_class == "class_specific",
        mean=config.stage_mean,
        **options_of(config, limits, channels_last),
    )
