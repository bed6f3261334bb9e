"""Which class swallows which: for every class how many objects are found, missed, or taken for another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from tailfin.errors import UserError
from tailfin.report.classifiers import read_classifier, twins
from tailfin.report.crops import Pictures
from tailfin.report.evaluated import MIN_SCORE, Look, looks
from tailfin.report.page import Section, chart, color, group_choices, label, render
from tailfin.report.runs import Run

_MATRIX = 60  # classes; a picture of more cannot be read
_PAIRS, _EACH = 8, 4  # classes with examples, and of each


def swallowed(runs: Sequence[Run]) -> Section | None:
    """A table, the rarest class first, and a matrix of the first run where it can be read; None without detections."""
    seen, note = looks(runs)
    found = [(number, own.confusion) for number, own in seen]
    if not found:
        return None
    entries: dict[str, dict[str, Any]] = {}
    for number, value in found:
        for cell in _cells(runs[number], value):
            entry = entries.setdefault(cell["name"], {**cell, "runs": {}})
            entry["runs"][number] = cell
    rows = sorted(entries.values(), key=lambda row: (row["images"], row["name"]))
    html = render(
        "confusion.html",
        rows=[{**row, "cells": [row["runs"].get(number) for number, _ in found]} for row in rows],
        columns=[{"name": runs[number].name, "color": color(number)} for number, _ in found],
        groups=group_choices(row["group"] for row in rows),
        twins=_twins(runs, found),
        pairs=_examples(runs, seen),
        matrix=_matrix(runs[found[0][0]], found[0][1]),
        first=runs[found[0][0]].name,
        score=MIN_SCORE,
        note=note,
    )
    return Section("Confusion", html)


# ---- details ---------------------------------------------------------------------------------------------------------


def _cells(run: Run, value: dict[str, Any]) -> list[dict[str, Any]]:
    """One per class with objects."""
    known = {int(entry["id"]): entry for entry in run.categories if "id" in entry}
    cells = []
    for place, own in enumerate(value["category_ids"].tolist()):
        objects = int(value["num_gt"][place])
        if not objects:
            continue
        entry = known.get(own, {})
        images = entry.get("image_count")
        taken = [(str(known.get(other, {}).get("name", other)), number) for other, number in value["taken_for"][place]]
        cells.append(
            {
                "name": str(entry.get("name", own)),
                "group": str(entry.get("frequency") or ""),
                "images": float("inf") if images is None else images,
                "objects": objects,
                "found": int(value["found"][place]) / objects,
                "missed": int(value["missed"][place]) / objects,
                "taken": [(name, number / objects) for name, number in taken[:3]],
                "wrong": sum(number for _, number in taken) / objects,
            }
        )
    return cells


def _twins(runs: Sequence[Run], found: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, str]:
    """Class name -> the class whose classifier weights are the most alike, of the first run with a known model."""
    for number, _ in found:
        model = read_classifier(runs[number].path / "model.safetensors")
        if model is not None and len(model.rows) > 2:
            names = model.stats.names
            return {names[place]: names[other] for place, other in enumerate(twins(model.rows).tolist())}
    return {}


def _examples(runs: Sequence[Run], seen: Sequence[tuple[int, Look]]) -> list[dict[str, Any]]:
    """Of the rarest classes: objects that the first run takes for another class, beside objects of that one."""
    number, own = seen[0]
    truth, said, table = own.truth, own.doubt, own.confusion
    known = {int(entry["id"]): entry.get("image_count") for entry in runs[number].categories if "id" in entry}
    ids = truth.category_ids.tolist()
    swallowed_by = [row[0][0] if row else None for row in table["taken_for"]]
    order = sorted(
        (place for place in range(len(ids)) if swallowed_by[place] is not None),
        key=lambda place: (known.get(ids[place]) is None, known.get(ids[place]) or 0, ids[place]),
    )
    shown = []
    try:
        pictures = Pictures.of(runs[number], truth)
        for place in order[:_PAIRS]:
            other = ids.index(swallowed_by[place])
            mine = truth.category_rows == place
            lost = np.flatnonzero(mine & ~said.seen & (said.other_class == other))
            lost = lost[np.argsort(-said.other_score[lost], kind="stable")][:_EACH]
            its = np.flatnonzero((truth.category_rows == other) & said.seen)
            its = its[np.argsort(-truth.area[its], kind="stable")][:: max(1, len(its) // _EACH)][:_EACH]
            if not len(lost):
                continue
            sides = []
            for rows, tone in ((lost, (255, 122, 50)), (its, (46, 204, 113))):
                sides.append(
                    [
                        pictures.cut_out(int(truth.image_rows[row]), tuple(truth.boxes[row].tolist()), tone, side=96)
                        for row in rows.tolist()
                    ]
                )
            names = [truth.categories[label].name or str(ids[label]) for label in (place, other)]
            shown.append({"name": names[0], "other": names[1], "lost": sides[0], "its": sides[1]})
    except UserError:
        return shown  # the section about examples says what is wrong with the pictures
    return shown


def _matrix(run: Run, value: dict[str, Any]) -> Markup | str:
    """Rows are classes, columns what their objects are taken for; shares of a row's objects."""
    known = {int(entry["id"]): entry for entry in run.categories if "id" in entry}
    ids = [own for own, number in zip(value["category_ids"].tolist(), value["num_gt"], strict=True) if number]
    if not 1 < len(ids) <= _MATRIX:
        return ""
    ids.sort(key=lambda own: (-(known.get(own, {}).get("image_count") or 0), own))
    place = {own: number for number, own in enumerate(ids)}
    shares = np.zeros((len(ids), len(ids) + 1))
    for row, own in enumerate(value["category_ids"].tolist()):
        if own not in place:
            continue
        shares[place[own], place[own]] = value["found"][row] / value["num_gt"][row]
        shares[place[own], -1] = value["missed"][row] / value["num_gt"][row]
        for other, number in value["taken_for"][row]:
            if other in place:
                shares[place[own], place[other]] = number / value["num_gt"][row]
    names = [label(known.get(own, {}).get("name", own)) for own in ids]
    figure = go.Figure(
        go.Heatmap(
            z=np.round(100 * shares, 1),
            x=[*names, "missed"],
            y=names,
            colorscale=[[0, "rgba(47,125,225,0)"], [1, "rgb(47,125,225)"]],
            zmin=0,
            zmax=100,
            colorbar={"title": "%"},
            hovertemplate="%{y} taken for %{x}: <b>%{z:.1f} %</b><extra></extra>",
        )
    )
    figure.update_layout(
        xaxis={"type": "category", "tickangle": -60, "automargin": True},
        yaxis={"type": "category", "autorange": "reversed", "automargin": True},
    )
    return chart(figure, height=max(420, 160 + 18 * len(ids)))
