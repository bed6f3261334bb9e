"""A run's detections against the file that it was measured on: what the report works out beyond `metrics.json`.

Annotations and detections are read once and compared once for all sections, and again only when a file has changed: a
live page is made anew every few seconds.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tailfin.errors import UserError
from tailfin.evaluation.confusion import confusion
from tailfin.evaluation.doubts import Doubt, doubt
from tailfin.evaluation.error_types import error_types
from tailfin.evaluation.groups import TrainCounts, frequencies
from tailfin.evaluation.matches import LIMITS, Matches, matches
from tailfin.evaluation.operating import Aim, OperatingPoints, operating_points
from tailfin.evaluation.reading import reading
from tailfin.evaluation.scores import score_curves
from tailfin.evaluation.tide import tide
from tailfin.evaluation.truth import GroundTruth
from tailfin.report.page import defined
from tailfin.report.runs import Run
from tailfin.schema.recipe import Recipe

MIN_SCORE = 0.05  # of the detections that objects are taken for: below it nobody looks
AIMS = ("f1", "precision=0.9")  # of the thresholds per class


_States = tuple[tuple[Path, int, int], ...]
Key = tuple[_States, tuple[tuple[int, int], ...], "tuple[int, ...] | None", str]


@dataclass(frozen=True)
class Look:
    """What a run's detections say, class by class in the order of `truth.category_ids`."""

    truth: GroundTruth
    letters: list[str | None]  # frequency group of each class
    errors: dict[str, Any]  # of `error_types`
    confusion: dict[str, Any]
    tide: dict[str, Any]
    scores: dict[str, Any]  # of `score_curves`
    points: dict[str, OperatingPoints]  # by aim
    doubt: Doubt
    matches: Matches
    kept: Kept


@dataclass(frozen=True)
class Kept:
    """All detections as columns, image by image, best first; small, for pictures."""

    starts: NDArray[np.int64]  # [I + 1]
    labels: NDArray[np.int32]  # [D] category rows
    scores: NDArray[np.float32]  # [D]
    boxes: NDArray[np.float32]  # [D, 4] xyxy


def annotations_file(recipe: Recipe | None, name: str) -> Path:
    """The annotation file that a run is measured on; none is a `UserError`."""
    if recipe is None:
        raise UserError(f"the recipe of {name} does not say which file was evaluated")
    if not recipe.data.val.annotations:
        raise UserError(f"the recipe of {name} names no file to evaluate (data.val.annotations)")
    return Path(recipe.data.root) / recipe.data.val.annotations


def look(run: Run) -> Look:
    """What there is to see in a run's detections, with the frequency groups that its numbers have."""
    return look_at(look_key(run))


def look_at(key: Key) -> Look:
    """The same of what `look_key` gives."""
    return _look(*key)


def look_key(run: Run) -> Key:
    """What a look depends on: the files' state, training counts and bounds of the groups, the protocol."""
    counts = [
        (int(entry["id"]), int(entry["image_count"])) for entry in run.categories if defined(entry.get("image_count"))
    ]
    bounds = None if run.recipe is None else run.recipe.evaluation.group_bounds
    protocol = str((run.metrics or {}).get("protocol", "lvis"))
    return _states(run), tuple(counts), bounds, protocol if protocol in LIMITS else "lvis"


def looks(runs: Sequence[Run]) -> tuple[list[tuple[int, Look]], str]:
    """(number of the run, its look) of those with detections, and what hindered the others, in words."""
    found, notes = [], []
    for number, run in enumerate(runs):
        if run.results.is_file():
            try:
                found.append((number, look(run)))
            except UserError as error:
                notes.append(f"{run.name}: {error}.")
    return found, " ".join(notes)


# ---- details ---------------------------------------------------------------------------------------------------------


def _states(run: Run) -> _States:
    files = (annotations_file(run.recipe, run.name), run.results)
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is not there any more")
    return tuple((file, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


@functools.lru_cache(maxsize=16)
def _look(states: _States, counts: tuple[tuple[int, int], ...], bounds: tuple[int, ...] | None, protocol: str) -> Look:
    known = TrainCounts(dict(counts)) if counts else None
    groups: dict[str, Any] = {"group_bounds": bounds if known else None, "train_counts": known}
    found = reading(states[0][0], states[1][0])
    detections, boxes = found.detections, found.detections.boxes
    assert boxes is not None
    order = np.lexsort((-detections.scores, detections.image_rows))
    corners = boxes[order].astype(np.float32)
    corners[:, 2:] += corners[:, :2]
    images = len(found.truth.image_ids)
    return Look(
        truth=found.truth,
        letters=frequencies(found.truth.categories, groups["group_bounds"], known),
        errors=error_types(found, **groups),
        confusion=confusion(found, min_score=MIN_SCORE),
        tide=tide(found, rules="lvis" if protocol.startswith("lvis") else "coco", **groups),
        scores=score_curves(found, **groups),
        points={aim: operating_points(found, aim=Aim.of(aim)) for aim in AIMS},
        doubt=doubt(found),
        matches=matches(found, protocol),
        kept=Kept(
            starts=np.searchsorted(detections.image_rows[order], np.arange(images + 1)),
            labels=detections.category_rows[order].astype(np.int32),
            scores=detections.scores[order].astype(np.float32),
            boxes=corners,
        ),
    )
