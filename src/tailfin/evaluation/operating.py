"""Operating points: from which score on a class's detections are acted on, for a wanted precision, recall or best F1.

    points = operating_points("val.json", "results.bbox.json", Aim.of("precision=0.9"))
    points.thresholds["bolt"]

A detection counts where it is the best free one on an object of its class, IoU 0.5 at least. The threshold of a class
is found on its own detections and drawn to that of all classes together, in logits, with the weight K / (n + K): of a
class with n = K = 10 objects it is half its own. How sure the numbers are is said by intervals that hold 90 % of what a
bootstrap over pictures gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from tailfin.errors import UserError, nearest
from tailfin.evaluation.detections import Detections
from tailfin.evaluation.reading import Reading, reading

PRIOR = 10  # objects that the threshold of all classes counts as
DRAWS = 200  # of the bootstrap
EDGE = 1e-6  # thresholds lie between this and 1 - this
AIMS = ("f1", "precision", "recall")


@dataclass(frozen=True)
class Aim:
    """What a threshold is for: the best F1, or the most recall at a precision, or the most precision at a recall."""

    name: str
    value: float | None = None

    @classmethod
    def of(cls, text: str) -> Aim:
        """ "f1", "precision=0.9" or "recall=0.8"."""
        name, _, value = text.strip().partition("=")
        if name not in AIMS:
            raise UserError(f'--thresholds: there is no aim "{name}"{nearest(name, AIMS)}')
        if name == "f1":
            if value:
                raise UserError("--thresholds f1 has no value: the best F1 is looked for")
            return cls(name)
        try:
            wanted = float(value)
        except ValueError:
            wanted = -1.0
        if not 0 < wanted <= 1:
            raise UserError(f"--thresholds {text}: a number above 0 and up to 1 is needed, for example {name}=0.9")
        return cls(name, wanted)

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value:g}"


@dataclass(frozen=True)
class Point:
    """The threshold of a class, and what it gives on the pictures that it was found on."""

    threshold: float
    examples: int  # objects of the class in these pictures
    own: float  # 0..1: how much of the threshold is the class's own
    precision: float  # -1 where nothing is detected
    recall: float  # -1 where there is no object
    f1: float
    low: float  # 90 % interval of the number that the aim is about; 0 and 1 without examples
    high: float
    reached: bool  # whether the class's own detections reach the aim at any threshold


@dataclass(frozen=True)
class OperatingPoints:
    """Points by class name."""

    aim: str
    points: dict[str, Point]

    @property
    def thresholds(self) -> dict[str, float]:
        """Threshold by class name; a detection counts from it on."""
        return {name: point.threshold for name, point in self.points.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a model file; `from_dict` turns them back."""
        return {"aim": self.aim, "classes": {name: asdict(point) for name, point in self.points.items()}}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> OperatingPoints:
        """What `to_dict` wrote; anything else is a `UserError`."""
        try:
            points = {name: Point(**own) for name, own in values["classes"].items()}
            if not all(0 <= float(point.threshold) <= 1 for point in points.values()):
                raise ValueError("a threshold is not in 0..1")
            return cls(str(values["aim"]), points)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise UserError(f"the operating points of the model are damaged: {error}") from None


def operating_points(
    annotations: str | PathLike[str] | Mapping[str, Any] | Reading, results: Any = None, aim: Aim | None = None
) -> OperatingPoints:
    """Thresholds of all classes of an annotation file, from detections on its pictures.

    `annotations` and `results` are those of `evaluate`, or a `Reading` in their place; the aim is the best F1 by
    default. What counts is said by `Reading.counted`.
    """
    aim = aim or Aim("f1")
    source = reading(annotations, results)
    truth, counted = source.truth, source.evidence
    rows, hit = source.counted
    found = source.detections.select(rows)
    classes = len(truth.categories)
    pairs = truth.image_rows[counted], truth.category_rows[counted]
    examples = np.bincount(pairs[1], minlength=classes)
    order = np.lexsort((-found.scores, found.category_rows))
    scores, hits, labels = found.scores[order], hit[order], found.category_rows[order]
    starts = np.searchsorted(labels, np.arange(classes + 1))
    everything = np.argsort(-found.scores, kind="stable")
    pooled, _ = threshold_for(found.scores[everything], hit[everything], int(examples.sum()), aim)
    own, reached = np.full(classes, pooled), np.zeros(classes, dtype=bool)
    for row in np.flatnonzero(examples):  # a few operations on sorted columns per class
        part = slice(starts[row], starts[row + 1])
        own[row], reached[row] = threshold_for(scores[part], hits[part], int(examples[row]), aim)
    weight = examples / (examples + PRIOR)
    logit = weight * _logit(own) + (1 - weight) * _logit(np.full(classes, pooled))
    thresholds = 1 / (1 + np.exp(-logit))
    kept = found.scores >= thresholds[found.category_rows]
    totals = _totals(found, hit, kept, pairs, (len(truth.image_ids), classes))
    values = _values(*(total.sum(axis=0) for total in totals))
    low, high = _interval(totals, aim)
    names = [category.name or str(category.id) for category in truth.categories]
    return OperatingPoints(
        str(aim),
        {
            name: Point(
                threshold=round(float(thresholds[row]), 6),
                examples=int(examples[row]),
                own=round(float(weight[row]), 3),
                precision=round(float(values["precision"][row]), 4),
                recall=round(float(values["recall"][row]), 4),
                f1=round(float(values["f1"][row]), 4),
                low=round(float(low[row]), 4) if examples[row] else 0.0,
                high=round(float(high[row]), 4) if examples[row] else 1.0,
                reached=bool(reached[row]),
            )
            for row, name in enumerate(names)
        },
    )


