"""Calibrating a results file of any detector (`tailfin calibrate RESULTS.json`): scores alone change.

What is known of a box is the scores of its entries. Entries of a picture with the very same box are one row of scores,
as query-based detectors, class-agnostic boxes and multi-label suppression leave them; an entry may also have
`scores`, a list over all categories by ascending id (one more, the last, is the background's). Where no row exceeds 1
the scores are those of a softmax, what a row leaves of 1 is its background's; else classes are independent.

The order of a class's detections changes only through rows of several classes and through limits per picture; with one
class per box and no limit, calibration moves thresholds and the order between classes, not AP.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from tailfin import evaluation
from tailfin.calibrate.candidates import PLAIN, dimensions, grid, label, methods_of, with_strength
from tailfin.calibrate.choice import NUMBERS, Choice, Goal, Numbers, choose, crossed
from tailfin.calibrate.pictures import Folds, make_folds
from tailfin.errors import UserError, nearest
from tailfin.evaluation.detections import Detections, load_detections, with_geometry
from tailfin.evaluation.entry_names import Entry, entries_of
from tailfin.evaluation.groups import TrainCounts
from tailfin.evaluation.results import ResultWriter
from tailfin.evaluation.truth import load_truth
from tailfin.files import existing_file, read_json, write_json, writing
from tailfin.joins import join_classes
from tailfin.models.rescoring import Kind, rescorer
from tailfin.parsing import load_typed
from tailfin.schema.calibration import Calibration
from tailfin.stats import ClassStats

KINDS = ("softmax", "sigmoid")
ELEMENTS = 2**22  # scores that are calibrated at a time
SLACK = 1e-3  # by which rounded scores of a softmax may exceed 1


class Rows(NamedTuple):
    """Entries as rows of scores over the classes of the training file; E entries in R rows."""

    row: NDArray[np.int64]  # [E]
    label: NDArray[np.int64]  # [E] class
    scores: NDArray[np.float64]  # [E]
    vectors: NDArray[np.float32] | None  # [E, C], where the entries have them; then row is 0..E-1
    number: int  # R


def calibrate_results(
    results: str | Path,
    out: str | Path,
    *,
    train: str | Path,
    holdout: str | Path | None = None,
    method: str | Sequence[str] | None = None,
    strength: str | float | Sequence[float] | None = None,
    kind: str | None = None,
    protocol: str = "lvis",
    max_dets: int | None = None,
    by: str = "AP",
    f_loss: float | None = None,
    folds: int = 2,
    overwrite: bool = False,
) -> tuple[Choice, Kind]:
    """Write the results with calibrated scores to `out`; returns what was chosen, and what the scores were taken for.

    Args:
        results: COCO results JSON.
        train: training annotations of the detector; classes are joined by name.
        holdout: annotations of the pictures of the results, to search on.
        method, strength, by, f_loss, folds: as of `calibrate.model.calibrate`.
        kind: "softmax" or "sigmoid"; found from the scores where it is not given.
        protocol, max_dets: of `evaluate`.
    """
    path, target = existing_file(results, "results"), Path(out)
    if target.suffix != ".json" or target.is_dir():
        raise UserError(f"--out {target} must be a file that ends in .json")
    if target.exists() and (not overwrite or target.resolve() == path.resolve()):
        raise UserError(f"--out {target} exists already; add --overwrite to replace it, or name another file")
    if kind is not None and kind not in KINDS:
        raise UserError(f'--scores: there is no kind "{kind}"{nearest(kind, KINDS)}')
    methods, goal = methods_of(method), Goal(by, f_loss)
    if strength is not None and len(methods) != 1:
        raise UserError("--strength belongs to one --method")
    if strength is None and holdout is None:
        raise UserError(
            "give the annotations of these pictures to choose on (--holdout FILE), or a method with its strength "
            "(--method norcal --strength 0.6)"
        )
    entries, typed = _read(path)
    stats = ClassStats.from_json(train)
    found: Detections | None = None
    if holdout is not None:
        truth = load_truth(holdout)
        found, _ = with_geometry(load_detections(path, truth, "bbox"), truth, "bbox")
        names = [category.name for category in truth.categories]
        join = join_classes(names, stats.names)
        used = np.unique(found.category_rows)
        if (join.rows[used] < 0).any():
            raise UserError(f"{holdout}: the training file {train} has no class {join.first_missing()}")
        rows = _rows(path, entries, join.rows[found.category_rows], join.rows, stats.num_classes)
    else:
        own = _classes_alone(path, typed, stats, train)
        rows = _rows(path, entries, own, np.arange(stats.num_classes), stats.num_classes)
    chosen_kind: Kind = kind or kind_of(rows)  # type: ignore[assignment]
    dimension = dimensions(stats, train) if "fracal" in methods else {}
    if strength is not None:
        fixed = with_strength(methods[0], strength, dimension)
        choice = Choice(label(fixed), fixed)
    else:
        choice = Choice(PLAIN, None)
        candidates = grid(methods, dimension)
    if found is not None:
        assert holdout is not None
        compared = {choice.label: choice.config} if strength is not None else candidates
        with tempfile.TemporaryDirectory(prefix="tailfin-calibrate-") as temporary:
            parts = make_folds(holdout, Path(temporary), folds=folds)
            scored = {PLAIN: rows.scores} | {
                name: calibrated(rows, config, stats, chosen_kind)
                for name, config in compared.items()
                if config is not None
            }
            counts = TrainCounts.from_json(train)
            ids = truth.image_ids[found.image_rows], truth.category_ids[found.category_rows]
            measured = {
                name: _measure(found, ids, scores, parts, Path(temporary) / str(number), protocol, max_dets, counts)
                for number, (name, scores) in enumerate(scored.items())
            }
        best, means = choose(measured, goal)
        if strength is None:
            choice = Choice(best, candidates.get(best), means, crossed(measured, goal))
        else:
            choice = Choice(choice.label, choice.config, means)
    scores = rows.scores if choice.config is None else calibrated(rows, choice.config, stats, chosen_kind)
    for entry, score in zip(entries, scores.tolist(), strict=True):
        entry["score"] = round(score, 8)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, entries)
    return choice, chosen_kind


def kind_of(rows: Rows) -> Kind:
    """What the scores are taken for: a softmax where some rows have several classes and none adds up to more than 1."""
    if rows.vectors is not None:
        return "softmax" if float(rows.vectors.sum(axis=1).max(initial=0)) <= 1 + SLACK else "sigmoid"
    together = np.bincount(rows.row, minlength=rows.number)
    sums = np.bincount(rows.row, rows.scores, minlength=rows.number)
    return "softmax" if together.max(initial=0) > 1 and sums.max(initial=0) <= 1 + SLACK else "sigmoid"


def calibrated(rows: Rows, config: Calibration, stats: ClassStats, kind: Kind) -> NDArray[np.float64]:
    """Scores [E] of the entries' own classes after `config`."""
    module = rescorer(config, stats, kind).double()
    found = np.empty(len(rows.scores))
    step = max(1, ELEMENTS // stats.num_classes)
    order = np.argsort(rows.row, kind="stable")
    starts = np.searchsorted(rows.row[order], np.arange(0, rows.number + step, step))
    for number, (first, end) in enumerate(zip(starts[:-1], starts[1:], strict=True)):
        own = order[first:end]
        if not len(own):
            continue
        place = rows.row[own] - number * step
        if rows.vectors is not None:
            dense = rows.vectors[own].astype(np.float64)
        else:
            dense = np.zeros((int(place.max()) + 1, stats.num_classes))
            np.maximum.at(dense, (place, rows.label[own]), rows.scores[own])
        with torch.inference_mode():
            moved = module(torch.from_numpy(dense)).numpy()
        found[own] = moved[np.arange(len(own)) if rows.vectors is not None else place, rows.label[own]]
    return found


# ---- details ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> tuple[list[dict[str, Any]], Sequence[Entry]]:
    """The entries as they stand, and what of them is known."""
    entries = read_json(path, "results")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"results {path}: a list of detections is needed (COCO results)")
    if not entries:
        raise UserError(f"results {path} holds no detection")
    typed, _ = load_typed(path, list[Entry], "results", by_keys=entries_of)
    for row, entry in enumerate(entries):
        score = entry.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise UserError(f"results {path}: entry {row}: score is {score}, a number in 0..1 is needed")
    return entries, typed


