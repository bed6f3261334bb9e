"""From scored proposals to the detections that are reported: threshold, per-class NMS, best `max_dets`.

A classifier that is balanced over 1203 classes gives hundreds of thousands of boxes above a threshold of 1e-4, and NMS
over all of them costs more than the network. But greedy NMS visits boxes by descending score, and a box is only ever
suppressed by one with a higher score. So NMS over the K best candidates gives exactly the first part of NMS over all of
them; once that part holds `max_dets` boxes, the rest cannot matter. K starts small and grows only where it must, and
box deltas are decoded only for the candidates (never [R, C, 4] at once).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms

from tailfin.models.detector import Detections, Limits

MIN_SIDE = 1e-2  # pixels; thinner boxes are dropped
FIRST_CANDIDATES = 4  # times max_dets


def select_detections(
    proposals: Tensor,
    scores: Tensor,
    deltas: Tensor,
    box_coder: BoxCoder,
    image_size: tuple[int, int],
    limits: Limits,
) -> dict[str, Tensor]:
    """Detections of one image.

    Args:
        proposals: boxes [R, 4], xyxy.
        scores: foreground scores [R, C].
        deltas: box deltas [R, 1, 4] (class-agnostic) or [R, C, 4].
        image_size: (height, width) that boxes are clipped to.
        limits: threshold of the scores, IoU of the suppression, and how many are kept over all classes.

    Returns:
        boxes [D, 4] float32, scores [D] descending, labels int64 [D]: exactly those of NMS over every candidate.
    """
    score_threshold, max_dets, nms_iou = limits
    num_classes = scores.shape[1]
    flat = scores.reshape(-1)
    candidates = torch.where(flat > score_threshold)[0]
    values = flat[candidates]
    count = len(candidates) if max_dets < 0 else min(len(candidates), max(FIRST_CANDIDATES * max_dets, 1000))
    while True:
        if count < len(candidates):
            # all candidates that tie with the last one come along, so that the cut never parts equal scores
            bound = values.topk(count, sorted=False).values.min()
            chosen = candidates[values >= bound]
        else:
            chosen = candidates
        rows, labels = chosen // num_classes, chosen % num_classes
        boxes = _decode(deltas[rows, labels if deltas.shape[1] > 1 else 0], proposals[rows], box_coder, image_size)
        sides = boxes[:, 2:] - boxes[:, :2]
        solid = (sides >= MIN_SIDE).all(dim=1)
        boxes, labels, kept_scores = boxes[solid], labels[solid], flat[chosen][solid]
        keep = nms_per_class(boxes, kept_scores, labels, nms_iou)
        if len(chosen) == len(candidates) or len(keep) >= max_dets >= 0:
            break
        count = min(4 * count, len(candidates))
    if max_dets >= 0:
        keep = keep[:max_dets]
    return {"boxes": boxes[keep], "scores": kept_scores[keep], "labels": labels[keep]}


def best_detections(boxes: Tensor, scores: Tensor, labels: Tensor, limits: Limits) -> dict[str, Tensor]:
    """Detections of one image from scored boxes that are decoded already: NMS within each class, best `max_dets`.

    The same growing number of best candidates as in `select_detections`; the threshold of `limits` is the caller's.

    Args:
        boxes: [K, 4], xyxy and not negative.
        scores, labels: [K], int64 [K].
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    count = len(order) if limits.max_dets < 0 else min(len(order), max(FIRST_CANDIDATES * limits.max_dets, 1000))
    while True:
        keep = nms_per_class(boxes[:count], scores[:count], labels[:count], limits.nms)
        if count == len(order) or len(keep) >= limits.max_dets >= 0:
            break
        count = min(4 * count, len(order))
    if limits.max_dets >= 0:
        keep = keep[: limits.max_dets]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def best_pairs(boxes: Tensor, scores: Tensor, limits: Limits) -> Detections:
    """What query detectors report, without suppression: boxes [B, Q, 4] and scores [B, Q, C] to the best pairs of query
    and class of each picture, within `limits`."""
    classes = scores.shape[-1]
    flat = scores.flatten(1)
    count = flat.shape[1] if limits.max_dets < 0 else min(limits.max_dets, flat.shape[1])
    values, places = flat.topk(count, dim=1)
    results = []
    for own_boxes, own, place in zip(boxes, values, places, strict=True):
        keep = own > limits.score_threshold
        place, own = place[keep], own[keep]
        results.append({"boxes": own_boxes[place // classes], "scores": own, "labels": place % classes})
    return results


def nms_per_class(boxes: Tensor, scores: Tensor, labels: Tensor, iou: float) -> Tensor:
    """Indices that survive NMS within each class, best first; boxes [K, 4] must not be negative.

    One call for all classes: every class is moved to a place of its own. The offsets are added in float64, since in
    float32 a thousand classes of 1333 pixels leave a resolution of an eighth of a pixel.
    """
    if len(boxes) == 0:
        return labels.new_zeros((0,))
    exact = torch.float64 if boxes.device.type != "mps" else torch.float32
    span = boxes.max().to(exact) + 1
    return nms(boxes.to(exact) + (labels.to(exact) * span)[:, None], scores.to(exact), iou)


def _decode(deltas: Tensor, proposals: Tensor, box_coder: BoxCoder, image_size: tuple[int, int]) -> Tensor:
    boxes = box_coder.decode_single(deltas, proposals).view(-1, 4)
    height, width = image_size
    limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)
