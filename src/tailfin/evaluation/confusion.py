"""What a detector takes each object for: its own class, another one, or nothing.

An object goes to the detection of the highest score that overlaps it by more than 0.5, whatever its class; several
objects may go to one detection. So the row of a class says how many of its objects are found, which class swallows
most of the others, and how many are missed::

    found = confusion("val.json", "results.bbox.json")
    found["taken_for"]        # per class the other classes, most frequent first: [(category id, objects), ...]
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from tailfin.evaluation.reading import Reading, reading

HIT = 0.5  # a larger IoU is on the object


def confusion(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | Reading, results: Any = None, *, min_score: float = 0.0
) -> dict[str, Any]:
    """The classes that objects are taken for, by boxes; objects marked iscrowd or ignore are left out.

    Args:
        annotations, results: as of `evaluate`, or a `Reading` in their place.
        min_score: detections with a lower score are not looked at.

    Returns:
        "category_ids" int64 [C], ascending; "num_gt", "found", "missed" int64 [C], objects of each class, those taken
        for it and those without a detection; "taken_for": a list [C] of (category id, objects), the other classes, the
        most frequent first (on a tie the lower id).

    Raises:
        UserError: unreadable input.
    """
    source = reading(annotations, results)
    truth, detections, evidence = source.truth, source.detections, source.evidence
    classes = len(truth.category_ids)
    near = source.near
    near = near.where((near.iou > HIT) & evidence[near.objects] & (detections.scores[near.detections] >= min_score))
    best = np.lexsort((near.detections, -detections.scores[near.detections], near.objects))  # then in input order
    objects, first = np.unique(near.objects[best], return_index=True)
    taken = np.full(len(truth.category_rows), -1, dtype=np.int64)  # category row that each object is taken for
    taken[objects] = detections.category_rows[near.detections[best[first]]]
    labels = truth.category_rows[evidence]
    found = np.bincount(labels[taken[evidence] == labels], minlength=classes)
    missed = np.bincount(labels[taken[evidence] < 0], minlength=classes)
    wrong = (taken[evidence] >= 0) & (taken[evidence] != labels)
    cells, counts = np.unique(labels[wrong] * classes + taken[evidence][wrong], return_counts=True)
    order = np.lexsort((cells, -counts, cells // max(classes, 1)))
    taken_for: list[list[tuple[int, int]]] = [[] for _ in range(classes)]
    for cell, number in zip(cells[order].tolist(), counts[order].tolist(), strict=True):  # pairs that were confused
        taken_for[cell // classes].append((int(truth.category_ids[cell % classes]), number))
    return {
        "category_ids": truth.category_ids,
        "num_gt": np.bincount(labels, minlength=classes),
        "found": found,
        "missed": missed,
        "taken_for": taken_for,
    }