def _rows(path: Path, entries: list[dict[str, Any]], labels: NDArray[Any], order: NDArray[Any], classes: int) -> Rows:
    """Entries as rows; `order` is the training class of each category by ascending id."""
    scores = np.array([entry["score"] for entry in entries], dtype=np.float64)
    given = ["scores" in entry for entry in entries]
    if all(given):
        lists = [entry["scores"] for entry in entries]
        width = len(order)
        for row, values in enumerate(lists):
            if not isinstance(values, list) or len(values) not in (width, width + 1):
                raise UserError(
                    f"results {path}: entry {row}: scores must be a list of {width} (or {width + 1}) numbers"
                )
        try:
            matrix = np.array([values[:width] for values in lists], dtype=np.float32)
        except (TypeError, ValueError):
            raise UserError(f"results {path}: scores must be numbers") from None
        if not ((matrix >= 0) & (matrix <= 1)).all():
            raise UserError(f"results {path}: scores must lie in 0..1")
        vectors = np.zeros((len(entries), classes), dtype=np.float32)
        vectors[:, order[order >= 0]] = matrix[:, order >= 0]
        return Rows(np.arange(len(entries)), labels, scores, vectors, len(entries))
    if any(given):
        raise UserError(f"results {path}: entry {given.index(False)} has no scores, others have")
    places: dict[Any, int] = {}
    of_entry = np.empty(len(entries), dtype=np.int64)
    for number, entry in enumerate(entries):
        box = entry.get("bbox")
        name = entry.get("file_name")
        picture = entry["image_id"], name if isinstance(name, str) else None
        key = (*picture, tuple(box) if isinstance(box, list) else number)
        of_entry[number] = places.setdefault(key, len(places))
    return Rows(of_entry, labels, scores, None, len(places))


