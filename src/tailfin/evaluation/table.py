"""Metrics as plain tables: values times 100 with one decimal, `-` where the protocol defines none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from tailfin.errors import UserError, printable
from tailfin.evaluation.operating import OperatingPoints
from tailfin.evaluation.protocols import IOU_TYPES

FREQUENCY_NAMES = {"r": "rare", "c": "common", "f": "frequent"}
LONGEST = max(map(len, FREQUENCY_NAMES.values()))


def metrics_table(metrics: Mapping[str, Any], title: str | None = None) -> Table:
    """One row per metric, one column per IoU type, from what `evaluate` returns."""
    kinds = [kind for kind in IOU_TYPES if kind in metrics]
    table = _table(title or f"protocol {metrics['protocol']}", "metric", kinds)
    for name in _names([metrics[kind] for kind in kinds]):
        table.add_row(name, *(percent(metrics[kind].get(name)) for kind in kinds))
    return table


def per_category_table(
    metrics: Mapping[str, Any], iou_type: str | None = None, *, sort_by: str = "AP", limit: int | None = None
) -> Table:
    """One row per class, the best `sort_by` first and classes without a value last; `limit` keeps the first rows."""
    kind = iou_type or next((kind for kind in IOU_TYPES if kind in metrics), IOU_TYPES[0])
    rows = [row for row in metrics["per_category"] if kind in row]
    if rows and sort_by not in rows[0][kind]:
        raise UserError(f'there is no "{sort_by}" per class (choices: {", ".join(rows[0][kind])})')
    rows = sorted(rows, key=lambda row: (-row[kind][sort_by], row["id"]))[:limit]
    names = list(rows[0][kind]) if rows else []
    table = _table(f"{kind} per class", "class", ["group", "train images", *names])
    for row in rows:
        images = "-" if row["image_count"] is None else f"{row['image_count']:,}"
        group = FREQUENCY_NAMES.get(row["frequency"], "-")
        shown = Text(printable(row["name"], lines=False))
        table.add_row(shown, group, images, *(percent(row[kind][name]) for name in names))
    return table


def comparison_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Several runs side by side: one row per metric and IoU type, one column per run, the best value in bold."""
    protocols = {metrics["protocol"] for metrics in runs.values()}
    title = f"protocol {', '.join(sorted(protocols))}"
    table = _table(title, "metric", list(runs))
    for kind in (kind for kind in IOU_TYPES if any(kind in metrics for metrics in runs.values())):
        for name in _names([metrics.get(kind, {}) for metrics in runs.values()]):
            values = [metrics.get(kind, {}).get(name) for metrics in runs.values()]
            shown = [percent(value) for value in values]
            best = max((value for value in values if value is not None and value >= 0), default=None)
            distinct = len(protocols) == 1 and best is not None and len(set(shown)) > 1
            cells = [Text(text, style="bold" if distinct and text == percent(best) else "") for text in shown]
            table.add_row(f"{kind} {name}", *cells)
    return table


def operating_table(points: OperatingPoints, title: str = "") -> Table:
    """One row per class: threshold, how much of it is the class's own, what it gives, and how sure that is."""
    about = points.aim.partition("=")[0]
    columns = ["threshold", "objects", "own", "precision", "recall", "f1", f"90 % of {about}", "reached"]
    table = _table(f"{title} thresholds for {points.aim}".strip(), "class", columns)
    for name, point in points.points.items():
        values = (percent(value) for value in (point.precision, point.recall, point.f1))
        sure = f"{100 * point.low:.0f} to {100 * point.high:.0f}"
        numbers = (f"{point.threshold:.3f}", f"{point.examples:,}", f"{100 * point.own:.0f} %")
        shown = Text(printable(name, lines=False))
        table.add_row(shown, *numbers, *values, sure, "yes" if point.reached else "no")
    return table


def difference_table(found: Mapping[str, Any], title: str = "") -> Table:
    """One row per metric of what `paired_bootstrap` returns: both sides, the difference and its interval."""
    held = f"{100 * found['level']:g} % over images"
    table = _table(title or "differences", "metric", ["against", "this", "difference", held, "beyond"])
    for name, row in found["metrics"].items():
        sides = (_spread(row[side]) for side in "ab")
        interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        style = "" if row["beyond"] else "dim"
        cells = (*sides, f"{100 * row['difference']:+.1f}", interval, "yes" if row["beyond"] else "no")
        table.add_row(Text(name, style=style), *(Text(cell, style=style) for cell in cells))
    return table


def _spread(values: list[float]) -> str:
    """The mean, and the range of several seeds."""
    mean = percent(sum(values) / len(values))
    return mean if len(values) == 1 else f"{mean} ({percent(min(values))} to {percent(max(values))})"


def percent(value: float | None) -> str:
    """0.1234 -> "12.3"; None and -1 -> "-"."""
    return "-" if value is None or value < 0 else f"{100 * value:.1f}"


def _table(title: str, first: str, columns: list[str]) -> Table:
    table = Table(title=Text(title), title_justify="left")
    table.add_column(first, overflow="fold")  # a long name goes on in the next line, whole
    for name in columns:
        group = name == "group"
        table.add_column(Text(name), justify="left" if group else "right", min_width=LONGEST if group else None)
    return table


def _names(summaries: list[Mapping[str, float]]) -> list[str]:
    """All metric names, in the order of their first appearance."""
    return list(dict.fromkeys(name for summary in summaries for name in summary))
