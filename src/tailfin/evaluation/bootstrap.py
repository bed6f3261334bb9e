"""Is the difference of two runs more than the choice of pictures? A paired bootstrap over images.

    found = paired_bootstrap("base/results.bbox.json", "bacl/results.bbox.json", "val.json")
    found["metrics"]["APr"]         # {"difference": ..., "low": ..., "high": ..., "beyond": ..., "a": [.], "b": [.]}

Images are drawn with replacement, the same ones for both sides, and AP is worked out anew from detections that were
matched once. Several results of one side are seeds of one recipe: their mean is compared. The interval is over images
alone; how far seeds differ is said by the values in "a" and "b".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.errors import UserError
from tailfin.evaluation.groups import TrainCounts, as_train_counts, frequencies
from tailfin.evaluation.matches import Matches, average_precision, matches
from tailfin.evaluation.reading import Reading, reading
from tailfin.evaluation.truth import load_truth
from tailfin.stats import GROUPS

DRAWS = 1000
LEVEL = 0.95


def paired_bootstrap(
    results_a: Any,
    results_b: Any,
    annotations: str | os.PathLike[str] | Mapping[str, Any] | None = None,
    *,
    protocol: str = "lvis",
    iou_type: str = "bbox",
    max_dets: int | None = None,
    draws: int = DRAWS,
    level: float = LEVEL,
    seed: int = 0,
    group_bounds: Sequence[int] | None = None,
    train_counts: TrainCounts | Mapping[int, int] | str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Differences b - a of AP, with intervals over images.

    Args:
        results_a, results_b: results as of `evaluate`, or a `Reading`, or a list of these: seeds of one recipe.
        annotations: as of `evaluate`; not needed where all results are readings.
        protocol: "lvis", "lvis-fixed", "coco" or "groups".
        max_dets, group_bounds, train_counts: as of `evaluate`.
        draws: how often images are drawn.
        level: share of the draws that the interval holds, the same share cut off at both ends.
        seed: of the draws.

    Returns:
        "images", "draws", "level"; "metrics": by name (AP, AP50, AP75, APr, APc, APf) "a" and "b", one value per
        results, "difference" of their means, "low", "high", and "beyond": the interval does not hold 0;
        "per_category": the same of each class's AP with its "id" and "name" (a class without objects has none). A
        draw without an object of a class leaves the class out.
    """
    readings = [_readings(own, annotations, iou_type) for own in (results_a, results_b)]
    first = readings[0][0].truth
    for other in (own.truth for side in readings for own in side):
        if not np.array_equal(other.image_ids, first.image_ids) or not np.array_equal(
            other.category_ids, first.category_ids
        ):
            raise UserError(f"{other.label} and {first.label} have other images or classes: nothing can be compared")
    if draws < 1 or not 0 < level < 1:
        raise UserError(f"draws is {draws}, level {level}: at least 1 draw and a level between 0 and 1 are needed")
    letters = frequencies(first.categories, group_bounds, as_train_counts(train_counts))
    a, b = ([matches(own, protocol, max_dets) for own in side] for side in readings)
    values, drawn = compare(a, b, letters, draws=draws, seed=seed)
    rows = [_row(values[0][:, k], values[1][:, k], drawn[:, k], level) for k in range(drawn.shape[1])]
    names = metric_names()
    return {
        "images": a[0].images,
        "draws": draws,
        "level": level,
        "metrics": {name: row for name, row in zip(names, rows, strict=False) if row is not None},
        "per_category": [
            {"id": category.id, "name": category.name or str(category.id), **row}
            for category, row in zip(first.categories, rows[len(names) :], strict=True)
            if row is not None
        ],
    }


def metric_names() -> list[str]:
    """Of the first columns of `compare`."""
    return ["AP", "AP50", "AP75", *(f"AP{letter}" for letter in GROUPS)]


def compare(
    a: Sequence[Matches], b: Sequence[Matches], groups: Sequence[str | None], *, draws: int = DRAWS, seed: int = 0
) -> tuple[list[NDArray[np.float64]], NDArray[np.float64]]:
    """Numbers of both sides (float64 [runs, 6 + C] each) and differences b - a of the drawn ones ([draws, 6 + C]).

    The columns are `metric_names()`, then the classes' AP; NaN where there is none.
    """
    members = np.array([[letter == group for letter in groups] for group in GROUPS], dtype=bool)
    values = [np.array([_numbers(own, members) for own in side]) for side in (a, b)]
    rng = np.random.default_rng([seed, 17])
    images = a[0].images
    drawn = np.empty((draws, values[0].shape[1]))
    for draw in range(draws):
        weights = rng.multinomial(images, np.full(images, 1 / images)).astype(np.float64) if images else np.empty(0)
        left, right = (np.mean([_numbers(own, members, weights) for own in side], axis=0) for side in (a, b))
        drawn[draw] = right - left
    return values, drawn


# ---- details ---------------------------------------------------------------------------------------------------------


def _readings(source: Any, annotations: Any, iou_type: str) -> list[Reading]:
    several = isinstance(source, list | tuple) and source and not _entry(source[0])
    sources = list(source) if several else [source]
    given = [own for own in sources if not isinstance(own, Reading)]
    if given and annotations is None:
        raise UserError("results need annotations")
    truth = load_truth(annotations) if len(given) == len(sources) else None  # read once for all seeds
    if truth is None:
        return [own if isinstance(own, Reading) else reading(annotations, own, iou_type) for own in sources]  # type: ignore[arg-type]
    return [reading(truth, own, iou_type) for own in sources]  # type: ignore[arg-type]


def _entry(value: Any) -> bool:
    """Whether a value is a line of results, not results by IoU type."""
    return isinstance(value, Mapping) and "image_id" in value


def _numbers(
    found: Matches, members: NDArray[np.bool_], weights: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    table = average_precision(found, weights)
    own = table.mean(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # the mean of no class is NaN
        means = [np.nanmean(own), np.nanmean(table[0]), np.nanmean(table[5])]
        means += [np.nanmean(own[chosen]) for chosen in members]
    return np.concatenate([means, own])


def _row(
    a: NDArray[np.float64], b: NDArray[np.float64], drawn: NDArray[np.float64], level: float
) -> dict[str, Any] | None:
    drawn = drawn[np.isfinite(drawn)]
    if not (np.isfinite(a).all() and np.isfinite(b).all() and len(drawn)):
        return None
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2]).tolist()
    return {
        "a": a.tolist(),
        "b": b.tolist(),
        "difference": float(b.mean() - a.mean()),
        "low": low,
        "high": high,
        "beyond": bool(low > 0 or high < 0),
    }