def threshold_for(scores: NDArray[Any], hits: NDArray[np.bool_], examples: int, aim: Aim) -> tuple[float, bool]:
    """(threshold, whether the aim is reached) of detections by descending score."""
    if not len(scores) or not examples:
        return 0.5, False
    last = np.append(scores[:-1] > scores[1:], True)  # a threshold parts no equal scores
    right = np.cumsum(hits)[last]
    number = np.flatnonzero(last) + 1
    precision, recall = right / number, right / examples
    if aim.name == "f1":
        place, reached = int(np.argmax(2 * right / (number + examples))), bool(right[-1] > 0)
    elif aim.name == "precision":
        good = np.flatnonzero(precision >= float(aim.value or 0))
        reached = bool(len(good))
        place = int(good[-1]) if reached else int(np.argmax(precision))
    else:
        good = np.flatnonzero(recall >= float(aim.value or 0))
        reached = bool(len(good))
        place = int(good[0]) if reached else len(recall) - 1
    value = scores[last]
    below = value[place + 1] if place + 1 < len(value) else 0.0
    return float((value[place] + below) / 2), reached


# ---- details ---------------------------------------------------------------------------------------------------------


def _totals(
    found: Detections,
    hit: NDArray[np.bool_],
    kept: NDArray[np.bool_],
    pairs: tuple[NDArray[Any], NDArray[Any]],
    shape: tuple[int, int],
) -> tuple[sparse.csr_matrix, sparse.csr_matrix, sparse.csr_matrix]:
    """Right detections, all detections and objects, counted by picture and class."""
    rows = found.image_rows[kept], found.category_rows[kept]
    matrices = [(hit[kept].astype(float), rows), (np.ones(kept.sum()), rows), (np.ones(len(pairs[0])), pairs)]
    right, every, objects = (sparse.csr_matrix(entries, shape=shape) for entries in matrices)
    return right, every, objects


def _values(right: Any, every: Any, objects: Any) -> dict[str, NDArray[Any]]:
    """Precision, recall and F1; -1 where they are not defined."""
    right, every, objects = (np.asarray(own, dtype=float) for own in (right, every, objects))
    right, every, objects = (own[0] if own.ndim == 2 and len(own) == 1 else own for own in (right, every, objects))

    def share(one: NDArray[Any], of: NDArray[Any]) -> NDArray[Any]:
        return np.divide(one, of, out=np.full(of.shape, -1.0), where=of > 0)

    f1 = np.where(objects > 0, share(2 * right, every + objects), -1.0)
    return {"precision": share(right, every), "recall": share(right, objects), "f1": f1}


def _interval(totals: tuple[sparse.csr_matrix, ...], aim: Aim) -> tuple[NDArray[Any], NDArray[Any]]:
    """5th and 95th percentile [C] of the aim's number over pictures drawn with replacement (Poisson weights)."""
    weights = np.random.default_rng([0, 8]).poisson(1.0, (DRAWS, totals[0].shape[0])).astype(float)
    drawn = _values(*(total.T.dot(weights.T).T for total in totals))[aim.name]
    drawn = np.where(drawn < 0, np.nan, drawn)
    empty = np.isnan(drawn).all(axis=0)
    drawn[:, empty] = 0.0
    low, high = np.nanpercentile(drawn, [5, 95], axis=0)
    return np.where(empty, 0.0, low), np.where(empty, 1.0, high)


def _logit(values: NDArray[Any]) -> NDArray[Any]:
    clipped = values.clip(EDGE, 1 - EDGE)
    return np.log(clipped / (1 - clipped))
