"""`data stats`: how long the tail of a data set is, as text, JSON and a picture, and what to run on it.

Counts are those of `ClassStats` (crowds included); box sizes leave crowds out and use COCO's bounds on `area`.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray
from plotly.subplots import make_subplots
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailfin.data.advice import advise
from tailfin.data.check import crowd_note, negative_lists_note
from tailfin.data.index import AnnotationIndex
from tailfin.errors import UserError, printable
from tailfin.files import write_atomic
from tailfin.stats import ClassStats, gini, imbalance_factor

GROUP_NAMES = {"r": "rare", "c": "common", "f": "frequent", "": "in no group"}
GROUP_COLORS = {"r": "#e5484d", "c": "#f0801a", "f": "#2f7de1", "": "#5b7083"}
SIZE_NAMES = ("small", "medium", "large")
SIZE_BOUNDS = (32**2, 96**2)  # COCO's, pixels of area
BARS = " ▁▂▃▄▅▆▇█"


def summarize(index: AnnotationIndex, stats: ClassStats, images: Path | None = None) -> dict[str, Any]:
    """Everything `data stats` knows, as plain values for JSON; classes are ordered by falling image count.

    `images` is the folder of the pictures, where it was named.
    """
    sizes = np.bincount(np.digitize(index.areas[~index.crowd], SIZE_BOUNDS), minlength=3)
    long_sides = np.maximum(index.widths, index.heights)
    advice = advise(stats, index.path, images, float(np.median(long_sides)) if len(index) else 0)
    order = np.lexsort((stats.category_ids, -stats.instance_count, -stats.image_count))
    return {
        "file": str(index.path),
        "fingerprint": index.fingerprint,
        "images": len(index),
        "images_without_annotation": len(index) - stats.num_annotated_images,
        "annotations": len(index.labels),
        "crowd": int(np.count_nonzero(index.crowd)),
        "federated": index.federated,
        "classes": stats.num_classes,
        "gini": {"images": gini(stats.image_count), "instances": gini(stats.instance_count)},
        "imbalance_factor": {
            "images": _finite(imbalance_factor(stats.image_count)),
            "instances": _finite(imbalance_factor(stats.instance_count)),
        },
        "groups": {name: stats.frequency.count(group) for group, name in GROUP_NAMES.items()},
        "box_sizes": dict(zip(SIZE_NAMES, sizes.tolist(), strict=True)),
        "notes": [note for note in (crowd_note(index), negative_lists_note(index)) if note],
        "advice": {**asdict(advice), "more": list(advice.more)},
        "per_class": [
            {
                "id": int(stats.category_ids[label]),
                "name": stats.names[label],
                "frequency": stats.frequency[label],
                "image_count": stats.image_count[label].item(),
                "instance_count": stats.instance_count[label].item(),
            }
            for label in order.tolist()
        ],
    }


def print_summary(summary: dict[str, Any], console: Console, *, most: int | None = 40) -> None:
    """The summary as text; of more than `most` classes the head and the tail are listed (None: all)."""
    classes, sizes = summary["per_class"], summary["box_sizes"]
    images, instances = ([entry[key] for entry in classes] for key in ("image_count", "instance_count"))
    boxes = max(sum(sizes.values()), 1)
    crowd = f" ({summary['crowd']} crowd)" if summary["crowd"] else ""
    factors = summary["imbalance_factor"]
    lines = [
        ("file", summary["file"]),
        ("images", f"{summary['images']}, {summary['images_without_annotation']} without annotation"),
        ("annotations", f"{summary['annotations']}{crowd} of {summary['classes']} classes"),
        ("Gini", f"{summary['gini']['images']:.3f} of images, {summary['gini']['instances']:.3f} of instances"),
        ("imbalance", f"{_factor(factors['images'])} of images, {_factor(factors['instances'])} of instances"),
        ("groups", ", ".join(f"{count} {name}" for name, count in summary["groups"].items())),
        ("box sizes", ", ".join(f"{name} {sizes[name] / boxes:.1%}" for name in SIZE_NAMES)),
        ("tail", f"{sparkline(images)} images per class, {max(images)} to {min(images)}, log scale"),
    ]
    for name, text in lines:
        console.print(_plain(f"{name:13}{text}"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("id", "images", "instances"):
        table.add_column(column, justify="right")
    table.add_column("group")
    table.add_column("class", overflow="fold")
    rows = list(zip(classes, images, instances, strict=True))
    head = len(rows) if most is None or len(rows) <= most else most // 2
    for entry, image, instance in rows[:head]:
        table.add_row(str(entry["id"]), str(image), str(instance), entry["frequency"], _plain(entry["name"]))
    if head < len(rows) and most is not None:
        table.add_row("...", "...", "...", "", Text(f"... {len(rows) - 2 * head} more (--all-classes lists them)"))
        for entry, image, instance in rows[-head:]:
            table.add_row(str(entry["id"]), str(image), str(instance), entry["frequency"], _plain(entry["name"]))
    console.print(table)
    for note in summary["notes"]:
        console.print(_plain(f"note: {note}"), soft_wrap=True)
    advice = summary["advice"]
    console.print(_plain(f"advice: {advice['text']}"), soft_wrap=True)
    for name, text in (("run", advice["command"]), ("measured", advice["source"]), *(("", t) for t in advice["more"])):
        if text:
            console.print(_plain(f"  {name:11}{text}"), soft_wrap=True)


def _plain(text: str) -> Text:
    """A line that is no markup, and that a terminal shows as it is."""
    return Text(printable(text, lines=False))


def sparkline(counts: Sequence[float], width: int = 48) -> str:
    """Counts as a row of at most `width` block characters, log scale; each stands for the mean of its classes."""
    columns = np.array_split(np.asarray(counts, dtype=np.float64), min(width, len(counts)))
    heights = np.log1p([column.mean() for column in columns])
    top = heights.max()
    levels = np.ceil(heights / top * (len(BARS) - 1)).astype(int) if top > 0 else np.zeros(len(heights), int)
    return "".join(BARS[level] for level in levels)


def figure(summary: dict[str, Any], areas: NDArray[np.float64]) -> go.Figure:
    """Images and instances per class (log scale, coloured by group) above the distribution of box sizes."""
    classes = summary["per_class"]
    names = [_label(entry["name"]) for entry in classes]
    few = len(classes) <= 60  # more names do not fit below the axis
    slanted = len(classes) <= 25  # else upright
    longest = max(map(len, names), default=0) if few else 0
    below = min(longest, 40) * (3.5 if slanted else 6.5)  # pixels that the names take
    height = 600 + below
    picture = make_subplots(
        rows=2,
        cols=1,
        row_heights=[0.68, 0.32],
        vertical_spacing=(50 + below) / height,
        subplot_titles=("Classes", "Box sizes"),
    )
    for group, name in GROUP_NAMES.items():
        rows = [i for i, entry in enumerate(classes) if entry["frequency"] == group]
        if rows:
            picture.add_bar(
                x=rows,
                y=[classes[i]["image_count"] for i in rows],
                customdata=[[names[i], classes[i]["id"], classes[i]["instance_count"]] for i in rows],
                hovertemplate="%{customdata[0]} (id %{customdata[1]})<br>%{y} images, %{customdata[2]} instances",
                name=f"{name} ({len(rows)})",
                marker_color=GROUP_COLORS[group],
                row=1,
                col=1,
            )
    picture.add_scatter(
        x=list(range(len(classes))),
        y=[entry["instance_count"] or None for entry in classes],  # a log scale has no zero
        mode="markers",
        marker={"size": 4, "color": "#93a1b1"},
        hoverinfo="skip",
        name="instances",
        row=1,
        col=1,
    )
    counts, edges = np.histogram(np.sqrt(np.maximum(areas, 0)), bins=60)
    picture.add_bar(
        x=((edges[:-1] + edges[1:]) / 2).round(2).tolist(),
        y=counts.tolist(),
        hovertemplate="%{x:.0f} pixels: %{y} boxes<extra></extra>",
        marker_color="#10a37f",
        showlegend=False,
        row=2,
        col=1,
    )
    for bound in SIZE_BOUNDS:
        picture.add_vline(x=bound**0.5, line_dash="dot", line_color="#5b7083", row=2, col=1)
    picture.update_xaxes(
        tickmode="array",
        tickvals=list(range(len(classes))) if few else [],
        ticktext=names if few else [],
        tickangle=30 if slanted else 90,
        row=1,
        col=1,
    )
    picture.update_yaxes(title="images", type="log", dtick=1, row=1, col=1)
    picture.update_xaxes(title="square root of the area, pixels", row=2, col=1)
    picture.update_layout(template="plotly_white", bargap=0.1, height=height)
    return picture


def check_plot_path(path: Path) -> None:
    """Refuse a picture file that is not HTML, before any work is done."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the picture {path} must be an .html file (one that holds everything it needs)")


def write_picture(path: Path, picture: go.Figure) -> None:
    """Write one HTML file that needs nothing else; other endings are a `UserError`."""
    check_plot_path(path)
    write_atomic(path, picture.to_html(include_plotlyjs=True, full_html=True))


def _label(text: str) -> str:
    """A name for use in a chart: shown letter by letter, never read as Plotly's markup."""
    return html.escape(printable(text), quote=False)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _factor(value: float | None) -> str:
    return "none" if value is None else f"{value:.4g}"
