"""At which score to cut: precision, recall and boxes per picture, precision against recall, what a score means, and
thresholds; of all classes, of each frequency group and of every class."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from plotly.subplots import make_subplots

from tailfin.evaluation.scores import AIMS as POOLED_AIMS
from tailfin.evaluation.scores import SCORES
from tailfin.report.evaluated import AIMS, Look, looks
from tailfin.report.page import Section, chart, color, group_choices, group_name, label, render
from tailfin.report.runs import Run

_CUTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_GROUPS = ("all", "r", "c", "f")


def scores(runs: Sequence[Run]) -> Section | None:
    """Tables and charts; None without detections."""
    found, _ = looks(runs)
    if not found:
        return None
    groups = [group for group in _GROUPS if any(own.scores["groups"][group]["objects"] for _, own in found)]
    named = [(group, "all" if group == "all" else group_name(group)) for group in groups]
    rows = _classes(runs, found)
    html = render(
        "scores.html",
        cuts=[f"{cut:g}" for cut in _CUTS],
        price=[{"name": runs[number].name, "color": color(number), "cells": _cells(own)} for number, own in found],
        several=len(found) > 1,
        precision=_grid(runs, found, named, _recall_lines, "recall", "precision (%)"),
        reliability=_grid(runs, found, named, _reliability_lines, "score", "right (%)", diagonal=True),
        cut_chart=_cut_chart(runs, found),
        groups=[
            {
                "key": group,
                "name": name,
                "rows": [
                    {
                        "name": runs[number].name,
                        "color": color(number),
                        "error": own.scores["groups"][group]["error"],
                        "aims": [_aim(own.scores["groups"][group]["thresholds"][aim]) for aim in POOLED_AIMS],
                    }
                    for number, own in found
                    if own.scores["groups"][group]["objects"]
                ],
            }
            for group, name in named
        ],
        aims=POOLED_AIMS,
        class_aims=AIMS,
        columns=[{"name": runs[number].name, "color": color(number)} for number, _ in found],
        rows=rows,
        choices=group_choices(row["group"] for row in rows),
        curves=_curves(runs, found, rows),
    )
    return Section("Scores", html)


# ---- details ---------------------------------------------------------------------------------------------------------


def _cells(own: Look) -> list[dict[str, Any]]:
    cut = own.scores["groups"]["all"]["cut"]
    places = [int(np.argmin(np.abs(SCORES - value))) for value in _CUTS]
    return [
        {
            "precision": _known(cut["precision"][at]),
            "recall": _known(cut["recall"][at]),
            "boxes": float(cut["boxes"][at]),
        }
        for at in places
    ]


def _known(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _aim(found: dict[str, Any]) -> dict[str, Any]:
    return {
        "score": found["score"],
        "precision": _known(found["precision"]),
        "recall": _known(found["recall"]),
        "reached": found["reached"],
    }


def _recall_lines(own: dict[str, Any]) -> tuple[Any, Any, Any]:
    precision = own["precision"]
    used = np.arange(len(precision)) <= np.max(np.flatnonzero(precision > 0), initial=0)
    return np.linspace(0, 1, 101)[used], 100 * precision[used], None


def _reliability_lines(own: dict[str, Any]) -> tuple[Any, Any, Any]:
    curve = own["reliability"]
    used = curve["number"] > 0
    return curve["score"][used], 100 * curve["right"][used], curve["number"][used]


def _grid(
    runs: Sequence[Run],
    found: Sequence[tuple[int, Look]],
    groups: Sequence[tuple[str, str]],
    lines: Any,
    across: str,
    up: str,
    *,
    diagonal: bool = False,
) -> Markup:
    """One small chart per group, a line per run."""
    figure = make_subplots(
        rows=1, cols=len(groups), subplot_titles=[label(name) for _, name in groups], horizontal_spacing=0.06
    )
    for place, (group, _) in enumerate(groups, 1):
        if diagonal:
            figure.add_scatter(
                x=[0, 1],
                y=[0, 100],
                mode="lines",
                line={"color": "#93a1b1", "width": 1, "dash": "dot"},
                hoverinfo="skip",
                showlegend=False,
                row=1,
                col=place,
            )
        for number, own in found:
            if not own.scores["groups"][group]["objects"]:
                continue
            x, y, size = lines(own.scores["groups"][group])
            figure.add_scatter(
                x=np.round(x, 4),
                y=np.round(y, 2),
                customdata=size,
                mode="lines+markers" if diagonal else "lines",
                line={"color": color(number), "width": 2},
                name=label(runs[number].name),
                legendgroup=str(number),
                showlegend=place == 1,
                hovertemplate=f"{across} %{{x:.2f}}: <b>%{{y:.1f}} %</b>"
                + (" of %{customdata}" if diagonal else "")
                + f"<extra>{label(runs[number].name)}</extra>",
                row=1,
                col=place,
            )
    figure.update_xaxes(range=[0, 1.01], title=across)
    figure.update_yaxes(range=[0, 103])
    figure.update_layout(yaxis={"title": up}, showlegend=len(found) > 1, legend={"y": 1.16})
    return chart(figure, height=300)


def _cut_chart(runs: Sequence[Run], found: Sequence[tuple[int, Look]]) -> Markup:
    """Precision, recall and boxes per picture of all classes from a score on."""
    titles = ("precision (%)", "recall (%)", "boxes per picture")
    figure = make_subplots(rows=1, cols=3, subplot_titles=titles, horizontal_spacing=0.07)
    for number, own in found:
        cut = own.scores["groups"]["all"]["cut"]
        for place, values in enumerate((100 * cut["precision"], 100 * cut["recall"], cut["boxes"]), 1):
            figure.add_scatter(
                x=SCORES[1:],
                y=np.round(values[1:], 3),
                mode="lines",
                line={"color": color(number), "width": 2},
                name=label(runs[number].name),
                legendgroup=str(number),
                showlegend=place == 1,
                hovertemplate="score %{x}: <b>%{y:.1f}</b><extra>" + label(runs[number].name) + "</extra>",
                row=1,
                col=place,
            )
    figure.update_xaxes(title="score")
    figure.update_yaxes(rangemode="tozero")
    figure.update_layout(showlegend=len(found) > 1, legend={"y": 1.16}, yaxis3={"type": "log"})
    return chart(figure, height=300)


def _classes(runs: Sequence[Run], found: Sequence[tuple[int, Look]]) -> list[dict[str, Any]]:
    """Thresholds of every class with objects, the rarest first."""
    rows: dict[str, dict[str, Any]] = {}
    for number, own in found:
        images = {int(entry["id"]): entry.get("image_count") for entry in runs[number].categories if "id" in entry}
        for place, category in enumerate(own.truth.categories):
            objects = int(own.scores["objects"][place])
            if not objects:
                continue
            name = category.name or str(category.id)
            known = images.get(category.id)
            row = rows.setdefault(
                name,
                {
                    "name": name,
                    "group": own.letters[place] or "",
                    "images": float("inf") if known is None else known,
                    "objects": objects,
                    "runs": {},
                    "places": {},
                },
            )
            row["places"][number] = place
            row["runs"][number] = [own.points[aim].points[name] for aim in AIMS]
    listed = sorted(rows.values(), key=lambda row: (row["images"], row["name"]))
    return [{**row, "cells": [row["runs"].get(number) for number, _ in found]} for row in listed]


def _curves(runs: Sequence[Run], found: Sequence[tuple[int, Look]], rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Precision at 51 recalls of every class and run as bytes (255 = 1), for the chart that the reader chooses."""
    tables = []
    for number, own in found:
        table = np.zeros((len(rows), 51), dtype=np.uint8)
        for row, entry in enumerate(rows):
            if number in entry["places"]:
                values = own.scores["classes"]["precision"][entry["places"][number], ::2]
                table[row] = np.round(255 * values)
        tables.append(base64.b64encode(table.tobytes()).decode())
    return {"runs": [(runs[number].name, color(number)) for number, _ in found], "tables": tables}
