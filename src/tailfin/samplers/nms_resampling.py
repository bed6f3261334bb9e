"""NMS resampling (Forest R-CNN, Wu et al., ACM MM'20): rarer objects keep more of their proposals in training.

The RPN's non-maximum suppression gets a higher IoU threshold around rarer ground truth, so that more of its near
duplicates survive and are sampled as foreground rows. Two schemes; a proposal belongs to the ground truth it overlaps
most, and to the background below an IoU of 0.3 with any:

    discrete   one suppression per frequency group (0.9 rare, 0.8 common, 0.7 frequent and background); from the rare
               one come the proposals on rare objects, from the common one those on common objects, the rest from the
               third
    linear     one suppression in which each box suppresses with the threshold of its own class

Testing uses the RPN's own threshold. `tailfin.models.rpn.ResamplingRPN` is the RPN with this in its place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms, box_iou

from tailfin.stats import ClassStats

THRESHOLDS = (0.9, 0.8, 0.7)  # rare, common, frequent
BACKGROUND_IOU = 0.3
GROUPS = {"r": 0, "c": 1}  # all others, classes without training images too: 2


def class_groups(stats: ClassStats) -> Tensor:
    """0 rare, 1 common, 2 frequent for each class, int64 [C]."""
    return torch.tensor([GROUPS.get(group, 2) for group in stats.frequency])


def linear_thresholds(stats: ClassStats, thresholds: Sequence[float] = THRESHOLDS) -> Tensor:
    """IoU threshold of each class and of the background (last), float32 [C + 1].

    Falls from `thresholds[0]` at one training image to `thresholds[-1]` at the most frequent class, linearly in the
    logarithm of the image count; background has `thresholds[-1]`. (The paper's own table of thresholds is a file for
    LVIS v0.5 whose formula is not published with the code.)
    """
    counts = np.log(np.maximum(np.asarray(stats.image_count, dtype=np.float64), 1))
    share = counts / max(float(counts.max()), 1e-12)
    high, low = thresholds[0], thresholds[-1]
    return torch.tensor([*(high + (low - high) * share), low], dtype=torch.float32)


def discrete_resampling(
    boxes: Tensor,
    scores: Tensor,
    levels: Tensor,
    gt_boxes: Tensor,
    gt_groups: Tensor,
    thresholds: Sequence[float] = THRESHOLDS,
    background_iou: float = BACKGROUND_IOU,
) -> Tensor:
    """Indices of the proposals kept by the discrete scheme, by descending score.

    Args:
        boxes: [P, 4] proposals, xyxy. scores: [P]. levels: int64 [P]; suppression stays within a pyramid level.
        gt_boxes: [G, 4]. gt_groups: int64 [G]: 0 rare, 1 common, 2 frequent.
        thresholds: IoU of the rare, the common and the frequent suppression.

    A proposal on a rare and on a common object is kept once where either suppression keeps it (the released code keeps
    it twice where both do).
    """
    on_group = [_touches(boxes, gt_boxes[gt_groups == group], background_iou) for group in (0, 1)]
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for touches, threshold in zip(on_group, thresholds, strict=False):
        if bool(touches.any()):
            kept |= touches & _kept(boxes, scores, levels, threshold)
    kept |= _kept(boxes, scores, levels, thresholds[2]) & ~on_group[0] & ~on_group[1]
    rows = torch.where(kept)[0]
    return rows[scores[rows].argsort(descending=True, stable=True)]


def linear_resampling(
    boxes: Tensor,
    scores: Tensor,
    levels: Tensor,
    gt_boxes: Tensor,
    gt_labels: Tensor,
    class_thresholds: Tensor,
    background_iou: float = BACKGROUND_IOU,
) -> Tensor:
    """Indices of the proposals kept by the linear scheme, by descending score.

    Arguments as for `discrete_resampling`; gt_labels int64 [G] in 0..C-1, class_thresholds [C + 1], background last.
    """
    background = len(class_thresholds) - 1
    owner = torch.full_like(scores, background, dtype=torch.int64)
    if len(gt_boxes):
        overlap, nearest = box_iou(boxes, gt_boxes.to(boxes)).max(dim=1)
        owner = torch.where(overlap >= background_iou, gt_labels[nearest], owner)
    return nms_with_thresholds(boxes, scores, levels, class_thresholds.to(boxes)[owner])


def nms_with_thresholds(boxes: Tensor, scores: Tensor, levels: Tensor, thresholds: Tensor) -> Tensor:
    """Greedy suppression in which a kept box i removes weaker ones of its level with IoU > thresholds[i].

    Returns the indices kept, by descending score. Boxes [P, 4], scores, levels and thresholds [P]; memory: the square
    of the largest level. A box is kept when no kept, stronger box suppresses it: starting from "all kept" and applying
    this rule to all boxes at once settles the strongest boxes first and ends, after as many rounds as the longest chain
    of suppressions, at the one greedy solution.
    """
    order = scores.argsort(descending=True, stable=True)
    kept = torch.zeros_like(order, dtype=torch.bool)
    for level in levels.unique():
        rows = torch.where(levels[order] == level)[0]
        own = boxes[order[rows]]
        suppresses = (box_iou(own, own) > thresholds[order[rows], None]).triu(diagonal=1).to(torch.float32)
        alive = torch.ones(len(rows), device=boxes.device)
        while True:
            new = (alive @ suppresses == 0).to(torch.float32)
            if torch.equal(new, alive):
                break
            alive = new
        kept[rows] = alive.bool()
    return order[kept]


def _touches(boxes: Tensor, gt_boxes: Tensor, iou: float) -> Tensor:
    """Which boxes overlap any of the ground truth by at least `iou`, bool [P]."""
    if len(gt_boxes) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return box_iou(boxes, gt_boxes.to(boxes)).amax(dim=1) >= iou


def _kept(boxes: Tensor, scores: Tensor, levels: Tensor, threshold: float) -> Tensor:
    """Which boxes plain suppression keeps, bool [P]."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[batched_nms(boxes, scores, levels, threshold)] = True
    return kept
