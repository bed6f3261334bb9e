"""AP of every class against its number of training images: where on the tail a run wins or loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from tailfin.report.page import Section, chart, color, count, defined, group_name, label, percent, render
from tailfin.report.runs import Run

_UNSEEN = 0.5  # where a class without training images stands on the logarithmic axis
_CROWD = 400  # from so many classes on the lines between two runs start hidden


def scatter(runs: Sequence[Run]) -> Section | None:
    """One dot per class and run; None where no run has numbers per class."""
    points = [_points(run) for run in runs]
    if not any(points):
        return None
    figure = go.Figure()
    if sum(map(bool, points)) == 2:
        _changes(figure, *[found for found in points if found])
    for index, (run, found) in enumerate(zip(runs, points, strict=True)):
        if found:
            _dots(figure, run, found, color(index))
            _trend(figure, run, found, color(index))
    ticks = [step * 10**power for power in range(7) for step in (1, 3)]
    best = max((point["y"] for found in points for point in found.values()), default=0.0)
    top = max(10.0, 10 * np.ceil(best / 10))
    unseen = any(point["x"] == _UNSEEN for found in points for point in found.values())
    figure.update_layout(
        xaxis={
            "type": "log",
            "title": "training images",
            "tickvals": [_UNSEEN] * unseen + ticks,
            "ticktext": ["none"] * unseen + [count(tick) for tick in ticks],
        },
        yaxis={"title": "AP (%)", "range": [-0.03 * top, 1.03 * top]},
        hovermode="closest",
        showlegend=True,
    )
    html = render("scatter.html", chart=chart(figure, height=520), two=sum(map(bool, points)) == 2)
    return Section("AP against training images", html)


# ---- details ---------------------------------------------------------------------------------------------------------


def _points(run: Run) -> dict[str, dict[str, Any]]:
    """Class name -> place and hover text, of the classes that have an AP."""
    found: dict[str, dict[str, Any]] = {}
    for entry in run.categories:
        values = entry.get("bbox") or entry.get("segm") or {}
        images = entry.get("image_count")
        if not defined(values.get("AP")) or not defined(images):
            continue
        name = str(entry.get("name", entry.get("id")))
        group = group_name(entry.get("frequency"))
        found[name] = {
            "x": images or _UNSEEN,
            "y": 100 * values["AP"],
            "hover": f"<b>{label(name)}</b>{f' ({label(group)})' if group else ''}<br>"
            f"{count(images)} training images, {count(entry.get('instance_count'))} instances<br>"
            f"AP {percent(values['AP'])}, AP50 {percent(values.get('AP50'))}",
        }
    return found


def _dots(figure: go.Figure, run: Run, found: dict[str, dict[str, Any]], tone: str) -> None:
    figure.add_scatter(
        x=np.array([point["x"] for point in found.values()], np.float64),
        y=np.array([point["y"] for point in found.values()], np.float32),
        text=[point["hover"] for point in found.values()],
        mode="markers",
        name=label(run.name),
        legendgroup=label(run.name),
        marker={"color": tone, "size": 9 if len(found) < 100 else 6, "opacity": 0.75},
        hovertemplate="%{text}<extra>" + label(run.name) + "</extra>",
    )


def _trend(figure: go.Figure, run: Run, found: dict[str, dict[str, Any]], tone: str) -> None:
    """The mean AP of about equally many classes per bin, over the bin's geometric mean of training images."""
    seen = [point for point in found.values() if point["x"] != _UNSEEN]
    if len(seen) < 12:
        return
    x, y = (np.array([point[axis] for point in seen]) for axis in "xy")
    bins = np.array_split(np.argsort(x, kind="stable"), min(12, len(seen) // 4))
    figure.add_scatter(
        x=np.array([np.exp(np.log(x[part]).mean()) for part in bins]),
        y=np.array([y[part].mean() for part in bins]),
        mode="lines",
        line={"color": tone, "width": 2.5, "shape": "spline", "smoothing": 0.6},
        name=f"{label(run.name)}, mean",
        legendgroup=label(run.name),
        hoverinfo="skip",
        showlegend=False,
    )


def _changes(figure: go.Figure, first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> None:
    """A line from each class's dot in the first run to its dot in the second: green up, red down."""
    shared = [name for name in first if name in second]
    for title, tone, chosen in (
        ("better", "#10a37f", [name for name in shared if second[name]["y"] > first[name]["y"]]),
        ("worse", "#e5484d", [name for name in shared if second[name]["y"] < first[name]["y"]]),
    ):
        figure.add_scatter(
            x=[value for name in chosen for value in (first[name]["x"], second[name]["x"], None)],
            y=[value for name in chosen for value in (first[name]["y"], second[name]["y"], None)],
            mode="lines",
            name=f"{len(chosen)} classes {title}",
            line={"color": tone, "width": 1.5},
            opacity=0.55,
            hoverinfo="skip",
            visible=True if len(shared) <= _CROWD else "legendonly",
        )
