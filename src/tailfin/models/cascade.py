"""Cascade R-CNN (Cai and Vasconcelos, CVPR'18): the boxes of one stage become the proposals of the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tailfin.models.box_deltas import decode_deltas


@torch.no_grad()
def refine_boxes(
    boxes: Tensor,
    deltas: Tensor,
    labels_or_scores: Tensor | None,
    image_size: tuple[int, int] | None,
    stds: Sequence[float],
    class_agnostic: bool,
) -> Tensor:
    """Boxes of one image moved by a stage's own deltas, for the next stage.

    A row takes the delta of its class: in training the object's label on positives, the best foreground class of this
    stage on background rows; at test time the latter throughout. Every row stays, background too, in its order. What is
    the caller's: rows that were added as ground truth are not refined again (mmdetection drops them).

    Args:
        boxes: [N, 4] xyxy in pixels.
        deltas: [N, 4], or [N, 4C] with four numbers per class.
        labels_or_scores: int64 [N], the class 0..C-1 of each row; or float [N, C], foreground scores of which the
            largest decides; class-agnostic deltas need neither (None).
        image_size: (H, W) that the boxes are clipped to; None: they are not.
        stds: the stage's, by which deltas are multiplied.
        class_agnostic: whether `deltas` are [N, 4] for all classes together.

    Returns:
        [N, 4] boxes without gradient, in the wider dtype of boxes and deltas (float32 at least).

    Raises:
        ValueError: shapes that do not match; a label that is no foreground class.
    """
    rows = len(boxes)
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be [N, 4], these are {list(boxes.shape)}")
    if deltas.ndim != 2 or len(deltas) != rows or deltas.shape[1] % 4 or (class_agnostic and deltas.shape[1] != 4):
        wanted = f"[{rows}, 4]" if class_agnostic else f"[{rows}, 4 x classes]"
        raise ValueError(f"deltas must be {wanted}, these are {list(deltas.shape)}")
    if not class_agnostic:
        classes = deltas.shape[1] // 4
        labels = _labels(labels_or_scores, rows, classes)
        deltas = deltas.reshape(rows, classes, 4)[torch.arange(rows, device=deltas.device), labels]
    return decode_deltas(boxes, deltas, stds, image_size)


def _labels(given: Tensor | None, rows: int, classes: int) -> Tensor:
    """int64 [N] classes from labels or scores."""
    if given is None:
        raise ValueError("deltas of classes need the class of each row: labels [N] or foreground scores [N, C]")
    if given.is_floating_point():
        if given.shape != (rows, classes):
            raise ValueError(f"scores must be [{rows}, {classes}] (foreground alone), these are {list(given.shape)}")
        return given.argmax(dim=1) if rows else given.new_zeros(0, dtype=torch.int64)
    if given.shape != (rows,):
        raise ValueError(f"labels must be [{rows}], these are {list(given.shape)}")
    if given.device.type == "cpu" and not bool(((given >= 0) & (given < classes)).all()):
        raise ValueError(f"labels must lie in 0..{classes - 1}: background rows take their best foreground class")
    return given
