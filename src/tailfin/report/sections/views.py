"""What a pre-training has learnt to see: paired boxes in both views, reconstructions, masks, and similarities.

The pictures come from `RUN/stages/*/pictures.npz`, which the stage writes at its end; its docstring
(`tailfin.pretraining.look`) lists the arrays. An array is missing where its term was not trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup

from tailfin.errors import UserError
from tailfin.files import read_npz
from tailfin.report.draw import Color, data_uri, draw_detections
from tailfin.report.page import Section, chart, color, label, render
from tailfin.report.runs import Run

_PICTURES = 6  # per run
_SIDE = 320  # pixels of the long side
_PAIRS: tuple[Color, ...] = (
    (47, 125, 225),
    (240, 128, 26),
    (16, 163, 127),
    (214, 64, 159),
    (142, 107, 240),
    (201, 161, 0),
    (229, 72, 77),
    (91, 112, 131),
)
_MASK: Color = (255, 255, 255)
_BINS = 50
_TERMS = {"": "Pictures", "box_": "Boxes"}


def pretraining(runs: Sequence[Run]) -> Section | None:
    """Panels of each pre-trained run and a histogram of similarities; None where no run has pictures."""
    shown: list[dict[str, Any]] = []
    notes: list[str] = []
    charts: list[tuple[str, Markup]] = []
    found = [(index, run, path) for index, run in enumerate(runs) for path in sorted(run.path.glob(_GLOB))]
    if not found:
        return None
    read: list[tuple[int, Run, Mapping[str, np.ndarray]]] = []
    for index, run, path in found:
        try:
            arrays = _read(path)
            shown.append({"name": run.name, "color": color(index), "pictures": _panels(arrays)})
            read.append((index, run, arrays))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            notes.append(f"{run.name}: {path.name} of stage {path.parent.name} cannot be shown ({error})")
    for prefix, title in _TERMS.items():
        if (figure := _similarities(read, prefix)) is not None:
            charts.append((title, figure))
    html = render("pretraining.html", runs=shown, notes=notes, charts=charts, several=len(shown) > 1)
    return Section("Pre-training", html)


# ---- details ---------------------------------------------------------------------------------------------------------

_GLOB = "stages/*/pictures.npz"


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path)
    except UserError as error:
        raise ValueError(str(error)) from None


def _panels(arrays: Mapping[str, np.ndarray]) -> list[list[dict[str, Any]]]:
    """Per picture its panels: title, note and picture, ready for the page."""
    rows = []
    for number in range(min(len(arrays["view1"]), _PICTURES)):
        boxes, paired = arrays["boxes1"][number], arrays["boxes2"][number]
        real = np.isfinite(boxes).all(axis=1) & np.isfinite(paired).all(axis=1)
        pairs = f"{int(real.sum())} pairs of boxes" if real.sum() != 1 else "1 pair of boxes"
        size1, size2 = arrays["size1"][number], arrays["size2"][number]
        panels = [
            _panel("view 1", pairs, arrays["view1"][number], size1, boxes[real]),
            _panel("view 2", "a number is the same box", arrays["view2"][number], size2, paired[real]),
        ]
        if "reconstruction" in arrays:
            mask = arrays["masks"][number] if "masks" in arrays else np.zeros(4)
            solid = bool((mask[2:] > mask[:2]).all())
            note = "the dashed part is masked, then encoded again" if solid else ""
            made = arrays["reconstruction"][number]
            panels.append(
                _panel("reconstruction of view 1", note, made, size1, mask[None] if solid else None, mask=True)
            )
        rows.append(panels)
    return rows


def _panel(
    title: str, note: str, picture: np.ndarray, size: np.ndarray, boxes: np.ndarray | None, *, mask: bool = False
) -> dict[str, Any]:
    height, width = int(size[0]), int(size[1])
    pixels = np.ascontiguousarray(picture[:, :height, :width].transpose(1, 2, 0))
    boxes = np.zeros((0, 4)) if boxes is None else np.asarray(boxes, dtype=np.float64)
    count = len(boxes)
    drawn = draw_detections(
        pixels,
        boxes,
        np.arange(count),
        [],
        size=_SIDE,
        colors=[_MASK] * count if mask else [_PAIRS[place % len(_PAIRS)] for place in range(count)],
        texts=[""] * count if mask else [str(place + 1) for place in range(count)],
        dashed=np.full(count, mask),
    )
    return {"title": title, "note": note, "image": data_uri(drawn)}


def _similarities(read: Sequence[tuple[int, Run, Mapping[str, np.ndarray]]], prefix: str) -> Markup | None:
    """Histogram of the cosine of queries with their own keys (filled) and with the queue's (outline)."""
    figure = go.Figure()
    edges = np.linspace(-1, 1, _BINS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    several = len(read) > 1
    for index, run, arrays in read:
        for kind, title in (("positive", "same"), ("negative", "queue")):
            values = arrays.get(f"{prefix}{kind}")
            if values is None or not values.size:
                continue
            counts, _ = np.histogram(np.clip(values, -1, 1), edges)
            name = f"{label(run.name)}: {title}" if several else title
            figure.add_scatter(
                x=middle,
                y=100 * counts / values.size,
                mode="lines",
                line={
                    "shape": "hvh",
                    "color": color(index if several else kind == "negative"),
                    "dash": "solid" if kind == "positive" else "dot",
                },
                fill="tozeroy" if kind == "positive" else "none",
                opacity=0.9,
                name=name,
                hovertemplate="%{x:.2f}: <b>%{y:.1f} %</b><extra>" + name + "</extra>",
            )
    if not figure.data:
        return None
    figure.update_layout(
        xaxis={"title": "cosine similarity", "range": [-1, 1]}, yaxis={"title": "share (%)", "rangemode": "tozero"}
    )
    return chart(figure, height=340)
