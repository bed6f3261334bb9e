"""A run's detections against the file that it was measured on: what the report works out beyond `metrics.json`.

Read once per state of the files: a live page is made anew every few seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tailfin.errors import UserError
from tailfin.evaluation.confusion import confusion
from tailfin.evaluation.error_types import error_types
from tailfin.evaluation.groups import TrainCounts
from tailfin.report.page import defined
from tailfin.report.runs import Run
from tailfin.schema.recipe import Recipe

MIN_SCORE = 0.05  # of the detections that objects are taken for: below it nobody looks


def annotations_file(recipe: Recipe | None, name: str) -> Path:
    """The annotation file that a run is measured on; none is a `UserError`."""
    if recipe is None:
        raise UserError(f"the recipe of {name} does not say which file was evaluated")
    if not recipe.data.val.annotations:
        raise UserError(f"the recipe of {name} names no file to evaluate (data.val.annotations)")
    return Path(recipe.data.root) / recipe.data.val.annotations


def errors_of(run: Run) -> dict[str, Any]:
    """`error_types` of a run, with the frequency groups that its numbers have."""
    counts = [
        (int(entry["id"]), int(entry["image_count"])) for entry in run.categories if defined(entry.get("image_count"))
    ]
    bounds = None if run.recipe is None else run.recipe.evaluation.group_bounds
    return _errors(_states(run), tuple(counts), bounds)


def confusion_of(run: Run) -> dict[str, Any]:
    """`confusion` of a run."""
    return _confusion(_states(run))


def each(runs: Sequence[Run], work: Callable[[Run], dict[str, Any]]) -> tuple[list[tuple[int, dict[str, Any]]], str]:
    """(number of the run, what `work` finds) for those with detections, and what hindered the others, in words."""
    found, notes = [], []
    for number, run in enumerate(runs):
        if run.results.is_file():
            try:
                found.append((number, work(run)))
            except UserError as error:
                notes.append(f"{run.name}: {error}.")
    return found, " ".join(notes)


# ---- details ---------------------------------------------------------------------------------------------------------

_States = tuple[tuple[Path, int, int], ...]


def _states(run: Run) -> _States:
    files = (annotations_file(run.recipe, run.name), run.results)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is not there any more")
    return tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@functools.lru_cache(maxsize=8)
def _errors(states: _States, counts: tuple[tuple[int, int], ...], bounds: tuple[int, ...] | None) -> dict[str, Any]:
    known = TrainCounts(dict(counts)) if counts else None
    return error_types(states[0][0], states[1][0], group_bounds=bounds if known else None, train_counts=known)


@functools.lru_cache(maxsize=8)
def _confusion(states: _States) -> dict[str, Any]:
    return confusion(states[0][0], states[1][0], min_score=MIN_SCORE)
