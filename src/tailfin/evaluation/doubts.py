"""Annotations worth a second look: confident detections of nothing, of another class, and objects that no run finds.

    found = doubts(["a/results.bbox.json", "b/results.bbox.json"], "val.json")
    write_json("look.json", found.coco())       # opens in a label tool: the boxes in question, their kind and score

A detection is in question where the image was judged for its class and it is on no object (IoU below 0.5 with all), or
on an object of another class that no run finds as its own. An object is in question where no detection of its class
overlaps it by 0.5. Most are mistakes of the detector; the ranking puts first what several runs say, with high scores.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.evaluation.overlaps import box_iou, crowd_share
from tailfin.evaluation.reading import IOU, Reading, reading
from tailfin.evaluation.truth import GroundTruth, load_truth

KEPT = 400  # detections of nothing per run
LOWEST = 0.3  # score of a detection in question
SEEN = 0.05  # from this score on an object counts as found
KINDS = {"unlabelled": "not annotated", "other class": "annotated as another class", "unfound": "no run finds it"}


@dataclass(frozen=True)
class Doubt:
    """What one run says."""

    seen: NDArray[np.bool_]  # [G] found as its own class
    other_score: NDArray[np.float64]  # [G] best score of another class on it, 0: none
    other_class: NDArray[np.int64]  # [G] that class's row
    images: NDArray[np.int64]  # [K] of confident detections on no object, best first
    classes: NDArray[np.int64]  # [K]
    scores: NDArray[np.float64]  # [K]
    boxes: NDArray[np.float64]  # [K, 4] xywh


@dataclass(frozen=True)
class Case:
    """One box to look at."""

    kind: str  # a key of `KINDS`
    image_id: int
    category_id: int  # that the runs see, or of the object that they do not find
    box: tuple[float, float, float, float]  # xywh
    score: float  # mean over the runs that say so; of an unfound object the share of its class that is found
    runs: int  # that say so
    annotation_id: int  # in question, -1 where there is none
    annotated_as: int  # category id of that annotation, -1


@dataclass(frozen=True)
class Doubts:
    """Cases by kind, the most doubtful first."""

    truth: GroundTruth
    cases: dict[str, list[Case]]

    def coco(self) -> dict[str, Any]:
        """A COCO document: the pictures with cases, a box per case, its kind and score as further fields."""
        listed = [case for cases in self.cases.values() for case in cases]
        rows = np.searchsorted(self.truth.image_ids, sorted({case.image_id for case in listed})).tolist()
        return {
            "images": [
                {
                    "id": int(self.truth.image_ids[row]),
                    "file_name": self.truth.image_names[row] or "",
                    "height": int(self.truth.image_sizes[row][0]),
                    "width": int(self.truth.image_sizes[row][1]),
                }
                for row in rows
            ],
            "categories": [{"id": own.id, "name": own.name or str(own.id)} for own in self.truth.categories],
            "annotations": [
                {
                    "id": number,
                    "image_id": case.image_id,
                    "category_id": case.category_id,
                    "bbox": [round(value, 2) for value in case.box],
                    "area": round(case.box[2] * case.box[3], 2),
                    "iscrowd": 0,
                    "kind": case.kind,
                    "score": round(case.score, 4),
                    "runs": case.runs,
                    "annotation_id": case.annotation_id if case.annotation_id >= 0 else None,
                }
                for number, case in enumerate(listed, 1)
            ],
        }


def doubts(results: Any, annotations: str | os.PathLike[str] | Mapping[str, Any], *, limit: int = 100) -> Doubts:
    """Cases of one or several results (a list of them) on one annotation file, at most `limit` of each kind."""
    several = isinstance(results, list | tuple) and not any(isinstance(own, Mapping) for own in results)
    truth = load_truth(annotations)
    said = [doubt(reading(truth, own)) for own in (results if several and results else [results])]
    return ranked(truth, said, limit=limit)


def doubt(found: Reading) -> Doubt:
    """What one run says about the annotations."""
    truth, detections = found.truth, found.detections
    assert detections.boxes is not None
    near = found.near
    near = near.where(near.iou >= IOU)
    same = detections.category_rows[near.detections] == truth.category_rows[near.objects]
    seen = np.zeros(len(truth.annotation_ids), dtype=bool)
    seen[near.objects[same & (detections.scores[near.detections] >= SEEN)]] = True
    wrong = near.where(~same & found.judged[near.detections])
    other_score, other_class = np.zeros(len(seen)), np.full(len(seen), -1, dtype=np.int64)
    best = np.lexsort((-detections.scores[wrong.detections], wrong.objects))
    objects, first = np.unique(wrong.objects[best], return_index=True)
    chosen = wrong.detections[best[first]]
    other_score[objects], other_class[objects] = detections.scores[chosen], detections.category_rows[chosen]

    lone = found.judged & (detections.scores >= LOWEST)
    lone[near.detections] = False
    for part in crowd_share(truth, detections, found.iou_type):
        lone[part.detections[part.iou >= IOU]] = False
    rows = np.flatnonzero(lone)
    rows = rows[np.argsort(-detections.scores[rows], kind="stable")][:KEPT]
    return Doubt(
        seen=seen,
        other_score=other_score,
        other_class=other_class,
        images=detections.image_rows[rows],
        classes=detections.category_rows[rows],
        scores=detections.scores[rows],
        boxes=detections.boxes[rows],
    )


def ranked(truth: GroundTruth, said: Sequence[Doubt], *, limit: int = 100) -> Doubts:
    """The most doubtful cases of each kind, over what all runs say."""
    return Doubts(
        truth,
        {
            "unlabelled": _unlabelled(truth, said)[:limit],
            "other class": _other_class(truth, said, limit),
            "unfound": _unfound(truth, said, limit),
        },
    )


# ---- details ---------------------------------------------------------------------------------------------------------


def _unlabelled(truth: GroundTruth, said: Sequence[Doubt]) -> list[Case]:
    """Detections of nothing; those of several runs on one place are one case."""
    runs = np.repeat(np.arange(len(said)), [len(own.scores) for own in said])
    if not len(runs):
        return []
    images, classes, scores = (
        np.concatenate([getattr(own, name) for own in said]) for name in ("images", "classes", "scores")
    )
    boxes = np.concatenate([own.boxes for own in said])
    order = np.argsort(-scores, kind="stable")
    taken = np.zeros(len(order), dtype=bool)
    cases = []
    for row in order.tolist():  # at most `KEPT` per run
        if taken[row]:
            continue
        alike = np.flatnonzero((images == images[row]) & (classes == classes[row]) & ~taken)
        alike = alike[box_iou(np.repeat(boxes[row][None], len(alike), axis=0), boxes[alike]) >= IOU]
        taken[alike] = taken[row] = True
        best = [float(scores[alike[runs[alike] == run]].max()) for run in np.unique(runs[alike])] or [
            float(scores[row])
        ]
        cases.append(
            Case(
                kind="unlabelled",
                image_id=int(truth.image_ids[images[row]]),
                category_id=int(truth.category_ids[classes[row]]),
                box=_box(boxes[row]),
                score=float(np.mean(best)),
                runs=len(best),
                annotation_id=-1,
                annotated_as=-1,
            )
        )
    return sorted(cases, key=lambda case: -case.score * case.runs)


def _other_class(truth: GroundTruth, said: Sequence[Doubt], limit: int) -> list[Case]:
    """Objects that no run finds as their own class and that runs take for one other class."""
    open_ = ~np.any([own.seen for own in said], axis=0) & ~(truth.crowd | truth.ignore)
    scores = np.array([own.other_score for own in said])
    classes = np.array([own.other_class for own in said])
    best = scores.argmax(axis=0)
    label = classes[best, np.arange(len(best))]
    agree = (classes == label) & (scores >= LOWEST)
    number = agree.sum(axis=0)
    strength = np.where(open_ & (label >= 0), (scores * agree).sum(axis=0), 0.0)
    rows = np.argsort(-strength, kind="stable")[:limit]
    return [
        Case(
            kind="other class",
            image_id=int(truth.image_ids[truth.image_rows[row]]),
            category_id=int(truth.category_ids[label[row]]),
            box=_box(truth.boxes[row]),
            score=float(strength[row] / number[row]),
            runs=int(number[row]),
            annotation_id=int(truth.annotation_ids[row]),
            annotated_as=int(truth.category_ids[truth.category_rows[row]]),
        )
        for row in rows.tolist()
        if strength[row] > 0
    ]


def _unfound(truth: GroundTruth, said: Sequence[Doubt], limit: int) -> list[Case]:
    """Objects on which no run has anything, those of classes that are found otherwise first, large ones first."""
    evidence = ~(truth.crowd | truth.ignore)
    seen = np.any([own.seen for own in said], axis=0)
    touched = np.any([own.other_score >= LOWEST for own in said], axis=0)
    number, hits = (
        np.bincount(truth.category_rows[rows], minlength=len(truth.category_ids))
        for rows in (evidence, evidence & seen)
    )
    share = np.divide(hits, number, out=np.zeros(len(number)), where=number > 0)[truth.category_rows]
    rows = np.flatnonzero(evidence & ~seen & ~touched)
    rows = rows[np.lexsort((-truth.area[rows], -share[rows].round(1)))][:limit]
    return [
        Case(
            kind="unfound",
            image_id=int(truth.image_ids[truth.image_rows[row]]),
            category_id=int(truth.category_ids[truth.category_rows[row]]),
            box=_box(truth.boxes[row]),
            score=float(share[row]),
            runs=len(said),
            annotation_id=int(truth.annotation_ids[row]),
            annotated_as=int(truth.category_ids[truth.category_rows[row]]),
        )
        for row in rows.tolist()
    ]


def _box(values: NDArray[np.float64]) -> tuple[float, float, float, float]:
    x, y, width, height = (float(value) for value in values)
    return x, y, width, height
