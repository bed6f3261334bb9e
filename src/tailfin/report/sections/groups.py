"""AP by frequency group: bars per run, with the number of classes and their range of training images."""

from __future__ import annotations

import re
from collections.abc import Sequence

import plotly.graph_objects as go
from markupsafe import Markup

from tailfin.report.page import Section, chart, color, count, defined, group_name, label, render
from tailfin.report.runs import Run

_ORDER = {"APr": "r", "APc": "c", "APf": "f"}


def groups(runs: Sequence[Run]) -> Section | None:
    """One bar chart per kind of IoU; None where no run has numbers by group."""
    charts = [(title, _bars(runs, kind)) for kind, title in (("bbox", "Boxes"), ("segm", "Masks"))]
    charts = [(title, html) for title, html in charts if html]
    if not charts:
        return None
    titled = len(charts) > 1
    return Section(
        "AP by frequency group", render("charts.html", charts=charts, titled=titled, columns=2 if titled else 1)
    )


# ---- details ---------------------------------------------------------------------------------------------------------


def _bars(runs: Sequence[Run], kind: str) -> Markup | None:
    values = [((run.metrics or {}).get(kind) or {}) for run in runs]
    keys = [key for key in ("AP", *_ORDER) if any(defined(value.get(key)) for value in values)]
    keys += sorted({key for value in values for key in value if re.fullmatch(r"AP[1-9]", key) and defined(value[key])})
    if len(keys) < 2:  # AP alone is in the table
        return None
    ticks = [_tick(runs, kind, key) for key in keys]
    figure = go.Figure()
    for index, (run, value) in enumerate(zip(runs, values, strict=True)):
        if not value:
            continue
        heights = [100 * value[key] if defined(value.get(key)) else None for key in keys]
        figure.add_bar(
            x=ticks,
            y=heights,
            name=label(run.name),
            marker={"color": color(index), "cornerradius": 4},
            text=["" if height is None else f"{height:.1f}" for height in heights],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x}<br><b>%{y:.2f}</b><extra>" + label(run.name) + "</extra>",
        )
    figure.update_layout(
        barmode="group",
        meta={"lies": True},  # on a narrow page
        bargap=0.35,
        bargroupgap=0.08,
        showlegend=len(runs) > 1,
        yaxis={"title": "AP (%)", "rangemode": "tozero"},
        xaxis={"type": "category", "tickangle": 0, "showgrid": False},
    )
    return chart(figure, height=380)


def _tick(runs: Sequence[Run], kind: str, key: str) -> str:
    """Group name, number of measured classes and their range of training images, from the first run that knows."""
    group = _ORDER.get(key, key[2:] or None)
    title = "all" if group is None else group_name(group)
    for run in runs:
        members = [
            entry
            for entry in run.categories
            if (group is None or str(entry.get("frequency")) == group) and defined((entry.get(kind) or {}).get("AP"))
        ]
        if not members:
            continue
        noun = "class" if len(members) == 1 else "classes"
        images = [entry["image_count"] for entry in members if defined(entry.get("image_count"))]
        span = ""
        if images:
            low, high = count(min(images)), count(max(images))
            span = f"<br>{low if low == high else f'{low}–{high}'} images"
        return f"<b>{label(title)}</b><br>{len(members)} {noun}{span}"
    return f"<b>{label(title)}</b>"
