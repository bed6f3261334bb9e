"""Distillation from a teacher that knows the head classes well (Step-wise Learning, Dong et al., ICCV'23, 3.3).

    eq. 2  L_fm  = mean over (level, image) of  sum_ijk m_ij (f_student - f_teacher)^2 / (2 N),  N = max(1, sum m)
    eq. 3  L_cls = sum over layers of the mean over rows of  KL(softmax_H(teacher) || softmax_H(student))

m marks the boxes of head classes on a level's grid, H is the set of head classes. The rows of eq. 3 are the same for
both networks: the teacher's object queries, fed to the student's classifier ("shared object queries")::

    masks = [box_masks(boxes, level.shape[-2:]) for level in student_levels]
    loss = feature_distillation(student_levels, teacher_levels, masks)
    loss = loss + 0.1 * class_distillation(student.class_embed(hidden), teacher.class_embed(hidden), head_classes)

All functions work on every device, compute in float32 at least, and loop over levels only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from tailfin.losses.base import at_least_float32
from tailfin.models.constants import constant
from tailfin.models.images import pictures_of

TINY = 1e-12  # below a root, whose slope at 0 has no bound


def box_masks(
    boxes: Sequence[Tensor],
    size: tuple[int, int] | torch.Size,
    valid: Tensor | None = None,
    rounding: str = "outer",
    wanted: Tensor | None = None,
) -> Tensor:
    """Union of each picture's boxes on a grid, bool [B, h, w].

    Args:
        boxes: per picture [M, 4] xyxy as fractions of the picture's own width and height.
        size: (h, w) of the grid that the padded batch has.
        valid: bool [B, h, w], cells of the picture itself; boxes are scaled to that part. None: the whole grid.
        rounding: "outer" covers every cell that a box touches. "released" is the released code's: the left edge and
            the right one are rounded down, the top and the bottom up, and boxes are scaled to the padded grid.
        wanted: bool [sum M], which boxes count, pictures one after another; None: all.
    """
    return level_masks(boxes, [size], None if valid is None else [valid], rounding, wanted)[0]


def level_masks(
    boxes: Sequence[Tensor],
    sizes: Sequence[tuple[int, int] | torch.Size],
    valid: Sequence[Tensor] | None = None,
    rounding: str = "outer",
    wanted: Tensor | None = None,
) -> list[Tensor]:
    """`box_masks` on the grids of several levels at once."""
    device, pictures = boxes[0].device, len(boxes)
    counts = [len(own) for own in boxes]
    grid = [(int(height), int(width)) for height, width in sizes]
    ends = constant([[width, height, width, height] for height, width in grid], device)
    image = pictures_of(counts, device)
    if valid is not None and rounding != "released":
        sums = [side for own in valid for side in (own.any(1).sum(1), own.any(2).sum(1))]
        scale = torch.stack(sums, dim=1).unflatten(1, (len(grid), 2)).repeat(1, 1, 2)[image]  # [M, levels, 4]
    else:
        scale = ends
    edges = torch.cat(list(boxes))[:, None] * scale.to(boxes[0].dtype)
    up = constant([False, True] * 2 if rounding == "released" else [False, False, True, True], device, torch.bool)
    edges = torch.where(up, edges.ceil(), edges.floor())
    sides = torch.minimum(edges.clamp(min=0), ends.to(edges.dtype)).long()
    solid = (sides[..., 2:] > sides[..., :2]).all(-1)
    solid = (solid if wanted is None else solid & wanted[:, None]).int()
    # each box adds one inside itself: +1 and -1 at its corners, summed along both axes; grids lie one after another
    cells = [(height + 1) * (width + 1) for height, width in grid]
    before = constant(np.cumsum([0, *(pictures * size for size in cells[:-1])]).tolist(), device, torch.int64)
    steps = constant([[width + 1, size] for (_, width), size in zip(grid, cells, strict=True)], device, torch.int64)
    left, top, right, bottom = sides.unbind(-1)  # [M, levels]
    first = before + image[:, None] * steps[:, 1]
    above, below = first + top * steps[:, 0], first + bottom * steps[:, 0]
    at = torch.stack([above + left, above + right, below + left, below + right])
    corners = torch.zeros(pictures * sum(cells), dtype=torch.int32, device=device)
    corners.index_add_(0, at.flatten(), torch.stack([solid, -solid, -solid, solid]).flatten())
    masks = []
    for (height, width), own in zip(grid, corners.split([pictures * size for size in cells]), strict=True):
        inside = own.view(pictures, height + 1, width + 1).cumsum(1).cumsum(2)
        masks.append(inside[:, :height, :width] > 0)
    return masks


def feature_distillation(student: Sequence[Tensor], teacher: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Eq. 2: a scalar from feature maps [B, d, h, w] and masks [B, h, w] per level.

    Channels are summed, cells averaged over the mask (a mask without cells gives 0), levels and pictures averaged.
    """
    terms = []
    for own, taught, mask in zip(student, teacher, masks, strict=True):
        distance = (at_least_float32(own) - at_least_float32(taught.detach())).square().sum(1)
        total = torch.where(mask, distance, 0.0).sum((1, 2))
        terms.append(total / (2 * mask.sum((1, 2)).clamp(min=1)))
    return torch.stack(terms).mean()


def class_distillation(student: Tensor, teacher: Tensor, classes: Tensor, temperature: float = 1.0) -> Tensor:
    """Eq. 3: a scalar from logits [L, ..., K] of the same rows; layers are summed, rows averaged.

    `classes` (int64 [H], or a bool mask [K]) names the columns that both distributions are over.
    """
    log_student, log_teacher = (
        (at_least_float32(logits)[..., classes] / temperature).log_softmax(-1) for logits in (student, teacher.detach())
    )
    if log_student.shape[-1] == 0:
        return student.sum() * 0.0
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(-1)
    return divergence.flatten(1).mean(1).sum() if divergence.numel() else student.sum() * 0.0


def logit_distance(student: Tensor, teacher: Tensor, classes: Tensor) -> Tensor:
    """LST's distillation (Hu et al., CVPR'20): a scalar from logits [L, ..., K] of the same rows, the length of their
    difference over the columns `classes`; layers are summed, rows averaged."""
    gap = at_least_float32(student)[..., classes] - at_least_float32(teacher.detach())[..., classes]
    if not gap.numel():
        return student.sum() * 0.0
    return (gap.square().sum(-1) + TINY).sqrt().flatten(1).mean(1).sum()
