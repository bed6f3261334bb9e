"""Every class with its counts and its AP in each run, as a table that sorts and filters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailfin.report.page import Section, color, defined, group_choices, render
from tailfin.report.runs import Run


def class_table(runs: Sequence[Run]) -> Section | None:
    """One row per class name, rarest first; None where no run has numbers per class."""
    tables = [{str(entry.get("name", entry.get("id"))): entry for entry in run.categories} for run in runs]
    if not any(tables):
        return None
    kinds = [
        kind
        for kind in ("bbox", "segm")
        if any(isinstance(entry.get(kind), dict) for table in tables for entry in table.values())
    ]
    measured = [index for index, table in enumerate(tables) if table]
    columns = [
        {
            "run": runs[index].name,
            "color": color(index),
            "index": index,
            "kind": kind,
            "key": key,
            "title": _title(kind, key),
        }
        for kind in kinds
        for key in ("AP", "AP50")
        for index in measured
    ]
    compared = len(measured) == 2
    rows = [_row(name, tables, columns, kinds, measured if compared else []) for name in _names(tables)]
    html = render(
        "classes.html",
        rows=rows,
        columns=columns,
        changes=[_title(kind, "AP") for kind in kinds] if compared else [],
        groups=group_choices(row["frequency"] for row in rows),
        several=len(measured) > 1,
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


def _row(
    name: str,
    tables: Sequence[dict[str, dict[str, Any]]],
    columns: Sequence[dict[str, Any]],
    kinds: Sequence[str],
    compared: Sequence[int],
) -> dict[str, Any]:
    entry = next(table[name] for table in tables if name in table)
    frequency = entry.get("frequency")
    changes = []
    for kind in kinds if compared else ():
        before, after = ((tables[index].get(name, {}).get(kind) or {}).get("AP") for index in compared)
        changes.append(after - before if defined(before) and defined(after) else None)
    return {
        "name": name,
        "frequency": "" if frequency is None else str(frequency),
        "images": entry.get("image_count"),
        "instances": entry.get("instance_count"),
        "values": [(tables[c["index"]].get(name, {}).get(c["kind"]) or {}).get(c["key"]) for c in columns],
        "changes": changes,
    }
