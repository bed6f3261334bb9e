"""Detections as numpy columns, checked against the ground truth, and the cuts that the protocols make.

Reads a COCO results JSON, a list of its entries, or a folder of shards. Every function keeps the order of the file,
which decides between equal scores.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from hotcoco import mask as mask_utils  # pycocotools' area() fails on more than 255 masks with numpy 2

from tailfin.data.box_forms import FORMS, guess, to_xywh
from tailfin.errors import UserError
from tailfin.evaluation.entry_names import Entry, entries_of, entry_rows
from tailfin.evaluation.results import Shards
from tailfin.evaluation.truth import GroundTruth, encode_mask, has_mask
from tailfin.parsing import boxes_array, column, load_typed, nearest_id, rows_of, with_text_counts

COMMON_LIMITS = (100, 300, 500, 1000)  # per-image limits that detectors are often run with


@dataclass(frozen=True)
class Detections:
    """N detections in file order; rows point into the ground truth's images and categories."""

    label: str  # how messages name the source
    image_rows: np.ndarray  # int64 [N]
    category_rows: np.ndarray  # int64 [N]
    scores: np.ndarray  # float64 [N]
    boxes: np.ndarray | None  # float64 [N, 4] xywh in pixels; None: the source has masks alone
    masks: list[Any] | None  # N masks (JSON text, or RLE), where the source has them for all
    entries: np.ndarray  # int64 [N]: place in the source, for messages

    def __len__(self) -> int:
        return len(self.scores)

    def select(self, keep: np.ndarray) -> Detections:
        """The detections where `keep` (bool `[N]`, or positions) says so, in that order."""
        rows = np.flatnonzero(keep) if keep.dtype == bool else keep
        return replace(
            self,
            image_rows=self.image_rows[rows],
            category_rows=self.category_rows[rows],
            scores=self.scores[rows],
            boxes=None if self.boxes is None else self.boxes[rows],
            masks=None if self.masks is None else [self.masks[row] for row in rows],
            entries=self.entries[rows],
        )


def load_detections(source: Any, truth: GroundTruth, iou_type: str) -> Detections:
    """Read the results for one IoU type.

    `source` is a results JSON, a list of its entries, a folder of shards or of `results.<iou>.json`, or a mapping
    from "bbox" and "segm" to any of these. Unknown ids, missing keys, scores that are not finite and bad boxes raise
    `UserError` with the entry's position.
    """
    if isinstance(source, Mapping):
        if iou_type not in source:
            raise UserError(
                f'results: there are none for "{iou_type}" (given: {", ".join(map(str, source)) or "none"})'
            )
        source = source[iou_type]
    if isinstance(source, (str, os.PathLike)) and Path(source).is_dir():
        file = Path(source) / f"results.{iou_type}.json"
        if not file.is_file():
            return _from_shards(Shards.open(source), truth, iou_type)
        source = file
    if not isinstance(source, (str, os.PathLike, list, tuple)):
        raise UserError(f"results: a path or a list of entries is needed, not a {type(source).__name__}")
    readable = source if isinstance(source, (str, os.PathLike)) else with_text_counts(source)
    entries, label = load_typed(readable, list[Entry], "results", by_keys=entries_of)
    return _from_entries(entries, label, truth, iou_type)


def with_geometry(detections: Detections, truth: GroundTruth, iou_type: str) -> tuple[Detections, np.ndarray]:
    """RLE masks where they are needed, boxes always, and the area float64 `[N]` that decides the size range.

    The area is that of the box where the source has boxes, also for masks, else that of the mask.
    """
    if iou_type == "bbox" and detections.boxes is not None:
        return detections, detections.boxes[:, 2] * detections.boxes[:, 3]
    rles = _encoded(detections, truth)
    if detections.boxes is not None:
        area = detections.boxes[:, 2] * detections.boxes[:, 3]
        return replace(detections, masks=rles), area
    area = np.asarray(mask_utils.area(rles), np.float64) if rles else np.empty(0)
    boxes = np.asarray(mask_utils.toBbox(rles), np.float64).reshape(-1, 4) if rles else np.empty((0, 4))
    return replace(detections, masks=rles, boxes=boxes), area


def in_form(detections: Detections, truth: GroundTruth, form: str | None) -> Detections:
    """The detections with their boxes read as `form` (a key of `box_forms.FORMS`).

    None reads [x, y, width, height], and raises `UserError` where the boxes are surely of another form.
    """
    if detections.boxes is None:
        return detections
    sizes = truth.image_sizes[detections.image_rows][:, ::-1].astype(np.float64)
    if form is None:
        check_boxes(detections.boxes, sizes, detections.label, "--box-form {form} (box_form= in Python) reads them")
        return detections
    boxes = to_xywh(detections.boxes, form, sizes)
    bad = np.flatnonzero((boxes[:, 2:] < 0).any(1))
    if bad.size:
        entry = detections.entries[bad[0]]
        raise UserError(f"{detections.label}: entry {entry}: bbox is not {FORMS[form]}: its size would be negative")
    return replace(detections, boxes=boxes)


def check_boxes(boxes: np.ndarray, sizes: np.ndarray, label: str, remedy: str) -> None:
    """Raise `UserError` where boxes [N, 4] are surely of another form, and warn where they may be.

    `sizes` [N, 2] is (width, height), 0 where unknown; `remedy` says what to do, with `{form}` in it.
    """
    found = guess(boxes, sizes)
    if found is None:
        return
    if found.sure:
        raise UserError(
            f"{label}: {found.reason}: they look like {FORMS[found.form]}, and [x, y, width, height] in pixels is "
            f"needed ({remedy.format(form=found.form)})"
        )
    warnings.warn(f"{label}: {found.question}", UserWarning, stacklevel=3)


