"""Detections matched to objects at ten IoU thresholds, kept, so that AP can be worked out again for other weights.

    found = matches(reading("val.json", "results.bbox.json"), "lvis")
    average_precision(found)                      # float64 [10, C], as the protocol's AP per class
    average_precision(found, weights)             # with image i counted weights[i] times

The matching is that of the protocols (`tailfin.evaluation.curves`), objects of all sizes; the numbers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailfin.errors import UserError
from tailfin.evaluation.overlaps import crowd_share
from tailfin.evaluation.reading import Reading, assign

THRESHOLDS = np.linspace(0.5, 0.95, 10)
RECALLS = np.linspace(0.0, 1.0, 101)
LIMITS = {"lvis": 300, "lvis-fixed": -1, "coco": 100, "groups": 100}  # per image; coco: per image and class


@dataclass(frozen=True)
class Matches:
    """D detections that count, class by class and best first, and G objects."""

    images: int
    category_ids: NDArray[np.int64]  # [C]
    rows: NDArray[np.int64]  # [D] in the reading
    image_rows: NDArray[np.int64]  # [D]
    category_rows: NDArray[np.int64]  # [D]
    scores: NDArray[np.float64]  # [D]
    hit: NDArray[np.bool_]  # [10, D] right at each IoU threshold
    ignored: NDArray[np.bool_]  # [10, D] counts neither way
    object_images: NDArray[np.int64]  # [G]
    object_categories: NDArray[np.int64]  # [G]

    @cached_property
    def objects(self) -> NDArray[np.int64]:
        """int64 [C]."""
        return np.bincount(self.object_categories, minlength=len(self.category_ids))

    @cached_property
    def hits(self) -> _Hits:
        """The right detections by threshold, class and score."""
        level, column = np.nonzero(self.hit & ~self.ignored)
        category = self.category_rows[column]
        begin = np.searchsorted(self.category_rows, np.arange(len(self.category_ids)))[category]
        aside, places = np.nonzero(self.ignored)
        width = self.hit.shape[1] + 1
        keys = aside * width + places
        segment = level * len(self.category_ids) + category
        starts = np.flatnonzero(np.diff(segment, prepend=-1))
        return _Hits(
            column=column,
            begin=begin,
            segment=segment,
            category=category,
            starts=starts,
            sizes=np.diff(starts, append=len(segment)),
            aside=places,
            aside_begin=np.searchsorted(keys, level * width + begin),
            aside_end=np.searchsorted(keys, level * width + column + 1),
        )


class _Hits(NamedTuple):
    """Right detections, P of all thresholds in a row; S rows of a threshold and class follow one another."""

    column: NDArray[np.int64]  # [P] which detection
    begin: NDArray[np.int64]  # [P] first detection of its class
    segment: NDArray[np.int64]  # [P] threshold * C + class
    category: NDArray[np.int64]  # [P]
    starts: NDArray[np.int64]  # [S]
    sizes: NDArray[np.int64]  # [S]
    aside: NDArray[np.int64]  # [Q] detections that count neither way, by threshold
    aside_begin: NDArray[np.int64]  # [P] into these, of the class
    aside_end: NDArray[np.int64]  # [P] up to the detection


def matches(found: Reading, protocol: str = "lvis", max_dets: int | None = None) -> Matches:
    """Match as a protocol does.

    Args:
        found: what is matched.
        protocol: "lvis", "lvis-fixed" (the best 10,000 of each class), "coco" or "groups" (as coco).
        max_dets: detections per image (lvis, over all classes) or per image and class (coco); -1 = no limit.
    """
    if protocol not in LIMITS:
        raise UserError(f'protocol "{protocol}" does not exist (choices: {", ".join(LIMITS)})')
    truth, detections = found.truth, found.detections
    classes, lvis = len(truth.category_ids), protocol.startswith("lvis")
    order = np.lexsort((detections.image_rows, -detections.scores))  # ties: image, then input order
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    keep = np.ones(len(detections), dtype=bool)
    limit = LIMITS[protocol] if max_dets is None else max_dets
    pair = detections.image_rows * classes + detections.category_rows
    if protocol == "lvis-fixed":
        keep = _best(detections.category_rows, rank, 10_000)
    elif limit >= 0:
        keep = _best(detections.image_rows if lvis else pair, rank, limit)
    counted = np.ones(len(truth.area), dtype=bool)
    aside = truth.crowd
    unfinished = np.zeros(len(detections), dtype=bool)  # classes of the image that are not annotated throughout
    if lvis:
        counted, aside = truth.area > 0, truth.ignore
        own = truth.image_rows[counted] * classes + truth.category_rows[counted]
        keep &= truth.exhaustive[detections.image_rows] | np.isin(pair, np.union1d(own, truth.negative_pairs))
        keep &= found.area > 0
        unfinished = np.isin(pair, truth.partial_pairs)
    near = found.near
    same = detections.category_rows[near.detections] == truth.category_rows[near.objects]
    near = near.where(same & keep[near.detections] & counted[near.objects] & (near.iou >= THRESHOLDS[0]))
    plain, other = near.where(~aside[near.objects]), near.where(aside[near.objects])
    covered = np.zeros(len(detections)) if lvis else _covered(found)
    hit = np.zeros((len(THRESHOLDS), len(detections)), dtype=bool)
    ignored = np.zeros_like(hit)
    for level, threshold in enumerate(THRESHOLDS):
        hit[level] = assign(plain.where(plain.iou >= threshold), rank, last=True) >= 0
        if lvis:
            free = (other.iou >= threshold) & ~hit[level][other.detections]
            ignored[level] = assign(other.where(free), rank, last=True) >= 0
            ignored[level] |= ~hit[level] & unfinished
        else:
            ignored[level] = ~hit[level] & (covered >= threshold)
    rows = np.flatnonzero(keep)
    rows = rows[np.lexsort((rank[rows], detections.category_rows[rows]))]
    objects = np.flatnonzero(counted & ~aside)
    return Matches(
        images=len(truth.image_ids),
        category_ids=truth.category_ids,
        rows=rows,
        image_rows=detections.image_rows[rows],
        category_rows=detections.category_rows[rows],
        scores=detections.scores[rows],
        hit=hit[:, rows],
        ignored=ignored[:, rows],
        object_images=truth.image_rows[objects],
        object_categories=truth.category_rows[objects],
    )


def average_precision(found: Matches, weights: NDArray[np.float64] | None = None) -> NDArray[np.float64]:
    """AP of each class at each IoU threshold, float64 [10, C]; NaN where no object has a weight.

    `weights` float64 [I] says how often each image counts, as a bootstrap draws them.
    """
    classes, levels = len(found.category_ids), len(THRESHOLDS)
    weights = np.ones(found.images) if weights is None else weights
    number = np.bincount(found.object_categories, weights[found.object_images], minlength=classes)
    own, hits = weights[found.image_rows], found.hits
    right = own[hits.column]
    before = np.concatenate([[0.0], np.cumsum(own)])
    every = before[hits.column + 1] - before[hits.begin]
    if len(hits.aside):
        before = np.concatenate([[0.0], np.cumsum(own[hits.aside])])
        every -= before[hits.aside_end] - before[hits.aside_begin]
    total = np.cumsum(right)
    total -= np.repeat(total[hits.starts] - right[hits.starts], hits.sizes)
    precision = np.divide(total, every, out=np.zeros_like(total), where=every > 0)
    positives = number[hits.category]
    recall = np.divide(total, positives, out=np.zeros_like(total), where=positives > 0)
    # the largest precision at this recall or a larger one, within the class and threshold
    place = np.repeat(np.arange(len(hits.starts)), hits.sizes)
    best = np.maximum.accumulate((precision - 2.0 * place)[::-1])[::-1] + 2.0 * place
    reached = np.searchsorted(RECALLS, recall, side="right").astype(np.float64)  # points of the 101 up to here
    step = np.diff(reached, prepend=0.0)
    step[hits.starts] = reached[hits.starts]
    result = np.bincount(hits.segment, best * step, minlength=levels * classes).reshape(levels, classes) / len(RECALLS)
    result[:, number <= 0] = np.nan
    return result


def _best(groups: NDArray[np.int64], rank: NDArray[np.int64], limit: int) -> NDArray[np.bool_]:
    """bool [D]: among the `limit` of lowest rank of its group."""
    order = np.lexsort((rank, groups))
    starts = np.flatnonzero(np.diff(groups[order], prepend=-1))
    place = np.arange(len(groups)) - np.repeat(starts, np.diff(starts, append=len(groups)))
    keep = np.zeros(len(groups), dtype=bool)
    keep[order[place < limit]] = True
    return keep


def _covered(found: Reading) -> NDArray[np.float64]:
    """float64 [D]: the largest share of a detection in a crowd of its class; objects of a crowd take any number."""
    truth, detections = found.truth, found.detections
    covered = np.zeros(len(detections))
    for part in crowd_share(truth, detections, found.iou_type):
        same = detections.category_rows[part.detections] == truth.category_rows[part.objects]
        np.maximum.at(covered, part.detections[same], part.iou[same])
    return covered
