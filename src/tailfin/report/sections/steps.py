"""Step-wise learning: what each step trained on, what it brought, and the exemplars that stand for the classes.

Read are `RUN/stages/*/step.json` and `metrics.json` of every step, and `RUN/exemplars.json`; exemplars are drawn where
the training pictures are still there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from tailfin.data.dataset import open_source
from tailfin.errors import UserError
from tailfin.files import read_object
from tailfin.report.classifiers import read_classifier
from tailfin.report.draw import data_uri, draw_detections
from tailfin.report.page import Section, chart, color, count, defined, label, percent, render, signed
from tailfin.report.runs import Run
from tailfin.stats import GROUPS

_KEYS = ("AP", "APr", "APc", "APf")
_CLASSES = 3  # of the rarest, and of the most frequent ones
_EXEMPLARS = 6  # of a class
_SIDE = 140  # pixels of the long side
_AROUND = 0.35  # of a box, that is shown around it


def steps(runs: Sequence[Run]) -> Section | None:
    """A table of steps, annotations per class and exemplars of each run; None where no run has steps."""
    notes: list[str] = []
    shown = []
    for index, run in enumerate(runs):
        if not any(run.path.glob("stages/*/step.json")) and not (run.path / "exemplars.json").is_file():
            continue
        try:
            shown.append({"name": run.name, "color": color(index), **_of_run(run, notes)})
        except (UserError, KeyError, TypeError, ValueError, IndexError) as error:
            notes.append(f"{run.name}: its steps cannot be shown ({error})")
    if not shown and not notes:
        return None
    html = render("steps.html", runs=shown, notes=notes, several=len(runs) > 1)
    return Section("Steps and exemplars", html)


# ---- details ---------------------------------------------------------------------------------------------------------


def _of_run(run: Run, notes: list[str]) -> dict[str, Any]:
    folders = sorted((run.path / "stages").glob("[0-9]*-*"), key=lambda folder: int(folder.name.partition("-")[0]))
    read = [(folder, _read(folder / "step.json"), _read(folder / "metrics.json")) for folder in folders]
    read = [row for row in read if row[1] or row[2]]
    kind = "bbox" if any("bbox" in metrics for _, _, metrics in read) else "segm"
    keys = [key for key in _KEYS if any(defined((metrics.get(kind) or {}).get(key)) for _, _, metrics in read)]
    rows, before = [], None
    for folder, step, metrics in read:
        numbers = metrics.get(kind) or {}
        rows.append(
            {
                "name": folder.name.partition("-")[2],
                "annotations": count(sum(step["annotations"])) if step else "all",
                "images": count(step.get("images")),
                "epoch": count(step.get("epoch")),
                "iterations": count(step.get("iterations")),
                "trains": (", ".join(step["trains"]) or "class-specific parts") if step else "",
                "measured": [(percent(numbers.get(key)), _change(numbers, before, key)) for key in keys],
            }
        )
        before = numbers or before
    document = _read(run.path / "exemplars.json")
    return {
        "rows": rows,
        "numbers": keys,
        "chart": _curves(read, document),
        "shift": _shift(folders),
        "classes": _exemplars(run, document, notes) if document else [],
        "chosen": _how(document),
    }


def _shift(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """How far the classifier's rows turn from one step to the next: 1 - cosine, the mean of each frequency group."""
    models = [(folder.name.partition("-")[2], read_classifier(folder / "model.safetensors")) for folder in folders]
    rows = []
    for (_, before), (name, after) in zip(models, models[1:], strict=False):
        if before is None or after is None or before.rows.shape != after.rows.shape:
            continue
        length = np.linalg.norm(before.rows, axis=1) * np.linalg.norm(after.rows, axis=1)
        turned = 1 - np.divide(
            (before.rows * after.rows).sum(axis=1), length, out=np.ones(len(length)), where=length > 0
        )
        group = np.array([str(letter) for letter in after.stats.frequency])
        means = [f"{turned[group == own].mean():.3f}" if (group == own).any() else "–" for own in GROUPS]
        rows.append({"name": name, "means": means, "grown": _grown(before.norms, after.norms, group)})
    return rows


def _grown(before: np.ndarray, after: np.ndarray, group: np.ndarray) -> list[str]:
    """Norm after over before, the mean of each frequency group."""
    ratio = np.divide(after, before, out=np.full(len(after), np.nan), where=before > 0)
    return [f"{np.nanmean(ratio[group == own]):.2f}" if (group == own).any() else "–" for own in GROUPS]