def best_per_image(detections: Detections, limit: int) -> Detections:
    """The `limit` best scores of every image, over all classes."""
    return _best(detections, detections.image_rows, limit)


def best_per_category(detections: Detections, limit: int) -> Detections:
    """The `limit` best scores of every category, over all images (the cut of AP-fixed)."""
    return _best(detections, detections.category_rows, limit)


def warn_if_cut_per_image(detections: Detections) -> None:
    """Warn when many images hold exactly the largest number of detections, as after a per-image limit.

    AP-fixed measures each class by its best detections over the whole set; a detector that was run with a per-image
    limit has thrown some of these away before.
    """
    counts = np.unique(detections.image_rows, return_counts=True)[1]
    if not counts.size:
        return
    top = int(counts.max())
    full = int((counts == top).sum())
    if (top in COMMON_LIMITS and full >= 2) or (top >= 20 and full >= max(3, 0.1 * len(counts))):
        warnings.warn(
            f"{full} of {len(counts)} images have exactly {top} detections: the results look cut per image, and "
            'protocol "lvis-fixed" wants none cut; run the detector with no limit (--max-dets -1)',
            UserWarning,
            stacklevel=4,  # the caller of evaluate
        )


def _from_entries(entries: Sequence[Entry], label: str, truth: GroundTruth, iou_type: str) -> Detections:
    found = list(map(attrgetter("bbox"), entries))
    boxed = len(found) - found.count(None)
    if iou_type == "bbox" and 0 < boxed < len(entries):
        raise UserError(f"{label}: entry {found.index(None)} has no bbox, which iou type bbox needs")
    masks = None
    if iou_type == "segm" or not boxed:  # boxes can be taken from masks where no entry has one
        masks = list(map(attrgetter("segmentation"), entries))
        bare = next((row for row, raw in enumerate(masks) if not has_mask(raw)), None)
        if bare is not None:
            key = "bbox" if iou_type == "bbox" else "segmentation"
            raise UserError(f"{label}: entry {bare} has no {key}, which iou type {iou_type} needs")
    boxes = boxes_array(found, label, "entry {}".format) if boxed == len(entries) else None
    return _finite(
        label,
        *entry_rows(entries, label, truth),
        column(entries, attrgetter("score"), np.float64, label),
        boxes,
        masks,
    )


def _from_shards(shards: Shards, truth: GroundTruth, iou_type: str) -> Detections:
    images, categories, scores, boxes, masks = shards.columns()
    if iou_type == "segm" and masks is None:
        raise UserError(f"{shards.label}: these detections have no masks, which iou type segm needs")
    if iou_type == "segm":  # size ranges follow the mask, as they do for results.segm.json, which has no boxes
        return _located(truth, shards.label, images, categories, scores, None, masks)
    return _located(truth, shards.label, images, categories, scores, boxes, None)


def _located(
    truth: GroundTruth,
    label: str,
    image_ids: np.ndarray,
    category_ids: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray | None,
    masks: list[Any] | None,
) -> Detections:
    rows = []
    for key, ids, known in (
        ("image_id", image_ids, truth.image_ids),
        ("category_id", category_ids, truth.category_ids),
    ):
        found, unknown = rows_of(ids, known)
        if unknown is not None:
            number = int(ids[unknown])
            raise UserError(
                f"{label}: entry {unknown}: {key} {number} is not in {truth.label}{nearest_id(number, known)}"
            )
        rows.append(found)
    return _finite(label, rows[0], rows[1], scores, boxes, masks)


def _finite(
    label: str,
    image_rows: np.ndarray,
    category_rows: np.ndarray,
    scores: np.ndarray,
    boxes: np.ndarray | None,
    masks: list[Any] | None,
) -> Detections:
    if not np.isfinite(scores).all():
        raise UserError(f"{label}: entry {np.flatnonzero(~np.isfinite(scores))[0]}: score is not a finite number")
    return Detections(label, image_rows, category_rows, scores, boxes, masks, np.arange(len(scores)))


def _best(detections: Detections, groups: np.ndarray, limit: int) -> Detections:
    """The `limit` best scores of every group, equal scores in file order."""
    if not len(detections) or np.bincount(groups).max() <= limit:
        return detections
    order = np.lexsort((-detections.scores, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    rank = np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
    return detections.select(np.sort(order[rank < limit]))


def _encoded(detections: Detections, truth: GroundTruth) -> list[dict[str, Any]]:
    """Compressed RLE of every detection; a mask of another size than its image is a `UserError`."""
    rles: list[dict[str, Any]] = []
    sizes: Sequence[Sequence[int]] = truth.image_sizes[detections.image_rows].tolist()
    for row, (mask, (height, width)) in enumerate(zip(detections.masks or [], sizes, strict=True)):
        plain = msgspec.json.decode(mask) if isinstance(mask, msgspec.Raw) else mask
        try:
            rle = encode_mask(plain, height, width)
        except ValueError as error:
            raise UserError(f"{detections.label}: entry {detections.entries[row]}: segmentation is {error}") from None
        if height and width and list(rle["size"]) != [height, width]:
            raise UserError(
                f"{detections.label}: entry {detections.entries[row]}: the mask is {list(rle['size'])}, its image "
                f"{[height, width]} (height, width)"
            )
        rles.append(rle)
    return rles
