"""The detector's own losses (2DRCL's L_det in eq. 8), on a picture of their own that loses no object, or on view 1.

class-aware      every loss of the detector, with the objects of the picture; on view 1 what lies on an object that the
                 crop cut off (`ignored`) is neither background nor object
class-agnostic   RPN losses and the box regression of one class, with the proposals as objects (AlignDet)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchvision.ops import box_area, box_iou

from tailfin.models.assigners import pad_targets
from tailfin.models.dense import DenseDetector
from tailfin.models.detector import Targets
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.pretraining.term import Iteration, Term, View

HALF = 0.5  # of a box, from which it is ignored
OBJECT = 0.3  # IoU with an object, from which it may be one: the least of the matchers' thresholds
BACKGROUND, IGNORED = -1, -2  # of an assigner


class ClassAwareDetection(Term):
    """The detector's losses under their own names, times `weight`."""

    reaches = ("backbone", "fpn", "rpn", "head", "classifier", "box", "mask")

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        detector: Any = seen.detector  # its outputs are its own
        number = seen.detected
        outputs = detector.from_features(seen.features(number).pyramid, seen.view(number).batch, seen.targets)
        more: list[Any] = []
        if number == 0 and any(len(target.get("ignored", ())) for target in seen.targets):
            outputs, *more = spared(detector, outputs, seen.targets)
        losses = detector.losses(outputs, seen.targets, *more)
        return {name: self.weight * value for name, value in losses.items()}


class ClassAgnosticDetection(Term):
    """RPN and box losses, times `weight`; leaves its foreground rows and the box of each to later terms.

    Args:
        weight: of the losses.
        channels: of the box head's shared vectors.
    """

    reaches = ("backbone", "fpn", "rpn", "head")

    def __init__(self, weight: float, channels: int) -> None:
        super().__init__()
        self.weight = weight
        self.box_layer = nn.Linear(channels, 4)
        nn.init.normal_(self.box_layer.weight, std=0.001)
        nn.init.zeros_(self.box_layer.bias)

    def forward(self, seen: Iteration) -> dict[str, Tensor]:
        detector = cast(FasterRCNN, seen.detector)  # the schema lets no other through
        view, levels = seen.view(0), seen.features(0).pyramid
        objects, heads = as_objects(view), detector.roi_heads
        raw, proposals = detector.rpn(view.batch, levels, objects)
        losses = detector.rpn_losses(raw, objects)
        rows = heads.sample(proposals, objects)
        shared = heads.head(heads.pool(levels, rows.boxes, view.batch.image_sizes, rows.places))
        box = heads.box_regression_loss(self.box_layer(shared).float(), rows.boxes, rows.labels, rows.matched)
        foreground = torch.where(rows.gt_index >= 0)[0]
        seen.assigned = shared[foreground], rows.gt_index[foreground]
        return {name: self.weight * value for name, value in {"loss_box_reg": box, **losses}.items()}


def spared(detector: Any, outputs: Any, targets: Targets) -> tuple[Any, ...]:
    """Arguments of `detector.losses` without what lies on the `ignored` boxes of targets: background anchors,
    and proposals of a two-stage detector."""
    if isinstance(detector, DenseDetector):
        boxes, _, valid = pad_targets(targets, outputs.deltas[0].device)
        assigned = detector.assign(outputs.anchors, boxes.to(outputs.anchors[0].dtype), valid)
        on = torch.stack([on_ignored(torch.cat(outputs.anchors), target) for target in targets])
        return outputs, torch.where((assigned == BACKGROUND) & on, IGNORED, assigned)
    anchors, proposals = outputs.rpn.anchors, outputs.proposals
    rpn = outputs.rpn._replace(left_out=torch.stack([on_ignored(anchors, target) for target in targets]))
    on = torch.stack([on_ignored(own, target) for own, target in zip(proposals.boxes, targets, strict=True)])
    return (outputs._replace(rpn=rpn, proposals=proposals._replace(valid=proposals.valid & ~on)),)


def on_ignored(boxes: Tensor, target: Mapping[str, Tensor]) -> Tensor:
    """bool [N]: half of the box [N, 4] or more lies on one of `ignored`, and no object overlaps it by `OBJECT`."""
    regions = target["ignored"].to(boxes)
    if not len(regions):
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    corner, end = torch.maximum(boxes[:, None, :2], regions[:, :2]), torch.minimum(boxes[:, None, 2:], regions[:, 2:])
    share = (end - corner).clamp(min=0).prod(2) / box_area(boxes)[:, None].clamp(min=1e-6)
    on = share.amax(1) >= HALF
    if len(target["boxes"]):
        on &= box_iou(boxes, target["boxes"].to(boxes)).amax(1) < OBJECT
    return on


def as_objects(view: View) -> list[dict[str, Tensor]]:
    """Proposals as the objects of one class."""
    return [
        {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)}
        for boxes in view.boxes
    ]
