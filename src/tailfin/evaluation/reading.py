"""One reading of annotations and detections, and what overlaps what, shared by everything that looks at mistakes.

    found = reading("val.json", "results.bbox.json")
    error_types(found), confusion(found), tide(found)        # the files are read and the boxes compared once

Every function that takes annotations and results takes a `Reading` in their place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailfin.errors import UserError
from tailfin.evaluation.detections import Detections, load_detections, with_geometry
from tailfin.evaluation.overlaps import crowd_share, mask_overlap, near_boxes, pairs
from tailfin.evaluation.truth import GroundTruth, load_truth

IOU = 0.5  # from here on a detection is on the object, where precision and recall are counted
LEAST = 0.1  # pairs with a smaller IoU are not kept
IoUType = Literal["bbox", "segm"]


class Near(NamedTuple):
    """Pairs of a detection and an object of its image, by detection, then annotation id; IoU `LEAST` at least."""

    detections: NDArray[np.int64]  # [P] row of the detection
    objects: NDArray[np.int64]  # [P] row of the object
    iou: NDArray[np.float64]  # [P]

    def where(self, keep: NDArray[np.bool_]) -> Near:
        """The pairs marked by `keep` (bool [P])."""
        return Near(self.detections[keep], self.objects[keep], self.iou[keep])


@dataclass(frozen=True)
class Reading:
    """Annotations and detections, read once."""

    truth: GroundTruth
    detections: Detections  # with boxes, and with masks where the overlap is that of masks
    area: NDArray[np.float64]  # [D] that decides the size range
    iou_type: IoUType

    @cached_property
    def evidence(self) -> NDArray[np.bool_]:
        """bool [G]: objects that count, neither iscrowd nor ignore."""
        return ~(self.truth.crowd | self.truth.ignore)

    @cached_property
    def judged(self) -> NDArray[np.bool_]:
        """bool [D]: the image shows the class (crowds too), lists it as absent, or is exhaustively annotated."""
        truth, classes = self.truth, len(self.truth.category_ids)
        known = np.union1d(truth.image_rows * classes + truth.category_rows, truth.negative_pairs)
        own = self.detections.image_rows * classes + self.detections.category_rows
        return truth.exhaustive[self.detections.image_rows] | np.isin(own, known)

    @cached_property
    def near(self) -> Near:
        """Of all detections and all objects."""
        return self._near(np.arange(len(self.detections)))

    @cached_property
    def counted(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Rows of the detections that count for precision, and which of them are right (IoU 0.5, each object once).

        Crowds and ignored objects are no examples, and detections on them, or of classes that an LVIS picture has not
        been judged for, count neither way.
        """
        truth, found = self.truth, self.detections
        near = self.near
        same = found.category_rows[near.detections] == truth.category_rows[near.objects]
        near = near.where(same & (near.iou >= IOU))
        rank = np.empty(len(found), dtype=np.int64)
        rank[np.argsort(-found.scores, kind="stable")] = np.arange(len(found))
        hit = assign(near.where(self.evidence[near.objects]), rank) >= 0
        dropped = np.zeros(len(found), dtype=bool)
        dropped[near.detections[truth.ignore[near.objects] & ~truth.crowd[near.objects]]] = True
        for part in crowd_share(truth, found, self.iou_type):
            inside = (part.iou >= IOU) & (found.category_rows[part.detections] == truth.category_rows[part.objects])
            dropped[part.detections[inside]] = True
        rows = np.flatnonzero(self.judged & (hit | ~dropped))
        return rows, hit[rows]

    def near_of(self, rows: NDArray[np.int64]) -> Near:
        """Of the detections `rows` alone; masks of others are not compared."""
        if self.iou_type == "segm" and "near" not in self.__dict__:
            return self._near(np.sort(rows))
        wanted = np.zeros(len(self.detections), dtype=bool)
        wanted[rows] = True
        return self.near.where(wanted[self.near.detections])

    def _near(self, rows: NDArray[np.int64]) -> Near:
        if self.iou_type == "bbox":
            return Near(*near_boxes(self.truth, self.detections, LEAST))
        every = np.ones(len(self.truth.annotation_ids), dtype=bool)
        overlap = mask_overlap(self.truth, every, self.detections)
        parts = []
        for part in pairs(self.truth, every, self.detections, rows, overlap):
            keep = part.iou >= LEAST
            parts.append((part.detections[keep], part.objects[keep], part.iou[keep]))
        if not parts:
            return Near(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0))
        return Near(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def reading(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | GroundTruth | Reading,
    results: Any = None,
    iou_type: IoUType = "bbox",
) -> Reading:
    """Annotations and results, as of `evaluate`, read for the overlap of boxes or of masks; a `Reading` as it is.

    Annotations that were read already (`load_truth`) are not read again.
    """
    if isinstance(annotations, Reading):
        if results is not None:
            raise UserError("a reading has its results: give either files or a reading")
        return annotations
    if results is None:
        raise UserError("no results are given")
    truth = annotations if isinstance(annotations, GroundTruth) else load_truth(annotations)
    detections, area = with_geometry(load_detections(results, truth, iou_type), truth, iou_type)
    return Reading(truth, detections, area, iou_type)


def assign(near: Near, rank: NDArray[np.int64], *, last: bool = False) -> NDArray[np.int64]:
    """The object that each detection takes: in order of rank, its free one of the largest IoU.

    Args:
        near: pairs that may be joined.
        rank: int64 [D], place of every detection, all different; the lowest chooses first.
        last: of equal IoU the last pair is taken, not the first.

    Returns:
        int64 [D], row of the object, -1 for none.
    """
    taken = np.full(len(rank), -1, dtype=np.int64)
    if not len(near.iou):
        return taken
    place = np.arange(len(near.iou))
    order = np.lexsort((-place if last else place, -near.iou, rank[near.detections]))
    objects = near.objects[order]
    first = np.flatnonzero(np.diff(rank[near.detections[order]], prepend=-1))  # of each detection, by rank
    owners, ends = near.detections[order[first]], np.append(first[1:], len(order))
    count, at = len(first), first.copy()
    holder = np.full(int(objects.max()) + 1, count)
    # Each detection asks for its best object, each object keeps the one of lowest rank, the others ask for their next:
    # the outcome is that of choosing one after another, since all objects prefer by the same rank.
    asking = np.arange(count)
    while len(asking):
        wanted = objects[at[asking]]
        before = np.unique(holder[wanted])
        before = before[before < count]
        np.minimum.at(holder, wanted, asking)
        refused = asking[holder[wanted] != asking]
        gone = before[holder[objects[at[before]]] != before]
        asking = np.concatenate([refused, gone])
        at[asking] += 1
        asking = asking[at[asking] < ends[asking]]
    held = np.flatnonzero(holder < count)
    taken[owners[holder[held]]] = held
    return taken
