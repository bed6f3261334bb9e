"""What the best detections of the classes get wrong, by frequency group: 2DRCL's five types (NeurIPS'24, figure 2)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from tailfin.evaluation.error_types import TYPES
from tailfin.report.evaluated import looks
from tailfin.report.page import Section, chart, group_name, label, render
from tailfin.report.runs import Run

# green is right; an error of the class is orange, one of the place blue, none of an object grey
_COLORS = {
    "correct": "#10a37f",
    "location": "#2f7de1",
    "background": "#93a1b1",
    "classification": "#f0801a",
    "other": "#8e6bf0",
}
_SHOWN = ("correct", "classification", "location", "other", "background")


def errors(runs: Sequence[Run]) -> Section | None:
    """A stacked bar per group and run; None where no run has detections."""
    seen, note = looks(runs)
    found = [(number, own.errors) for number, own in seen]
    if not found:
        return Section("Errors", render("errors.html", chart="", note=note, left=[])) if note else None
    groups = [
        group for group in ("all", "r", "c", "f") if any(np.isfinite(value["macro"][group]).all() for _, value in found)
    ]
    bars = [(group, number, value["macro"][group]) for group in groups for number, value in found]
    titles = ["all" if group == "all" else group_name(group) for group, _, _ in bars]
    ticks = [[label(title) for title in titles], [label(runs[number].name) for _, number, _ in bars]]
    figure = go.Figure()
    for kind in _SHOWN:
        shares = [100 * float(value[TYPES.index(kind)]) for _, _, value in bars]
        figure.add_bar(
            x=ticks if len(found) > 1 else ticks[0],
            y=[share if np.isfinite(share) else None for share in shares],
            name=kind,
            marker={"color": _COLORS[kind]},
            text=[f"{share:.0f}" if share >= 4 else "" for share in shares],
            textposition="inside",
            textangle=0,
            hovertemplate="%{x}<br>" + kind + " <b>%{y:.1f} %</b><extra></extra>",
        )
    figure.update_layout(
        barmode="stack",
        meta={"lies": True},  # on a narrow page
        bargap=0.3,
        yaxis={"title": "share of a class's best detections (%)", "range": [0, 100]},
        xaxis={"tickangle": 0, "showgrid": False},
        legend={"traceorder": "normal"},
    )
    left = [
        f"{runs[number].name}: {int(short.sum())} classes have fewer detections than objects"
        for number, value in found
        if (short := value["counts"].sum(axis=1) < value["num_gt"]).any()
    ]
    return Section("Errors", render("errors.html", chart=chart(figure, height=440), note=note, left=left))
