"""Which class swallows which: for every class how many objects are found, missed, or taken for another one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from tailfin.report.evaluated import MIN_SCORE, looks
from tailfin.report.page import Section, chart, color, group_choices, label, render
from tailfin.report.runs import Run

_MATRIX = 60  # classes; a picture of more cannot be read


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