def _read(path: Path) -> dict[str, Any]:
    return read_object(path) if path.is_file() else {}


def _change(numbers: Mapping[str, Any], before: Mapping[str, Any] | None, key: str) -> str:
    own, other = numbers.get(key), (before or {}).get(key)
    return signed(own - other) if defined(own) and defined(other) else ""


def _how(document: Mapping[str, Any]) -> str:
    if not document:
        return ""
    source = document.get("source")
    kept = f"First come scores above {document.get('threshold', 0.5)}"
    kept += ", each from another image" if document.get("distinct_images", True) else ""
    return f"{kept}." + (f" They were taken from {source['file']}." if isinstance(source, dict) else "")


def _curves(read: Sequence[tuple[Path, dict[str, Any], dict[str, Any]]], document: Mapping[str, Any]) -> Markup | None:
    """Annotations per class of the whole set and of every step, classes by falling number."""
    stepped = [(folder.name.partition("-")[2], np.array(step["annotations"])) for folder, step, _ in read if step]
    if not stepped:
        return None
    listed = document.get("classes") or []
    names = [str(entry["name"]) for entry in listed]
    series = [("all", np.array([entry["instances"] for entry in listed]))] if listed else []
    series += stepped
    if len({len(values) for _, values in series}) != 1:
        raise ValueError("its files are of different numbers of classes")
    whole = series[0][1]
    order = np.argsort(-whole, kind="stable")
    figure = go.Figure()
    texts = [label(names[place]) if names else f"class {place}" for place in order]
    for number, (name, values) in enumerate(series):
        figure.add_scatter(
            x=list(range(len(order))),
            y=[int(values[place]) or None for place in order],  # a log scale has no zero
            customdata=texts,
            hovertemplate="%{customdata}: <b>%{y}</b><extra>" + label(name) + "</extra>",
            mode="lines",
            line={"color": color(number + 1) if name != "all" else "#5b7083"},
            name=f"{label(name)} ({count(int(values.sum()))})",
        )
    figure.update_layout(
        xaxis={"title": "classes by falling number of annotations", "showticklabels": False},
        yaxis={"title": "annotations", "type": "log", "dtick": 1},
    )
    return chart(figure, height=380)


def _exemplars(run: Run, document: Mapping[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """The first exemplars of some classes, cut out of their pictures."""
    if run.recipe is None:
        return []
    try:
        source = open_source(run.recipe.data.train, run.recipe.data.root, "train")
    except UserError as error:
        notes.append(f"{run.name}: no exemplars are drawn: {error}")
        return []
    index = source.index
    if document.get("fingerprint") != index.fingerprint:
        notes.append(f"{run.name}: no exemplars are drawn: {index.path} holds other annotations by now")
        return []
    place = {int(number): row for row, number in enumerate(index.annotation_ids.tolist())}
    listed = [entry for entry in document["classes"] if entry["exemplars"]]
    listed.sort(key=lambda entry: (entry["images"], entry["id"]))
    chosen = listed if len(listed) <= 2 * _CLASSES else [*listed[:_CLASSES], *listed[-_CLASSES:]]
    shown, unread = [], []
    for entry in chosen:
        panels = []
        for exemplar in entry["exemplars"][:_EXEMPLARS]:
            try:
                image = _cut_out(source, place[int(exemplar["annotation"])], run.recipe.data.max_pixels)
            except UserError as error:
                unread.append(str(error))
                continue
            panels.append({"image": image, "note": f"{float(exemplar['score']):.3f}"})
        note = f"{entry['part']}, {count(entry['images'])} images, {count(len(entry['exemplars']))} exemplars"
        shown.append({"name": str(entry["name"]), "note": note, "panels": panels})
    if unread:
        notes.append(f"{run.name}: {len(unread)} exemplars could not be read: {unread[0]}")
    return [own for own in shown if own["panels"]]


def _cut_out(source: Any, row: int, max_pixels: int) -> str:
    """An annotation with a margin around it and its box, as a data URI."""
    index = source.index
    picture = source.read(int(index.image_of[row]), max_pixels).permute(1, 2, 0).numpy()
    left, top, width, height = (float(value) for value in index.boxes[row])
    margin = _AROUND * max(width, height)
    x, y = max(0, int(left - margin)), max(0, int(top - margin))
    cut = picture[y : int(top + height + margin) + 1, x : int(left + width + margin) + 1]
    box = [[left - x, top - y, left - x + width, top - y + height]]
    drawn = draw_detections(np.ascontiguousarray(cut), box, [0], [], size=_SIDE, texts=[""])
    return data_uri(drawn)
