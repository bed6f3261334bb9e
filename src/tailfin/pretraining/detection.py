"""The detector's own losses (2DRCL's L_det in eq. 8), on a picture of their own that loses no object, or on view 1.

class-aware      every loss of the detector, with the objects of the picture
class-agnostic   RPN losses and the box regression of one class, with the proposals as objects (AlignDet)
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.pretraining.term import Iteration, Term, View


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
        losses = detector.losses(outputs, seen.targets)
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
        raw, proposals, _ = detector.rpn(view.batch, levels, objects)
        losses = detector.rpn_losses(raw, objects)
        rows = heads.sample(proposals, objects)
        shared = heads.head(heads.pool(levels, rows.boxes, view.batch.image_sizes))
        box = heads.box_regression_loss(self.box_layer(shared).float(), rows.boxes, rows.labels, rows.matched)
        foreground = torch.where(rows.gt_index >= 0)[0]
        seen.assigned = shared[foreground], rows.gt_index[foreground]
        return {name: self.weight * value for name, value in {"loss_box_reg": box, **losses}.items()}


def as_objects(view: View) -> list[dict[str, Tensor]]:
    """Proposals as the objects of one class."""
    return [
        {"boxes": boxes, "labels": torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)}
        for boxes in view.boxes
    ]
