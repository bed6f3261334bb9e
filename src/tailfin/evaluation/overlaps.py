"""Every pair of a detection and an object of the same image with its IoU, in parts that fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from hotcoco import mask as mask_utils
from numpy.typing import NDArray

from tailfin.evaluation.detections import Detections
from tailfin.evaluation.truth import GroundTruth, encode_mask

PAIRS = 2**21  # compared at a time
NEAR_PAIRS = 2**18  # by `near_boxes`: what it needs stays in the processor's cache


class Pairs(NamedTuple):
    """All pairs of some detections, those of a detection one after another, its objects in order of annotation id."""

    places: NDArray[np.int64]  # [D] of the detections, in the rows asked for; each has a pair
    starts: NDArray[np.int64]  # [D] where each one's pairs begin
    counts: NDArray[np.int64]  # [D] how many it has
    detections: NDArray[np.int64]  # [P] row of the detection
    objects: NDArray[np.int64]  # [P] row of the object
    iou: NDArray[np.float64]  # [P]


# rows of detections and of objects, K pairs, to float64 [K]; the pairs of a detection stand together and are with all
# objects of its image, in one order
Overlap = Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]]


def pairs(
    truth: GroundTruth,
    evidence: NDArray[np.bool_],
    detections: Detections,
    rows: NDArray[np.int64],
    overlap_of: Overlap,
) -> Iterator[Pairs]:
    """Pairs of the detections `rows` with the objects marked by `evidence` (bool [G])."""
    objects = np.flatnonzero(evidence)
    objects = objects[np.lexsort((truth.annotation_ids[objects], truth.image_rows[objects]))]
    starts = np.searchsorted(truth.image_rows[objects], np.arange(len(truth.image_ids) + 1))
    first = starts[detections.image_rows[rows]]
    sizes = starts[detections.image_rows[rows] + 1] - first
    ends = np.cumsum(sizes)
    start = 0
    while start < len(rows):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + PAIRS, side="right")))
        part = np.arange(start, stop)[sizes[start:stop] > 0]
        start = stop
        if not len(part):
            continue
        count = sizes[part]
        begin = np.cumsum(count) - count
        mine = np.repeat(rows[part], count)
        their = objects[np.arange(count.sum()) + np.repeat(first[part] - begin, count)]
        yield Pairs(part, begin, count, mine, their, overlap_of(mine, their))


def near_boxes(
    truth: GroundTruth, detections: Detections, least: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Detection, object and IoU of all pairs of one image whose boxes overlap by `least` (above 0) or more, by
    detection, then annotation id. Most pairs do not overlap: they are dropped by their horizontal sides alone."""
    boxes = detections.boxes
    assert boxes is not None
    objects = np.lexsort((truth.annotation_ids, truth.image_rows))
    starts = np.searchsorted(truth.image_rows[objects], np.arange(len(truth.image_ids) + 1))
    first = starts[detections.image_rows]
    sizes = starts[detections.image_rows + 1] - first
    ends = np.cumsum(sizes)
    left, top, right, bottom = _corners(boxes)
    its_left, its_top, its_right, its_bottom = (side[objects] for side in _corners(truth.boxes))
    area, its_area = boxes[:, 2:].prod(axis=1), truth.boxes[objects, 2:].prod(axis=1)
    found: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
    start = 0
    while start < len(boxes):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + NEAR_PAIRS, side="right")))
        count = sizes[start:stop]
        mine = np.repeat(np.arange(start, stop), count)
        begin = first[start:stop] - (np.cumsum(count) - count)
        theirs = np.arange(len(mine)) + np.repeat(begin, count)
        start = stop
        wide = np.minimum(right[mine], its_right[theirs]) - np.maximum(left[mine], its_left[theirs])
        keep = np.flatnonzero(wide > 0)
        mine, theirs, wide = mine[keep], theirs[keep], wide[keep]
        high = np.minimum(bottom[mine], its_bottom[theirs]) - np.maximum(top[mine], its_top[theirs])
        keep = np.flatnonzero(high > 0)
        mine, theirs = mine[keep], theirs[keep]
        shared = wide[keep] * high[keep]
        union = area[mine] + its_area[theirs] - shared
        iou = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        keep = np.flatnonzero(iou >= least)
        found.append((mine[keep], objects[theirs[keep]], iou[keep]))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0)
    mine, theirs, iou = (np.concatenate(columns) for columns in zip(*found, strict=True))
    return mine, theirs, iou


def _corners(boxes: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Left, top, right and bottom of boxes xywh, each in a row."""
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    return tuple(np.ascontiguousarray(side) for side in (low[:, 0], low[:, 1], high[:, 0], high[:, 1]))


def box_overlap(truth: GroundTruth, detections: Detections) -> Overlap:
    """IoU of boxes."""
    boxes = detections.boxes
    assert boxes is not None
    return lambda mine, their: box_iou(boxes[mine], truth.boxes[their])


def mask_overlap(
    truth: GroundTruth, evidence: NDArray[np.bool_], detections: Detections, *, share: bool = False
) -> Overlap:
    """IoU of masks, image by image: a matrix of its detections and objects each; `share`: of the detection's area."""
    masks, found = truth.masks(), detections.masks or []
    sizes = truth.image_sizes[truth.image_rows].tolist()
    objects = {int(row): encode_mask(masks[row], *map(int, sizes[row])) for row in np.flatnonzero(evidence)}

    def overlap(mine: NDArray[np.int64], their: NDArray[np.int64]) -> NDArray[np.float64]:
        result = np.zeros(len(mine))
        images = detections.image_rows[mine]
        order = np.argsort(images, kind="stable")  # pairs of a detection stay together
        for near in np.split(order, np.flatnonzero(np.diff(images[order])) + 1):
            own = mine[near[np.flatnonzero(np.diff(mine[near], prepend=-1))]]
            others = their[near[: len(near) // len(own)]]
            matrix = mask_utils.iou(
                [found[row] for row in own], [objects[row] for row in others], [share] * len(others)
            )
            result[near] = np.asarray(matrix, dtype=np.float64).reshape(len(own), len(others)).ravel()
        return result

    return overlap


def box_iou(boxes: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.float64]:
    """[K, 4] and [K, 4] xywh to [K]; boxes without area overlap by 0."""
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    shared = (high - low).clip(min=0).prod(axis=1)
    union = boxes[:, 2:].prod(axis=1) + others[:, 2:].prod(axis=1) - shared
    return np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)


def crowd_share(truth: GroundTruth, detections: Detections, iou_type: str) -> Iterator[Pairs]:
    """Pairs of all detections with the objects marked iscrowd, the share of the detection in the place of the IoU."""
    if not truth.crowd.any():
        return
    if iou_type == "segm":
        overlap = mask_overlap(truth, truth.crowd, detections, share=True)
    else:
        overlap = _box_share(truth, detections)
    yield from pairs(truth, truth.crowd, detections, np.arange(len(detections)), overlap)


def _box_share(truth: GroundTruth, detections: Detections) -> Overlap:
    boxes = detections.boxes
    assert boxes is not None

    def share(mine: NDArray[np.int64], their: NDArray[np.int64]) -> NDArray[np.float64]:
        own, other = boxes[mine], truth.boxes[their]
        low = np.maximum(own[:, :2], other[:, :2])
        high = np.minimum(own[:, :2] + own[:, 2:], other[:, :2] + other[:, 2:])
        shared = (high - low).clip(min=0).prod(axis=1)
        area = own[:, 2:].prod(axis=1)
        return np.divide(shared, area, out=np.zeros_like(shared), where=area > 0)

    return share
