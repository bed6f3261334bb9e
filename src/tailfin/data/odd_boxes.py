"""Boxes that are probably mistakes of annotation: by size, shape, place, and by others that lie on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tailfin.data.index import AnnotationIndex

TINY = 4.0  # pixels of the shorter side
THIN = 15.0  # longer over shorter side
WHOLE = 0.95  # of the picture
SAME, TWO_CLASSES = 0.9, 0.95  # IoU
FAR = 6.0  # median deviations of the logarithm of a class's areas
KINDS = {
    "outside": "reach outside the picture by more than a pixel",
    "tiny": f"shorter side below {TINY:g} pixels",
    "thin": f"longer side over {THIN:g} times the shorter",
    "whole picture": f"cover {100 * WHOLE:g} % of the picture",
    "twice": f"two boxes of a class on one place (IoU above {SAME:g})",
    "two classes": f"boxes of two classes on one place (IoU above {TWO_CLASSES:g})",
    "odd size": "area far from what the class has elsewhere",
}


def odd_boxes(index: AnnotationIndex) -> dict[str, NDArray[np.int64]]:
    """Rows of the index by kind of oddity, the oddest first; crowds are left out."""
    boxes = np.asarray(index.boxes, dtype=np.float64)
    plain = ~np.asarray(index.crowd)
    images = np.asarray(index.image_of)
    wide, high = (np.asarray(sides, dtype=np.float64)[images] for sides in (index.widths, index.heights))
    short, long = boxes[:, 2:].min(axis=1, initial=np.inf), boxes[:, 2:].max(axis=1, initial=0)
    outside = np.maximum.reduce(
        [-boxes[:, 0], -boxes[:, 1], boxes[:, 0] + boxes[:, 2] - wide, boxes[:, 1] + boxes[:, 3] - high]
    )
    area = boxes[:, 2] * boxes[:, 3]
    cover = area / np.maximum(wide * high, 1)
    shape = long / np.maximum(short, 1e-6)
    size = _deviation(np.log(np.maximum(area, 1e-6)), np.asarray(index.labels), plain)

    def ranked(chosen: NDArray[np.bool_], strength: NDArray[np.float64]) -> NDArray[np.int64]:
        rows = np.flatnonzero(chosen & plain)
        return rows[np.argsort(-strength[rows], kind="stable")]

    twice, two = _overlapping(index, boxes, plain)
    return {
        "outside": ranked(outside > 1, outside),
        "tiny": ranked(short < TINY, -short),
        "thin": ranked((shape > THIN) & (short >= TINY), shape),
        "whole picture": ranked(cover >= WHOLE, cover),
        "twice": twice,
        "two classes": two,
        "odd size": ranked(size > FAR, size),
    }


# ---- details ---------------------------------------------------------------------------------------------------------


def _deviation(values: NDArray[np.float64], labels: NDArray[np.int64], plain: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Distance to the median of the class in its median distances; 0 in classes with fewer than 20 boxes."""
    result = np.zeros(len(values))
    rows = np.flatnonzero(plain)
    order = rows[np.argsort(labels[rows], kind="stable")]
    for own in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):  # classes
        if len(own) >= 20:
            away = np.abs(values[own] - np.median(values[own]))
            spread = np.median(away)
            result[own] = away / max(float(spread), 0.1)
    return result


def _overlapping(
    index: AnnotationIndex, boxes: NDArray[np.float64], plain: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The later one of each pair of boxes that lie on one place: of one class, and of two. Within a picture, boxes are
    compared with the next eight in order of their left side: those on one place stand close together."""
    images, labels = np.asarray(index.image_of), np.asarray(index.labels)
    rows = np.flatnonzero(plain)
    order = rows[np.lexsort((boxes[rows, 0], images[rows]))]
    same: set[int] = set()
    other: set[int] = set()
    for step in range(1, 9):
        one, two = order[:-step], order[step:]
        near = images[one] == images[two]
        one, two = one[near], two[near]
        low = np.maximum(boxes[one, :2], boxes[two, :2])
        top = np.minimum(boxes[one, :2] + boxes[one, 2:], boxes[two, :2] + boxes[two, 2:])
        shared = (top - low).clip(min=0).prod(axis=1)
        union = boxes[one, 2:].prod(axis=1) + boxes[two, 2:].prod(axis=1) - shared
        iou = np.divide(shared, union, out=np.zeros(len(one)), where=union > 0)
        alike = labels[one] == labels[two]
        later = np.maximum(one, two)
        same.update(later[(iou > SAME) & alike].tolist())
        other.update(later[(iou > TWO_CLASSES) & ~alike].tolist())
    return np.array(sorted(same), dtype=np.int64), np.array(sorted(other), dtype=np.int64)
