"""Precision and recall arrays from hotcoco, whose input is prepared so that it gives the reference tools' numbers.

The protocols differ in what is dropped or ignored before the matching, and that is done here:

- lvis: ground truth and detections of area <= 0 are dropped, `iscrowd` has no effect, `ignore` takes an annotation out
  of the count, detections of classes that nobody judged in their image are dropped;
- coco: nothing is dropped, crowds are ignored, `ignore` has no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import hotcoco
import numpy as np

from tailfin.errors import UserError
from tailfin.evaluation.detections import Detections, with_geometry
from tailfin.evaluation.truth import GroundTruth

IOU_THRESHOLDS = 10  # 0.50, 0.55, ..., 0.95
RECALL_POINTS = 101
AREAS = ("all", "s", "m", "l")  # all, up to 32^2, 32^2 to 96^2, from 96^2 pixels

# An area outside every size range, the largest of which ends at 1e10: the engine then ignores the annotation in all.
_OUTSIDE = 1e12


@dataclass(frozen=True)
class Curves:
    """What the metrics are means of; -1 where there is no ground truth. K = classes, or 1 where they are pooled."""

    precision: np.ndarray  # float64 [10 IoU, 101 recall, K, 4 areas, limits]
    recall: np.ndarray  # float64 [10 IoU, K, 4 areas, limits]
    scores: np.ndarray  # float64, shape of precision: the score at which that recall is reached


def lvis_curves(truth: GroundTruth, detections: Detections, iou_type: str) -> Curves:
    """The LVIS protocol; `detections` are all that count (a per-image limit is applied before)."""
    counted = truth.area > 0
    classes = len(truth.categories)
    annotated = np.unique(truth.image_rows[counted] * classes + truth.category_rows[counted])
    judged = np.union1d(annotated, truth.negative_pairs)
    pairs = detections.image_rows * classes + detections.category_rows
    detections = detections.select(truth.exhaustive[detections.image_rows] | _in_sorted(pairs, judged))

    detections, area = with_geometry(detections, truth, iou_type)
    detections, area = detections.select(area > 0), area[area > 0]
    pairs = np.unique(detections.image_rows * classes + detections.category_rows)
    return _run(
        truth,
        detections,
        area,
        iou_type,
        lvis=True,
        counted=counted,
        truth_area=np.where(truth.ignore, _OUTSIDE, truth.area),
        crowd=np.zeros(len(truth.area), bool),
        # every pair that is left may be judged, so the engine needs no more of the negative lists than these
        negatives=_by_image(pairs, classes, len(truth.image_ids)),
        partial=_by_image(truth.partial_pairs, classes, len(truth.image_ids)),
        limits=[max(1, len(detections))],
    )


def coco_curves(
    truth: GroundTruth, detections: Detections, iou_type: str, limits: Sequence[int], use_cats: bool = True
) -> Curves:
    """The COCO protocol; `limits` ascend and hold per image and class, or per image where classes are pooled."""
    if not use_cats:  # the reference visits an image's boxes class by class, which decides between equal scores
        detections = detections.select(np.argsort(detections.category_rows, kind="stable"))
    detections, area = with_geometry(detections, truth, iou_type)
    return _run(
        truth,
        detections,
        area,
        iou_type,
        lvis=False,
        counted=np.ones(len(truth.area), bool),
        truth_area=truth.area,
        crowd=truth.crowd,
        negatives=None,
        partial=None,
        limits=limits,
        use_cats=use_cats,
    )


def _run(
    truth: GroundTruth,
    detections: Detections,
    area: np.ndarray,
    iou_type: str,
    *,
    lvis: bool,
    counted: np.ndarray,
    truth_area: np.ndarray,
    crowd: np.ndarray,
    negatives: list[list[int]] | None,
    partial: list[list[int]] | None,
    limits: Sequence[int],
    use_cats: bool = True,
) -> Curves:
    classes = len(truth.categories) if use_cats else 1
    if not (truth.categories and len(truth.image_ids)):
        shape = (IOU_THRESHOLDS, RECALL_POINTS, classes, len(AREAS), len(limits))
        return Curves(np.full(shape, -1.0), np.full(shape[:1] + shape[2:], -1.0), np.full(shape, -1.0))

    # Rows serve as ids: they ascend as the ids do, and are never negative.
    images: list[dict[str, Any]] = [
        {"id": row, "height": height, "width": width} for row, (height, width) in enumerate(truth.image_sizes.tolist())
    ]
    if lvis and negatives is not None and partial is not None:
        for image, negative, not_exhaustive in zip(images, negatives, partial, strict=True):
            image["neg_category_ids"] = negative
            image["not_exhaustive_category_ids"] = not_exhaustive
    segmentation = None
    order = np.flatnonzero(counted)
    if not use_cats:
        order = order[np.argsort(truth.category_rows[order], kind="stable")]
    if iou_type == "segm":
        masks = truth.masks()
        segmentation = [masks[row] for row in order]
    try:
        annotations = hotcoco.COCO.from_arrays(
            images,
            [{"id": row, "name": str(row)} for row in range(len(truth.categories))],
            truth.image_rows[order],
            truth.category_rows[order],
            truth.boxes[order],
            ids=np.arange(1, len(order) + 1),
            area=truth_area[order],
            iscrowd=crowd[order],
            segmentation=segmentation,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"{truth.label}: a segmentation cannot be read: {error}") from None
    assert detections.boxes is not None
    table = np.column_stack(
        [detections.image_rows, detections.boxes, detections.scores, detections.category_rows]
    ).astype(np.float64)
    if iou_type == "segm":
        results = annotations.load_res(table, segmentation=[_text(mask) for mask in detections.masks or []])
        results.update_anns(ids=np.arange(1, len(table) + 1), area=area)
    else:
        results = annotations.load_res(table)
    if lvis:  # marks the results as cut already; the engine would keep 300 per image otherwise
        results = results.cap_detections_per_image(None)

    evaluation = hotcoco.COCOeval(annotations, results, iou_type, lvis_style=lvis)
    evaluation.params.max_dets = list(limits)
    evaluation.params.use_cats = use_cats
    evaluation.evaluate()
    evaluation.accumulate()
    arrays = evaluation.eval
    assert arrays is not None
    return Curves(arrays["precision"], arrays["recall"], arrays["scores"])


def _in_sorted(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Whether each value is in the ascending array; bool, shape of `values`."""
    if not ascending.size:
        return np.zeros(len(values), bool)
    return ascending[np.searchsorted(ascending, values).clip(max=len(ascending) - 1)] == values


def _by_image(pairs: np.ndarray, classes: int, images: int) -> list[list[int]]:
    """Ascending pair codes as one list of category rows per image."""
    ends = np.searchsorted(pairs, np.arange(1, images + 1) * classes)
    return [part.tolist() for part in np.split(pairs % max(classes, 1), ends[:-1])] if images else []


def _text(mask: dict[str, Any]) -> dict[str, Any]:
    counts = mask["counts"]
    return {"size": list(mask["size"]), "counts": counts.decode("ascii") if isinstance(counts, bytes) else counts}
