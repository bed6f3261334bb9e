"""What a score is worth: precision against recall, what a cut at a score leaves, and whether 0.8 means 8 of 10.

    found = score_curves("val.json", "results.bbox.json")
    found["groups"]["r"]["cut"]["precision"][6]          # of the rare classes at score `SCORES[6]`

A detection is right as `Reading.counted` says: the best one on an object of its class, IoU 0.5. In a group the
detections of all its classes stand in one list, since one score cuts them all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.evaluation.groups import TrainCounts, as_train_counts, frequencies
from tailfin.evaluation.operating import Aim, threshold_for
from tailfin.evaluation.reading import Reading, reading
from tailfin.stats import GROUPS

SCORES = np.round(np.arange(0, 1, 0.05), 2)  # cuts
RECALLS = np.linspace(0, 1, 101)
BINS = 10  # of the reliability curve
AIMS = ("f1", "precision=0.5", "precision=0.9")


def score_curves(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | Reading,
    results: Any = None,
    *,
    group_bounds: Sequence[int] | None = None,
    train_counts: TrainCounts | Mapping[int, int] | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Curves over the scores of boxes.

    Args:
        annotations, results, group_bounds, train_counts: as of `error_types`.

    Returns:
        "scores" float64 [S], the cuts; "recalls" float64 [101]; "category_ids" int64 [C]; "classes": "precision"
        float32 [C, 101], the largest at each recall or a larger one, 0 beyond the last; "groups": for "all", "r", "c",
        "f": "precision" float64 [101]; "cut": "precision", "recall", "boxes" (per picture, all detections) and
        "wrong" (per picture, of those that count) float64 [S], NaN where not defined; "reliability": "score", "right"
        (NaN in empty bins) and "number" [10]; "error", the mean distance of score and share of right ones (ECE);
        "thresholds": by aim (`AIMS`) "score", "precision", "recall" and "reached".
    """
    source = reading(annotations, results)
    truth = source.truth
    letters = frequencies(truth.categories, group_bounds, as_train_counts(train_counts))
    classes, images = len(truth.category_ids), max(len(truth.image_ids), 1)
    rows, hit = source.counted
    scores, labels = source.detections.scores[rows], source.detections.category_rows[rows]
    objects = np.bincount(truth.category_rows[source.evidence], minlength=classes)
    order = np.lexsort((-scores, labels))
    members = {"all": np.ones(classes, dtype=bool)}
    members |= {group: np.array([own == group for own in letters], dtype=bool) for group in GROUPS}
    groups = {}
    for group, chosen in members.items():
        own = chosen[labels]
        every = source.detections.scores[chosen[source.detections.category_rows]]
        groups[group] = _group(scores[own], hit[own], int(objects[chosen].sum()), every, images)
    return {
        "scores": SCORES,
        "recalls": RECALLS,
        "category_ids": truth.category_ids,
        "objects": objects,
        "classes": {"precision": _precision(labels[order], hit[order], objects)},
        "groups": groups,
    }


# ---- details ---------------------------------------------------------------------------------------------------------


def _precision(labels: NDArray[np.int64], hit: NDArray[np.bool_], objects: NDArray[np.int64]) -> NDArray[np.float32]:
    """Precision at each of `RECALLS` [C, 101] of detections class by class, best first."""
    classes = len(objects)
    table = np.zeros((classes, len(RECALLS)), dtype=np.float32)
    starts = np.searchsorted(labels, np.arange(classes))
    right = np.flatnonzero(hit)
    own = labels[right]
    before = np.searchsorted(own, np.arange(classes))
    total = np.arange(len(right)) - before[own] + 1
    precision = total / (right - starts[own] + 1)
    recall = np.divide(total, objects[own], out=np.zeros(len(right)), where=objects[own] > 0)
    best = np.maximum.accumulate((precision - 2.0 * own)[::-1])[::-1] + 2.0 * own
    last = np.searchsorted(RECALLS, recall, side="right")  # points up to this recall
    first = np.where(total == 1, 0, np.concatenate([[0], last])[: len(last)])
    spans = last - first
    points = np.arange(spans.sum()) + np.repeat(first - (np.cumsum(spans) - spans), spans)
    table[np.repeat(own, spans), points] = np.repeat(best, spans)
    return table


def _group(
    scores: NDArray[np.float64], hit: NDArray[np.bool_], objects: int, every: NDArray[np.float64], images: int
) -> dict[str, Any]:
    order = np.argsort(-scores, kind="stable")
    scores, hit = scores[order], hit[order]
    number = np.searchsorted(-scores, -SCORES, side="right")
    total = np.concatenate([[0], np.cumsum(hit)])
    right = total[number]
    nothing = np.full(len(SCORES), np.nan)
    boxes = len(every) - np.searchsorted(np.sort(every), SCORES, side="left")
    cut = {
        "precision": np.divide(right, number, out=nothing.copy(), where=number > 0),
        "recall": right / objects if objects else nothing,
        "boxes": boxes / images,
        "wrong": (number - right) / images,
    }
    pooled = _precision(np.zeros(len(hit), dtype=np.int64), hit, np.array([objects]))[0].astype(np.float64)
    thresholds = {}
    for aim in AIMS:
        score, reached = threshold_for(scores, hit, objects, Aim.of(aim))
        kept = int(np.searchsorted(-scores, -score, side="right"))
        found = int(total[kept])
        thresholds[aim] = {
            "score": score,
            "precision": found / kept if kept else float("nan"),
            "recall": found / objects if objects else float("nan"),
            "reached": reached,
        }
    place = np.minimum((scores * BINS).astype(np.int64), BINS - 1).clip(0)
    size = np.bincount(place, minlength=BINS)
    mean, share = (
        np.divide(np.bincount(place, value, minlength=BINS), size, out=np.full(BINS, np.nan), where=size > 0)
        for value in (scores, hit.astype(np.float64))
    )
    gap = np.nansum(np.abs(mean - share) * size) / max(int(size.sum()), 1)
    return {
        "objects": objects,
        "precision": pooled,
        "cut": cut,
        "reliability": {"score": mean, "right": share, "number": size},
        "error": float(gap) if len(scores) else float("nan"),
        "thresholds": thresholds,
    }
