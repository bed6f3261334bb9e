"""Every class with its counts and its AP in each run, as a table that sorts and filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tailfin.report.page import Section, defined, group_choices, render
from tailfin.report.runs import Run
from tailfin.report.seeds import Column, Difference, columns, difference


def class_table(runs: Sequence[Run]) -> Section | None:
    """One row per class name, rarest first; None where no run has numbers per class. Seeds of a recipe are one column,
    their mean."""
    shown = [column for column in columns(runs) if any(run.categories for run in column.runs)]
    if not shown:
        return None
    tables = [_merged(column) for column in shown]
    kinds = [
        kind
        for kind in ("bbox", "segm")
        if any(isinstance(entry.get(kind), dict) for table in tables for entry in table.values())
    ]
    heads = [
        {
            "run": column.name,
            "color": column.color,
            "index": index,
            "kind": kind,
            "key": key,
            "title": _title(kind, key),
        }
        for kind in kinds
        for key in ("AP", "AP50")
        for index, column in enumerate(shown)
    ]
    compared = len(shown) == 2
    sure = difference(*shown) if compared else None
    rows = [_row(name, tables, heads, kinds, compared, sure) for name in _names(tables)]
    html = render(
        "classes.html",
        rows=rows,
        columns=heads,
        changes=[_title(kind, "AP") for kind in kinds] if compared else [],
        groups=group_choices(row["frequency"] for row in rows),
        several=len(shown) > 1,
        sure=sure is not None,
        linked=any(run.results.is_file() for run in runs),
    )
    return Section("Classes", html)


# ---- details ---------------------------------------------------------------------------------------------------------


def _title(kind: str, key: str) -> str:
    return key if kind == "bbox" else f"mask {key}"


def _names(tables: Sequence[dict[str, dict[str, Any]]]) -> list[str]:
    """All class names by ascending number of training images."""
    first: dict[str, dict[str, Any]] = {}
    for table in tables:
        for name, entry in table.items():
            first.setdefault(name, entry)

    def images(name: str) -> float:
        value = first[name].get("image_count")
        return value if defined(value) else float("inf")

    return sorted(first, key=lambda name: (images(name), name))


def _merged(column: Column) -> dict[str, dict[str, Any]]:
    """Class name -> its entry of metrics.json; of several seeds the mean of what all have."""
    tables = [{str(entry.get("name", entry.get("id"))): entry for entry in run.categories} for run in column.runs]
    tables = [table for table in tables if table]
    merged = {name: dict(entry) for table in reversed(tables) for name, entry in table.items()}
    if len(tables) == 1:
        return merged
    for name, entry in merged.items():
        for kind in ("bbox", "segm"):
            own = [table[name][kind] for table in tables if isinstance(table.get(name, {}).get(kind), dict)]
            if own:
                found = {key: [values[key] for values in own if defined(values.get(key))] for key in own[0]}
                entry[kind] = {key: float(np.mean(values)) if values else -1 for key, values in found.items()}
    return merged


def _row(
    name: str,
    tables: Sequence[dict[str, dict[str, Any]]],
    columns: Sequence[dict[str, Any]],
    kinds: Sequence[str],
    compared: bool,
    sure: Difference | None,
) -> dict[str, Any]:
    entry = next(table[name] for table in tables if name in table)
    frequency = entry.get("frequency")
    changes = []
    for kind in kinds if compared else ():
        before, after = ((table.get(name, {}).get(kind) or {}).get("AP") for table in tables)
        interval = sure.classes.get(name) if sure is not None and kind == "bbox" else None
        change = after - before if defined(before) and defined(after) else None
        changes.append({"value": change, "interval": interval})
    return {
        "name": name,
        "frequency": "" if frequency is None else str(frequency),
        "images": entry.get("image_count"),
        "instances": entry.get("instance_count"),
        "values": [(tables[c["index"]].get(name, {}).get(c["kind"]) or {}).get(c["key"]) for c in columns],
        "changes": changes,
    }