def _classes_alone(path: Path, entries: Sequence[Entry], stats: ClassStats, train: str | Path) -> NDArray[Any]:
    """Class of each entry, without annotations of its pictures: by its name, else by the training file's ids."""
    by_name = {name: row for row, name in enumerate(stats.names)}
    by_id = {number: row for row, number in enumerate(stats.category_ids.tolist())}
    given = [entry.category_name if isinstance(entry.category_name, str) else None for entry in entries]
    if entries and "category_name" not in type(entries[0]).__struct_encode_fields__ and not by_name.keys() & set(given):
        given = [None] * len(given)  # not one is known: the key means something else
    labels = np.empty(len(entries), dtype=np.int64)
    for row, (entry, name) in enumerate(zip(entries, given, strict=True)):
        number = entry.category_id
        name = number if name is None and isinstance(number, str) else name
        if name is not None and name not in by_name:
            raise UserError(f'results {path}: entry {row}: {train} has no class "{name}"{nearest(str(name), by_name)}')
        if name is None and number not in by_id:
            raise UserError(f"results {path}: entry {row}: category_id {number} is not in {train}")
        labels[row] = by_name[name] if name is not None else by_id[number]
    return labels


def _measure(
    found: Detections,
    ids: tuple[NDArray[Any], NDArray[Any]],
    scores: NDArray[Any],
    folds: Folds,
    folder: Path,
    protocol: str,
    max_dets: int | None,
    counts: TrainCounts | Mapping[int, int],
) -> list[Numbers]:
    """The numbers of scores [E] on each fold."""
    images, categories = ids
    assert found.boxes is not None
    boxes = np.concatenate([found.boxes[:, :2], found.boxes[:, :2] + found.boxes[:, 2:]], axis=1)
    order = np.argsort(images, kind="stable")
    pieces = np.split(order, np.flatnonzero(np.diff(images[order])) + 1)
    writers = [ResultWriter(folder / f"fold{k}") for k in range(len(folds.files))]
    for own in pieces:
        image_id = int(images[own[0]])
        writers[folds.of_image[image_id]].add(image_id, boxes[own], scores[own], categories[own])
    numbers = []
    for k, writer in enumerate(writers):
        writer.close()
        metrics = evaluation.evaluate(
            folds.files[k], folder / f"fold{k}", protocol, "bbox", max_dets=max_dets, train_counts=counts
        )["bbox"]
        numbers.append({name: float(metrics[name]) for name in NUMBERS})
    return numbers
