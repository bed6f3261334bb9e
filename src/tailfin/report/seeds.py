"""Runs of one recipe that differ by their seed alone, as one column, and how sure the difference of two columns is.

The interval holds 95 % of what a paired bootstrap over images gives (`tailfin.evaluation.bootstrap`): where it reaches
0 the difference may be the choice of pictures. The range of several seeds stands beside their mean.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tailfin.errors import UserError
from tailfin.evaluation.bootstrap import compare, metric_names
from tailfin.report.evaluated import Key, look_at, look_key
from tailfin.report.page import color, defined
from tailfin.report.runs import Run

LEVEL = 0.95
_WORK = 4e8  # detections times draws, about a quarter of a minute


@dataclass(frozen=True)
class Column:
    """Runs of one recipe."""

    name: str
    color: str
    runs: list[Run]

    @property
    def seeds(self) -> int:
        return len(self.runs)

    def values(self, kind: str, key: str) -> list[float]:
        """The metric of every run that has it."""
        found = [((run.metrics or {}).get(kind) or {}).get(key) for run in self.runs]
        return [value for value in found if defined(value)]

    def mean(self, kind: str, key: str) -> float | None:
        values = self.values(kind, key)
        return float(np.mean(values)) if values else None


class Interval(NamedTuple):
    """Of a difference; `beyond`: 0 is outside."""

    low: float
    high: float
    beyond: bool


@dataclass(frozen=True)
class Difference:
    """Intervals of a column's differences to the first one, of boxes."""

    metrics: dict[str, Interval]
    classes: dict[str, Interval]  # by name, of AP
    draws: int


def columns(runs: Sequence[Run]) -> list[Column]:
    """The runs by recipe, in the order of their first ones; of one seed twice, each is a column."""
    found: dict[tuple[str, int], list[int]] = {}
    times: Counter[tuple[str, int]] = Counter()  # how often a recipe came with a seed before
    for number, run in enumerate(runs):
        recipe, seed = _recipe(run) or f"run {number}", run.recipe.seed if run.recipe is not None else 0
        found.setdefault((recipe, times[recipe, seed]), []).append(number)
        times[recipe, seed] += 1
    names = [_name([runs[number] for number in own]) for own in found.values()]
    return [
        Column(name if names.count(name) == 1 else f"{name} ({place})", color(own[0]), [runs[n] for n in own])
        for place, (name, own) in enumerate(zip(names, found.values(), strict=True), 1)
    ]


def difference(first: Column, other: Column) -> Difference | None:
    """Intervals, or None where a run has no detections or the files differ."""
    try:
        sides = [tuple(look_key(run) for run in side.runs if run.metrics is not None) for side in (first, other)]
        if not all(sides) or not all(run.results.is_file() for side in (first, other) for run in side.runs):
            return None
        return _difference(sides[0], sides[1])
    except UserError:
        return None


# ---- details ---------------------------------------------------------------------------------------------------------


def _recipe(run: Run) -> str:
    """The recipe without its seed; nothing where it is not known or the run has no numbers yet."""
    if run.recipe is None or run.metrics is None:
        return ""
    values = run.recipe.model_dump(mode="json", exclude={"seed", "about"})
    return json.dumps([values, run.metrics.get("protocol")], sort_keys=True)


def _name(runs: Sequence[Run]) -> str:
    """The run's name; of several what their names begin with, else the recipe's name, with their number."""
    if len(runs) == 1:
        return runs[0].name
    shared = (
        os.path.commonprefix([run.name for run in runs]).rstrip("-_ /.0123456789").removesuffix("seed").rstrip("-_ /.")
    )
    name = shared or (runs[0].recipe.name if runs[0].recipe is not None else "")
    return f"{name}, {len(runs)} seeds".strip(", ")


@functools.lru_cache(maxsize=16)
def _difference(first: tuple[Key, ...], other: tuple[Key, ...]) -> Difference | None:
    looks = [[look_at(key) for key in side] for side in (first, other)]
    truth = looks[0][0].truth
    for own in (own.truth for side in looks for own in side):
        if (
            own.image_ids.tolist() != truth.image_ids.tolist()
            or own.category_ids.tolist() != truth.category_ids.tolist()
        ):
            return None
    sides = [[own.matches for own in side] for side in looks]
    total = sum(len(own.scores) for side in sides for own in side)
    draws = int(np.clip(_WORK / max(total, 1), 100, 1000))
    _, drawn = compare(sides[0], sides[1], looks[0][0].letters, draws=draws)
    found: list[Interval | None] = []
    for values in drawn.T:
        values = values[np.isfinite(values)]
        if not len(values):
            found.append(None)
            continue
        low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
        found.append(Interval(low, high, bool(low > 0 or high < 0)))
    names = metric_names()
    classes = [category.name or str(category.id) for category in truth.categories]
    return Difference(
        metrics={name: own for name, own in zip(names, found, strict=False) if own is not None},
        classes={name: own for name, own in zip(classes, found[len(names) :], strict=True) if own is not None},
        draws=draws,
    )


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, and lowest and highest of several."""
    return {"mean": float(np.mean(values)), "range": (min(values), max(values)) if len(values) > 1 else None}
