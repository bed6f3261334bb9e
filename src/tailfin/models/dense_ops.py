"""What one-stage detectors do with their maps: losses of RetinaNet and ATSS, and detections from all levels.

Plain functions on tensors, without a network. Maps become rows in the order of the anchors, cells row by row and the
anchors of a cell one after another; from then on levels are parts of one long list::

    logits = torch.cat([flatten_map(level, num_classes) for level in cls_maps], 1)      # [B, A, C]
    deltas = torch.cat([flatten_map(level, 4) for level in box_maps], 1)                # [B, A, 4]
    assigned = [max_iou(anchors, boxes) for boxes in gt_boxes]
    parts = retinanet_losses(logits, deltas, anchors, assigned, gt_boxes, gt_labels, loss)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from tailfin.losses.base import ClassificationLoss, at_least_float32
from tailfin.models.assigners import centerness
from tailfin.models.box_deltas import Stds, decode_deltas, encode_deltas
from tailfin.models.detections import nms_per_class

RETINANET_STDS = (1.0, 1.0, 1.0, 1.0)
ATSS_STDS = (0.1, 0.1, 0.2, 0.2)
GIOU_WEIGHT = 2.0  # of ATSS's box loss


def flatten_map(values: Tensor, columns: int) -> Tensor:
    """[B, anchors x columns, h, w] (the columns of an anchor side by side) to [B, h x w x anchors, columns]."""
    batch, channels, height, width = values.shape
    if channels % columns:
        raise ValueError(f"{channels} channels are no multiple of {columns}")
    return values.permute(0, 2, 3, 1).reshape(batch, height * width * (channels // columns), columns)


def dense_labels(assigned: Tensor, gt_labels: Tensor, num_classes: int) -> Tensor:
    """int64 [A] of an assigner to the labels of a loss: the object's class, background C, ignored -1."""
    if not len(gt_labels):
        return torch.where(assigned == -2, -1, torch.full_like(assigned, num_classes))
    own = gt_labels[assigned.clamp(min=0)]
    return torch.where(assigned >= 0, own, torch.where(assigned == -1, num_classes, -1))


def retinanet_losses(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    assigned: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    loss: ClassificationLoss,
    *,
    stds: Stds = RETINANET_STDS,
    beta: float = 0.0,
) -> dict[str, Tensor]:
    """Losses of RetinaNet (Lin et al., ICCV'17) for a batch, as in mmdetection.

    Both are sums divided by the positives of all images, of which an image counts at least one: the classification
    loss over all anchors that are not ignored, smooth L1 (L1 where `beta` is 0) over the positives' four deltas.

    Args:
        logits, deltas: [B, A, num_logits], [B, A, 4].
        anchors: [A, 4].
        assigned: int64 [A] per image, of `assigners.max_iou`.
        gt_boxes, gt_labels: [G, 4] and int64 [G] per image.
        loss: a loss that takes `normalizer` (focal, efl, eqfl, fedloss).

    Returns:
        {"loss_cls", "loss_box"}, scalars attached to the graph.
    """
    labels, rows, boxes = _targets(assigned, gt_boxes, gt_labels, loss.num_classes)
    normalizer = _normalizer(assigned)
    flat = at_least_float32(deltas.flatten(0, 1))[rows]
    targets = encode_deltas(anchors[rows % len(anchors)], boxes, stds).to(flat)
    distance = F.smooth_l1_loss(flat, targets, reduction="sum", beta=beta)
    return {
        "loss_cls": loss(logits.flatten(0, 1), labels, normalizer=normalizer.to(flat.dtype)),
        "loss_box": distance / normalizer,
    }


