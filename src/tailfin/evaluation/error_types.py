"""What a detector's best predictions of each class get wrong: 2DRCL's five types (NeurIPS'24, 4.3 and A.1).

    correct          right class, IoU > 0.5              location   right class, 0.1 < IoU <= 0.5
    classification   wrong class, IoU > 0.5              other      wrong class, 0.1 < IoU <= 0.5
    background       no object overlaps by more than 0.1

The paper leaves the number of predictions per class, ties, precedence and duplicates open; the defaults here follow
Hoiem et al. (ECCV'12), from whom such diagrams come, and LVIS's federated rule::

    found = error_types("val.json", "results.bbox.json")
    dict(zip(found["types"], found["macro"]["r"]))       # shares of the five types, mean over rare classes
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tailfin.errors import UserError, nearest
from tailfin.evaluation.detections import Detections
from tailfin.evaluation.groups import TrainCounts, as_train_counts, frequencies
from tailfin.evaluation.reading import IoUType, Reading, reading
from tailfin.stats import GROUPS

TYPES = ("correct", "location", "background", "classification", "other")
CORRECT, LOCATION, BACKGROUND, CLASSIFICATION, OTHER = range(5)
NOT_BEST, UNJUDGED = -1, -2
HIT, TOUCH = 0.5, 0.1  # a larger IoU is a hit; one above the second is about an object

Precedence = Literal["same_class", "best_iou"]
Duplicates = Literal["literal", "location"]
Unjudged = Literal["drop", "all"]


def error_types(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | Reading,
    results: Any = None,
    top: int | Literal["per_class"] = "per_class",
    precedence: Precedence = "same_class",
    duplicates: Duplicates = "literal",
    unjudged: Unjudged = "drop",
    *,
    iou_type: IoUType = "bbox",
    group_bounds: Sequence[int] | None = None,
    train_counts: TrainCounts | Mapping[int, int] | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Types of the best predictions of each class, by boxes or by masks.

    Objects marked iscrowd or ignore are no evidence and do not count for N, but make their class judged in the image.

    Args:
        annotations, results, group_bounds, train_counts: as of `evaluate`, or a `Reading` in the place of the first
            two. Without the last two the groups are the categories' own `frequency`.
        top: predictions per class, the best scores over all images (ties: image id, then input order): the class's
            number of objects N, or one number for all classes.
        precedence: "same_class": overlap with an object of the predicted class above 0.1 decides; "best_iou": the
            object of largest IoU decides whether the class is right, on a tie one of the predicted class.
        duplicates: "literal" takes a second hit on an object for correct; "location" in the order of scores turns a hit
            whose best object (largest IoU, then lowest id) is taken into a location error.
        unjudged: "drop" leaves out predictions of classes that the image neither shows nor lists as absent, before the
            best are taken; "all" keeps them.
        iou_type: overlap of boxes, or "segm", of masks, which results and annotations then have.

    Returns:
        "types": the five names; "category_ids" int64 [C], ascending; "counts" int64 [C, 5]; "num_gt" int64 [C], N;
        "type_per_detection" int64 [D] in input order, -1 below the class's best, -2 unjudged; "macro" and "micro":
        float64 [5] for "all", "r", "c" and "f", shares of the types as the mean over classes that have predictions
        among the best (NaN where no class has) and of the pooled counts (0 where there are none).

    Raises:
        UserError: unreadable input, an unknown option.
    """
    for name, value, choices in (
        ("precedence", precedence, get_args(Precedence)),
        ("duplicates", duplicates, get_args(Duplicates)),
        ("unjudged", unjudged, get_args(Unjudged)),
        ("iou_type", iou_type, get_args(IoUType)),
    ):
        if value not in choices:
            raise UserError(f'{name} "{value}" does not exist{nearest(value, choices)}')
    if top != "per_class" and (not isinstance(top, Integral) or isinstance(top, bool) or top < 1):
        raise UserError(f'top must be a positive whole number or "per_class" (given: {top!r})')
    found = reading(annotations, results, iou_type)
    truth, detections, evidence = found.truth, found.detections, found.evidence
    frequency = frequencies(truth.categories, group_bounds, as_train_counts(train_counts))
    classes = len(truth.category_ids)

    num_gt = np.bincount(truth.category_rows[evidence], minlength=classes)
    types = np.full(len(detections), NOT_BEST, dtype=np.int64)
    if unjudged == "drop":
        types[~found.judged] = UNJUDGED
    best = _best(detections, np.flatnonzero(types != UNJUDGED), num_gt if top == "per_class" else int(top), classes)
    own, other, target = _overlaps(found, best)
    types[best] = _types(own, other, precedence)
    if duplicates == "location":
        hits = np.flatnonzero(types[best] == CORRECT)
        _, first = np.unique(target[hits], return_index=True)  # `best` is in the order of scores within each class
        again = np.ones(len(hits), dtype=bool)
        again[first] = False
        types[best[hits[again]]] = LOCATION

    flat = np.bincount(detections.category_rows[best] * 5 + types[best], minlength=classes * 5)
    counts = flat.reshape(classes, 5)
    members = {"all": np.ones(classes, dtype=bool)}
    members |= {group: np.array([letter == group for letter in frequency], dtype=bool) for group in GROUPS}
    return {
        "types": list(TYPES),
        "category_ids": truth.category_ids,
        "counts": counts,
        "num_gt": num_gt,
        "type_per_detection": types,
        "macro": {group: _macro(counts[rows]) for group, rows in members.items()},
        "micro": {group: _micro(counts[rows]) for group, rows in members.items()},
    }


