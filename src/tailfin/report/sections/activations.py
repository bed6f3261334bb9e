"""Where the backbones look: activation maps on pictures of the evaluated file, and their energy inside the boxes
(2DRCL, figure 3). Made on request, since the detectors run: `tailfin report RUN --activations mean`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tailfin.errors import UserError
from tailfin.report.activations import Method, activation_maps, energy_inside, overlaid
from tailfin.report.crops import Pictures
from tailfin.report.draw import data_uri, draw_detections
from tailfin.report.evaluated import Look, looks
from tailfin.report.page import Section, color, group_name, percent, render
from tailfin.report.runs import Run
from tailfin.stats import GROUPS

_MEASURED = 48  # pictures, as many of each group as there are
_SHOWN = 6
_SIDE = 260


def activations(runs: Sequence[Run], method: Method = "mean") -> Section:
    """Maps of the same pictures for every run with a model, and a table of their energy inside the boxes."""
    notes: list[str] = []
    shown: list[dict[str, Any]] = []
    table: list[dict[str, Any]] = []
    found, note = looks(runs)
    if found:
        try:
            shown, table = _made(runs, found[0], method, notes)
        except UserError as error:
            notes.append(f"No activation maps: {error}")
    else:
        notes.append(note or "No run has detections: there is nothing to choose pictures by.")
    html = render("activations.html", method=method, pictures=shown, rows=table, notes=notes, groups=_names())
    return Section("Where the network looks", html)


# ---- details ---------------------------------------------------------------------------------------------------------


def _names() -> list[str]:
    return ["all", *(group_name(group) for group in GROUPS)]


def _made(
    runs: Sequence[Run], first: tuple[int, Look], method: Method, notes: list[str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    number, seen = first
    pictures = Pictures.of(runs[number], seen.truth)
    chosen = _chosen(seen)
    images = [pictures.read(row) for row, _ in chosen]
    names = [seen.truth.categories[label].name for _, label in chosen]
    letters = [str(seen.letters[label] or "") for _, label in chosen]
    boxes = [_boxes(seen, row) for row, _ in chosen]
    panels: list[list[dict[str, str]]] = [[] for _ in chosen[:_SHOWN]]
    table = []
    for place, run in enumerate(runs):
        model = run.path / "model.safetensors"
        if not model.is_file():
            notes.append(f"{run.name} has no model file.")
            continue
        try:
            maps = activation_maps(model, images, method, names if method == "gradcam" else None)
        except UserError as error:
            notes.append(f"{run.name}: {error}")
            continue
        energy = np.array([energy_inside(values, own) for values, own in zip(maps, boxes, strict=True)])
        full = np.array([values.any() for values in maps])
        means = []
        for group in ("", *GROUPS):
            own = full & np.array([not group or letter == group for letter in letters])
            means.append(percent(float(energy[own].mean())) if own.any() else "–")
        table.append({"name": run.name, "color": color(place), "means": means, "pictures": int(full.sum())})
        for panel, image, values, own, share in zip(panels, images, maps, boxes, energy, strict=False):
            drawn = draw_detections(
                np.asarray(overlaid(image, values)),
                own,
                [0] * len(own),
                [],
                size=_SIDE,
                texts=[""] * len(own),
                colors=[(255, 255, 255)] * len(own),
            )
            note = f"{percent(float(share), 0)} % inside" if values.any() else "no detection of the class"
            panel.append({"title": run.name, "color": color(place), "image": data_uri(drawn), "note": note})
    rows = [
        {"name": name, "group": letter, "panels": panel}
        for name, letter, panel in zip(names, letters, panels, strict=False)
        if panel
    ]
    return rows, table


def _chosen(seen: Look) -> list[tuple[int, int]]:
    """(image row, class row): pictures of the groups in turn, the class's first picture with few objects."""
    truth = seen.truth
    objects = np.bincount(truth.image_rows, minlength=len(truth.image_ids))
    queues: list[list[tuple[int, int]]] = []
    for group in GROUPS:
        pairs = []
        for label in [place for place, letter in enumerate(seen.letters) if letter == group]:
            rows = np.unique(truth.image_rows[(truth.category_rows == label) & ~truth.crowd])
            rows = rows[np.argsort(objects[rows], kind="stable")]
            pairs += [(depth, int(row), label) for depth, row in enumerate(rows[:_MEASURED].tolist())]
        queues.append([(row, label) for _, row, label in sorted(pairs)])
    chosen: list[tuple[int, int]] = []
    while len(chosen) < _MEASURED and any(queues):
        for queue in queues:
            if queue and len(chosen) < _MEASURED:
                chosen.append(queue.pop(0))
    return chosen


def _boxes(seen: Look, row: int) -> np.ndarray:
    """All objects of a picture, xyxy."""
    own = (seen.truth.image_rows == row) & ~seen.truth.crowd
    boxes = seen.truth.boxes[own].copy()
    boxes[:, 2:] += boxes[:, :2]
    return boxes
