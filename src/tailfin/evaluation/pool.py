"""AP-pool (Dave et al., "Evaluating Large-Vocabulary Object Detectors"): one ranking of all classes.

    ap_pool("val.json", "results.bbox.json")         # {"AP-pool": ..., "AP-pool-r": ..., "-c", "-f"}

Detections of all classes of a group stand in one list by score, so that a class whose scores are too low or too high
costs here, where the mean of the classes' AP does not see it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.evaluation.groups import TrainCounts, as_train_counts, frequencies
from tailfin.evaluation.matches import RECALLS, Matches, matches
from tailfin.evaluation.reading import IoUType, Reading, reading
from tailfin.stats import GROUPS


def ap_pool(
    annotations: str | os.PathLike[str] | Mapping[str, Any] | Reading,
    results: Any = None,
    *,
    iou_type: IoUType = "bbox",
    group_bounds: Sequence[int] | None = None,
    train_counts: TrainCounts | Mapping[int, int] | str | os.PathLike[str] | None = None,
) -> dict[str, float]:
    """AP of the pooled detections of all classes and of each frequency group, 0..1, -1 without objects.

    Federated as `lvis-fixed`: no limit per image, the best 10,000 detections of each class. Arguments as of
    `error_types`.
    """
    found = reading(annotations, results, iou_type)
    letters = frequencies(found.truth.categories, group_bounds, as_train_counts(train_counts))
    matched = matches(found, "lvis-fixed")
    pools = {"AP-pool": np.ones(len(letters), dtype=bool)}
    pools |= {f"AP-pool-{group}": np.array([own == group for own in letters], dtype=bool) for group in GROUPS}
    return {name: _pooled(matched, rows) for name, rows in pools.items()}


def _pooled(found: Matches, classes: NDArray[np.bool_]) -> float:
    number = int(found.objects[classes].sum())
    if not number:
        return -1.0
    rows = np.flatnonzero(classes[found.category_rows])
    rows = rows[np.lexsort((found.category_rows[rows], found.image_rows[rows], -found.scores[rows]))]
    values = []
    for hit, ignored in zip(found.hit[:, rows], found.ignored[:, rows], strict=True):
        right = hit[~ignored]
        total = np.cumsum(right)
        precision = np.maximum.accumulate((total / np.arange(1, len(right) + 1))[::-1])[::-1]
        place = np.searchsorted(total / number, RECALLS, side="left")
        values.append(np.append(precision, 0.0)[place].mean())
    return float(np.mean(values))