def atss_losses(
    logits: Tensor,
    deltas: Tensor,
    centerness_logits: Tensor,
    anchors: Tensor,
    assigned: Sequence[Tensor],
    gt_boxes: Sequence[Tensor],
    gt_labels: Sequence[Tensor],
    loss: ClassificationLoss,
    *,
    stds: Stds = ATSS_STDS,
) -> dict[str, Tensor]:
    """Losses of ATSS (Zhang et al., CVPR'20) for a batch, as in mmdetection.

    Classification and centerness (binary cross-entropy on the positives) are divided as in `retinanet_losses`; the box
    loss is 2 (1 - GIoU) of the decoded boxes, averaged with the centerness targets as weights, whose sum counts at
    least 1. Arguments as there, `centerness_logits` [B, A], `assigned` of `assigners.atss`.

    Returns:
        {"loss_cls", "loss_box", "loss_centerness"}.
    """
    labels, rows, boxes = _targets(assigned, gt_boxes, gt_labels, loss.num_classes)
    normalizer = _normalizer(assigned)
    own = anchors[rows % len(anchors)]
    flat = at_least_float32(deltas.flatten(0, 1))[rows]
    weights = centerness(own, boxes).to(flat)
    apart = generalized_box_iou_loss(decode_deltas(own, flat, stds), boxes.to(flat))
    central = at_least_float32(centerness_logits.flatten())[rows]
    entropy = F.binary_cross_entropy_with_logits(central, weights, reduction="sum")
    return {
        "loss_cls": loss(logits.flatten(0, 1), labels, normalizer=normalizer.to(flat.dtype)),
        "loss_box": GIOU_WEIGHT * (apart * weights).sum() / weights.sum().clamp(min=1),
        "loss_centerness": entropy / normalizer,
    }


def _targets(
    assigned: Sequence[Tensor], gt_boxes: Sequence[Tensor], gt_labels: Sequence[Tensor], num_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels [B x A], rows of the positives among them, and the box of each positive's object."""
    labels, boxes = [], []
    for own, own_boxes, own_labels in zip(assigned, gt_boxes, gt_labels, strict=True):
        labels.append(dense_labels(own, own_labels, num_classes))
        boxes.append(own_boxes[own[own >= 0]])
    joined = torch.cat(list(assigned))
    return torch.cat(labels), (joined >= 0).nonzero()[:, 0], torch.cat(boxes)


def _normalizer(assigned: Sequence[Tensor]) -> Tensor:
    """Positives of the batch; an image without any counts one."""
    return torch.stack([(own >= 0).sum().clamp(min=1) for own in assigned]).sum()


@torch.no_grad()
def dense_detections(
    scores: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    image_size: tuple[int, int],
    *,
    stds: Stds,
    quality: Sequence[Tensor] | None = None,
    score_threshold: float = 0.05,
    pre_nms: int = 1000,
    nms_iou: float = 0.5,
    max_dets: int = 100,
) -> dict[str, Tensor]:
    """Detections of one image from all levels.

    Of each level the `pre_nms` best pairs of anchor and class above the threshold are decoded and clipped; then follows
    NMS within each class over all levels. With `quality` (centerness) the score is score x quality, without a root; the
    threshold and the choice of the best look at the score alone, as in mmdetection.

    Args:
        scores: [A_l, C] per level, after the sigmoid.
        deltas, anchors: [A_l, 4] per level.
        image_size: (H, W).
        quality: [A_l] per level, in 0..1.
        max_dets: best detections kept; -1 = no limit.

    Returns:
        boxes [D, 4], scores [D] descending, labels int64 [D].
    """
    boxes, values, labels = [], [], []
    for level, own in enumerate(scores):
        flat = own.flatten()
        candidates = (flat > score_threshold).nonzero()[:, 0]
        if len(candidates) > pre_nms:
            candidates = candidates[flat[candidates].topk(pre_nms).indices]
        rows = candidates // own.shape[1]
        boxes.append(decode_deltas(anchors[level][rows], deltas[level][rows], stds, image_size))
        values.append(flat[candidates] if quality is None else flat[candidates] * quality[level][rows])
        labels.append(candidates % own.shape[1])
    box, value, label = torch.cat(boxes), torch.cat(values), torch.cat(labels)
    solid = (box[:, 2:] > box[:, :2]).all(dim=1)
    box, value, label = box[solid], value[solid], label[solid]
    keep = nms_per_class(box, value, label, nms_iou)
    keep = keep[:max_dets] if max_dets >= 0 else keep
    return {"boxes": box[keep], "scores": value[keep], "labels": label[keep]}
