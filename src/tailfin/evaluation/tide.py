"""What each kind of mistake costs: TIDE's dAP (Bolya et al., ECCV'20), over all classes, per group and per class.

    found = tide("val.json", "results.bbox.json")
    found["main"]["Cls"]                         # AP50 points gained if every wrong class were right
    found["groups"]["r"]["main"]["Cls"]          # of the rare classes

One mistake is mended at a time, the others stay: the gains do not add up. In order of precedence, at IoU 0.5 and 0.1::

    Loc   right class, IoU 0.1 to 0.5         Cls    another class's object, IoU 0.5 or more
    Dupe  right class, the object is taken    Bkg    no object overlaps by more than 0.1
    Both  the rest                            Miss   an object that no mended Loc or Cls would find

Mending Loc or Cls makes the best-scored of an object's detections right and drops the others; Dupe, Bkg and Both are
dropped; Miss takes the object out of the count. FalsePos drops every wrong detection, FalseNeg every object not found.
Numbers are those of tidecv 1.0.1, in points of 100: a loss counts as 0, detections are cut per image first, and by its
LVIS rules a class which nobody judged in an image, or not throughout, is ignored there where it is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from tailfin.errors import UserError, nearest
from tailfin.evaluation.groups import TrainCounts, as_train_counts, frequencies
from tailfin.evaluation.overlaps import crowd_share
from tailfin.evaluation.reading import LEAST, IoUType, Near, Reading, assign, reading
from tailfin.stats import GROUPS

MAIN = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
SPECIAL = ("FalsePos", "FalseNeg")
HIT, BACKGROUND = 0.5, LEAST
LIMITS = {"coco": 100, "lvis": 300}  # detections per image
POINTS = np.array([place / 100 for place in range(101)])

Rules = Literal["coco", "lvis"]


def tide(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | Reading,
    results: Any = None,
    rules: Rules = "lvis",
    *,
    iou_type: IoUType = "bbox",
    max_dets: int | None = None,
    group_bounds: Sequence[int] | None = None,
    train_counts: TrainCounts | Mapping[int, int] | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """dAP of every kind of mistake.

    Args:
        annotations, results, group_bounds, train_counts: as of `error_types`.
        rules: "lvis" (300 detections per image; crowds are objects) or "coco" (100; crowds are ignored).
        max_dets: detections per image instead; -1 = no limit.

    Returns:
        "AP50", "main", "special" (points by kind of mistake) and "counts" over every class, one without objects
        counting 0; "groups": "AP50", "main", "special" for "all", "r", "c" and "f" over classes with objects;
        "category_ids" int64 [C]; "per_category": float64 [C] for "AP50" and each kind, NaN without objects;
        "per_category_counts": int64 [C] by kind, of the predicted class, and of the object's for Miss.
    """
    if rules not in get_args(Rules):
        raise UserError(f'rules "{rules}" do not exist{nearest(rules, get_args(Rules))}')
    found = reading(annotations, results, iou_type)
    letters = frequencies(found.truth.categories, group_bounds, as_train_counts(train_counts))
    case = _sort_out(found, rules, LIMITS[rules] if max_dets is None else max_dets)
    classes = len(found.truth.category_ids)
    base = case.base
    mended = {kind: case.mended(kind) for kind in (*MAIN, *SPECIAL)}
    gains = {kind: np.nan_to_num(own) - np.nan_to_num(base) for kind, own in mended.items()}
    annotated = case.objects > 0

    def summary(rows: NDArray[np.bool_], *, every: bool = False) -> dict[str, Any]:
        before = _mean(base[rows])
        if every:  # a class that has nothing left once a mistake is mended is out of the mean
            means = {kind: _mean(own[rows]) - before for kind, own in mended.items()}
        else:
            means = {kind: _mean(own[rows]) for kind, own in gains.items()}
        capped = {kind: max(mean, 0.0) if np.isfinite(mean) else mean for kind, mean in means.items()}
        main, special = ({kind: capped[kind] for kind in kinds} for kinds in (MAIN, SPECIAL))
        return {"AP50": before, "main": main, "special": special}

    members = {"all": annotated}
    members |= {group: annotated & np.array([letter == group for letter in letters], dtype=bool) for group in GROUPS}
    counts = {kind: case.count(kind) for kind in MAIN}
    return {
        **summary(np.ones(classes, dtype=bool), every=True),
        "counts": {kind: int(number.sum()) for kind, number in counts.items()},
        "groups": {group: summary(rows) for group, rows in members.items()},
        "category_ids": found.truth.category_ids,
        "per_category": {
            kind: np.where(annotated, np.maximum(own, 0), np.nan) for kind, own in {"AP50": base, **gains}.items()
        },
        "per_category_counts": counts,
    }


# ---- details ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Case:
    """D detections class by class, best first (ties: image, then input order), and what is wrong with each."""

    labels: NDArray[np.int64]  # [D]
    rank: NDArray[np.int64]  # [D] by image, then score, then input order
    places: NDArray[np.int64]  # [D] of the score among all different ones, 0 the best
    right: NDArray[np.bool_]  # [D]
    ignored: NDArray[np.bool_]  # [D] wrong, but counts neither way
    kind: NDArray[np.int64]  # [D] place in MAIN, -1 where right
    mends: NDArray[np.int64]  # [D] class for which a mended Cls or Loc is right, -1: it is dropped
    objects: NDArray[np.int64]  # [C]
    unfound: NDArray[np.int64]  # [C] objects without a detection
    missed: NDArray[np.int64]  # [C] of these, those that no mended detection would find

    def count(self, kind: str) -> NDArray[np.int64]:
        if kind == "Miss":
            return self.missed
        return np.bincount(self.labels[self.kind == MAIN.index(kind)], minlength=len(self.objects))

    @cached_property
    def base(self) -> NDArray[np.float64]:
        """AP with nothing mended."""
        return self.average_precision()

    def mended(self, kind: str) -> NDArray[np.float64]:
        if kind == "Miss":
            return self.average_precision(objects=self.objects - self.missed)
        if kind == "FalseNeg":
            return self.average_precision(objects=self.objects - self.unfound)
        if kind == "FalsePos":
            own = self.average_precision(dropped=~self.right)
            return np.where(np.isnan(self.base), np.nan, np.nan_to_num(own))  # last, but not gone
        own = self.kind == MAIN.index(kind)
        good = own & (self.mends >= 0)
        return self.average_precision(dropped=own & ~good, made_right=good)

    def average_precision(
        self,
        dropped: NDArray[np.bool_] | None = None,
        made_right: NDArray[np.bool_] | None = None,
        objects: NDArray[np.int64] | None = None,
    ) -> NDArray[np.float64]:
        """AP of each class in points of 100, float64 [C]; 0 without objects, NaN without detections as well."""
        nothing = np.zeros(len(self.labels), dtype=bool)
        dropped = nothing if dropped is None else dropped
        made_right = nothing if made_right is None else made_right
        changed = dropped.any() or made_right.any() or objects is not None
        number = self.objects if objects is None else objects
        labels = np.where(made_right, self.mends, self.labels)
        rows = np.flatnonzero((~self.ignored | made_right) & ~dropped)
        if changed:  # of equal scores the wrong detections come first once anything is mended, as in tidecv
            number_of_scores = int(self.places.max(initial=0)) + 1
            keys = 2 * (labels[rows] * number_of_scores + self.places[rows]) + self.right[rows]
            moved = bool((labels[rows] != self.labels[rows]).any())
            # nearly in order already, which makes it fast
            rows = rows[np.lexsort((self.rank[rows], keys)) if moved else np.argsort(keys, kind="stable")]
        labels, good = labels[rows], (self.right | made_right)[rows]
        starts = np.flatnonzero(np.diff(labels, prepend=-1))
        sizes = np.diff(starts, append=len(labels))
        total = np.cumsum(good, dtype=np.int64)
        total -= np.repeat(total[starts] - good[starts], sizes)
        place = np.arange(len(labels)) - np.repeat(starts, sizes) + 1
        positives = number[labels]
        recall = np.divide(total, positives, out=np.zeros(len(labels)), where=positives > 0)
        segment = np.repeat(np.arange(len(starts)), sizes)
        best = np.maximum.accumulate((total / place - 2.0 * segment)[::-1])[::-1] + 2.0 * segment
        reached = np.searchsorted(POINTS, recall, side="right").astype(np.float64)
        step = np.diff(reached, prepend=0.0)
        step[starts] = reached[starts]
        result = 100 * np.bincount(labels, best * step, minlength=len(number)) / len(POINTS)
        empty = (number <= 0) & (np.bincount(labels, minlength=len(number)) == 0)
        return np.where(empty, np.nan, np.where(number > 0, result, 0.0))


def _sort_out(found: Reading, rules: Rules, limit: int) -> _Case:
    truth, detections = found.truth, found.detections
    classes = len(truth.category_ids)
    # images in the order of the file, which decides between equal scores; then input order
    order = np.lexsort((-detections.scores, truth.image_places[detections.image_rows]))
    images = detections.image_rows[order]
    if limit >= 0:
        starts = np.flatnonzero(np.diff(images, prepend=-1))
        place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        order = order[place < limit]
    rank = np.full(len(detections), -1, dtype=np.int64)
    rank[order] = np.arange(len(order))
    labels, scores = detections.category_rows[order], detections.scores[order]
    counted = ~truth.crowd if rules == "coco" else np.ones(len(truth.annotation_ids), dtype=bool)

    near = found.near
    near = near.where((rank[near.detections] >= 0) & counted[near.objects])
    near = Near(rank[near.detections], near.objects, near.iou)
    by_rank = np.lexsort((near.objects, near.detections))
    near = Near(near.detections[by_rank], near.objects[by_rank], near.iou[by_rank])
    same = labels[near.detections] == truth.category_rows[near.objects]
    target = assign(near.where(same & (near.iou >= HIT)), np.arange(len(order)))
    right = target >= 0
    used = np.zeros(len(truth.annotation_ids), dtype=bool)
    used[target[right]] = True

    own, own_object = _largest(near, same, len(order))
    other, other_object = _largest(near, ~same, len(order))
    any_near = np.maximum(own, other)
    kinds = ("Loc", "Cls", "Dupe", "Bkg")
    tests = [(own >= BACKGROUND) & (own <= HIT), other >= HIT, own >= HIT, any_near <= BACKGROUND]
    kind = np.select(tests, [MAIN.index(name) for name in kinds], MAIN.index("Both"))
    kind[right] = -1
    about = np.select([kind == MAIN.index("Loc"), kind == MAIN.index("Cls")], [own_object, other_object], -1)
    about[(about >= 0) & used[about]] = -1
    mends = np.full(len(order), -1, dtype=np.int64)
    reachable, first = np.unique(about, return_index=True)  # of an object's detections the best one of its image
    first, reachable = first[reachable >= 0], reachable[reachable >= 0]
    mends[first] = truth.category_rows[reachable]

    missed = counted & ~used
    unfound = np.bincount(truth.category_rows[missed], minlength=classes)
    missed[reachable] = False
    _, places = np.unique(-scores, return_inverse=True)
    by_class = np.argsort(labels * (int(places.max(initial=0)) + 1) + places, kind="stable")
    return _Case(
        labels=labels[by_class],
        rank=by_class,
        places=places[by_class],
        right=right[by_class],
        ignored=(~right & _set_aside(found, rules)[order])[by_class],
        kind=kind[by_class],
        mends=mends[by_class],
        objects=np.bincount(truth.category_rows[counted], minlength=classes),
        unfound=unfound,
        missed=np.bincount(truth.category_rows[missed], minlength=classes),
    )


def _mean(values: NDArray[np.float64]) -> float:
    """Of those that are defined; NaN where none is."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan")


def _largest(near: Near, keep: NDArray[np.bool_], number: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Per detection the largest IoU among the pairs kept (0: none), and its first object (-1)."""
    near = near.where(keep)
    iou, objects = np.zeros(number), np.full(number, -1, dtype=np.int64)
    order = np.lexsort((-near.iou, near.detections))  # stable: the first object on a tie
    owner, first = np.unique(near.detections[order], return_index=True)
    iou[owner], objects[owner] = near.iou[order[first]], near.objects[order[first]]
    return iou, objects


def _set_aside(found: Reading, rules: Rules) -> NDArray[np.bool_]:
    """bool [D]: where wrong, the detection counts neither way."""
    truth, detections = found.truth, found.detections
    if rules == "lvis":
        pair = detections.image_rows * len(truth.category_ids) + detections.category_rows
        return ~found.judged | np.isin(pair, truth.partial_pairs)
    aside = np.zeros(len(detections), dtype=bool)
    for part in crowd_share(truth, detections, found.iou_type):
        own = detections.category_rows[part.detections] == truth.category_rows[part.objects]
        aside[part.detections[own & (part.iou > HIT)]] = True
    return aside