def _best(
    detections: Detections, rows: NDArray[np.int64], limit: int | NDArray[np.int64], classes: int
) -> NDArray[np.int64]:
    """The `limit` best of `rows` in each class, class by class, best first."""
    labels = detections.category_rows[rows]
    order = np.lexsort((detections.image_rows[rows], -detections.scores[rows], labels))  # stable: input order last
    rows, labels = rows[order], labels[order]
    starts = np.searchsorted(labels, np.arange(classes))
    rank = np.arange(len(rows)) - starts[labels]
    return rows[rank < np.broadcast_to(limit, classes)[labels]]


def _overlaps(
    found: Reading, rows: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Of each of `rows`: largest IoU with its own class and with another one, and its object (own class, -1: none).

    An IoU below 0.1 is none: no type depends on it.
    """
    truth, detections = found.truth, found.detections
    near = found.near_of(rows)
    near = near.where(found.evidence[near.objects])
    own, other = np.zeros(len(detections)), np.zeros(len(detections))
    target = np.full(len(detections), -1, dtype=np.int64)
    if len(near.iou):
        same = detections.category_rows[near.detections] == truth.category_rows[near.objects]
        starts = np.flatnonzero(np.diff(near.detections, prepend=-1))
        owner = near.detections[starts]
        own[owner] = np.maximum.reduceat(np.where(same, near.iou, 0.0), starts)
        other[owner] = np.maximum.reduceat(np.where(same, 0.0, near.iou), starts)
        reached = np.flatnonzero(same & (near.iou == own[near.detections]))
        owner, lowest = np.unique(near.detections[reached], return_index=True)
        target[owner] = near.objects[reached[lowest]]
    return own[rows], other[rows], target[rows]


def _types(own: NDArray[np.float64], other: NDArray[np.float64], precedence: Precedence) -> NDArray[np.int64]:
    if precedence == "best_iou":
        own, other = np.where(own >= other, own, 0.0), np.where(own >= other, 0.0, other)
    return np.select(
        [own > HIT, own > TOUCH, other > HIT, other > TOUCH],
        [CORRECT, LOCATION, CLASSIFICATION, OTHER],
        BACKGROUND,
    )


def _macro(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    counts = counts[counts.sum(axis=1) > 0]
    if not len(counts):
        return np.full(5, np.nan)
    return np.asarray((counts / counts.sum(axis=1, keepdims=True)).mean(axis=0))


def _micro(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    return counts.sum(axis=0) / max(int(counts.sum()), 1)
