"""Suppression over a batch, and the end of every exported graph, with shapes that depend on no values.

Where the eager detectors keep as many boxes as there are, a graph keeps a fixed number whose scores may be 0: the best
candidates by `topk`, of which NMS says which stay. ONNX has NMS over a batch and classes as one operator; in PyTorch
the same is one call with every class and picture at a place of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

FIRST = 2000  # candidates of a picture, box and class, that NMS looks at


class OnnxNMS(torch.autograd.Function):
    """ONNX's NonMaxSuppression: boxes [B, K, 4], scores [B, G, K] to int64 [M, 3] (picture, group, box)."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, most: Tensor, iou: Tensor, least: Tensor) -> Tensor:
        """Only its shape matters to the tracer."""
        return torch.zeros((1, 3), dtype=torch.int64)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, most: Any, iou: Any, least: Any) -> Any:
        return g.op("NonMaxSuppression", boxes, scores, most, iou, least)


def survivors(boxes: Tensor, scores: Tensor, groups: Tensor, count: int, iou: float) -> Tensor:
    """Bool [B, K]: what NMS within each of `count` groups leaves of boxes [B, K, 4]; scores of 0 and less are gone.

    Args:
        boxes: xyxy, not negative.
        scores: [B, K].
        groups: int64 [B, K], 0..count-1.
    """
    there = scores > 0
    if torch.jit.is_tracing():
        own = groups[:, None] == torch.arange(count, device=groups.device)[:, None]  # [B, count, K]
        apart = torch.where(own & there[:, None], scores[:, None], torch.zeros_like(scores[:, None]))
        most, bound = torch.tensor([scores.shape[1]]), torch.tensor([iou])
        chosen = OnnxNMS.apply(boxes, apart, most, bound, torch.tensor([0.0]))
        place = chosen[:, 0], chosen[:, 2]
        return torch.zeros_like(scores).index_put(place, torch.ones(())) > 0
    # float64, so that the places of a thousand classes leave the boxes exact
    pictures = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    span = boxes.amax().double() + 1
    moved = boxes.double() + ((pictures * count + groups) * span)[..., None]
    kept = nms(moved.flatten(0, 1), scores.double().flatten(), iou)
    mask = torch.zeros_like(scores).flatten().index_put((kept,), torch.ones((), device=scores.device))
    return (mask.view_as(scores) > 0) & there


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best of [B, N], with zeros where N is smaller: values and places, both [B, count], places below N."""
    padded = torch.cat([scores, scores.new_zeros((scores.shape[0], count))], dim=1)
    values, places = padded.topk(count, dim=1)
    return values, torch.minimum(places, torch.full_like(places, scores.shape[1] - 1))


def rows_of(values: Tensor, places: Tensor) -> Tensor:
    """[B, N, D] and places int64 [B, K] to [B, K, D]."""
    return values.gather(1, places[..., None].expand(-1, -1, values.shape[2]))


def finish(
    boxes: Tensor, scores: Tensor, labels: Tensor, classes: int, iou: float | None, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The `most` best detections of each picture, after NMS within each class where `iou` is given.

    Args:
        boxes: [B, K, 4] candidates, clipped.
        scores: [B, K], 0 where there is none.
        labels: int64 [B, K].

    Returns:
        boxes [B, most, 4], scores [B, most] descending, labels int64 [B, most]; 0, 0 and -1 where there are fewer.
    """
    if iou is not None:
        scores = torch.where(survivors(boxes, scores, labels, classes, iou), scores, torch.zeros_like(scores))
    values, places = best(scores, most)
    there = values > 0
    found = torch.where(there[..., None], rows_of(boxes, places), torch.zeros_like(boxes[:, :1]))
    return found, values, torch.where(there, labels.gather(1, places), torch.full_like(places, -1))
