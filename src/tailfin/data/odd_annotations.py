"""Fields of annotations that contradict their boxes: read without an error, and used where nobody looks.

area_note(areas, boxes)          `area` that decides small, medium and large, and is not that of the objects
mask_note(segmentations, rows)   masks that lie elsewhere than the boxes of the same annotations
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tailfin.data.masks import Segmentations

LEAST, MOST = 0.01, 1.5  # median of area / (width * height): below and above it is no object's
APART = 0.5  # IoU of a box with that around the mask, below which they are not of one object
FEW, SHARE = 2, 0.05  # so many of them, and so many of all, are no accident


def area_note(areas: NDArray[np.float64], boxes: NDArray[np.float64]) -> str:
    """What is odd about areas [A] of boxes [A, 4] (x, y, width, height); empty for nothing."""
    size = boxes[:, 2] * boxes[:, 3]
    known = np.flatnonzero(np.isfinite(areas) & (size > 0))
    if len(known) < FEW:
        return ""
    share = float(np.median(areas[known] / size[known]))
    if LEAST <= share <= MOST:
        return ""
    return (
        f"area is {share:.2g} times width x height on the median: small, medium and large objects are told by it "
        "(without the field it is worked out from mask or box)"
    )


def mask_note(parts: Segmentations, rows: NDArray[np.int64] | None = None) -> str:
    """How many masks of `rows` (all) lie elsewhere than their boxes; empty where these are few or none."""
    rows = np.arange(len(parts.kinds)) if rows is None else rows
    around = parts.bounds()[rows]
    drawn = ~np.isnan(around[:, 0])
    rows, around = rows[drawn], around[drawn]
    boxes = parts.index.boxes[rows]
    low = np.maximum(around[:, :2], boxes[:, :2])
    high = np.minimum(around[:, 2:], boxes[:, :2] + boxes[:, 2:])
    shared = (high - low).clip(min=0).prod(1)
    union = (around[:, 2:] - around[:, :2]).prod(1) + boxes[:, 2:].prod(1) - shared
    apart = np.flatnonzero(shared < APART * union)
    if len(apart) < max(FEW, SHARE * len(rows)):
        return ""
    first = int(parts.index.annotation_ids[rows[apart]].min())
    return (
        f"{len(apart):,} of {len(rows):,} masks lie elsewhere than their boxes (first annotation {first}): are they of "
        "other objects, fractions, or [y, x]?"
    )
