"""What each kind of mistake costs, in points of AP50: TIDE's dAP, per frequency group and per class, and the five types
of every class's best detections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tailfin.evaluation.error_types import TYPES
from tailfin.evaluation.tide import MAIN, SPECIAL
from tailfin.report.evaluated import Look, looks
from tailfin.report.page import Section, color, group_choices, group_name, render
from tailfin.report.runs import Run

TITLES = {
    "Cls": "class",
    "Loc": "place",
    "Both": "both",
    "Dupe": "twice",
    "Bkg": "background",
    "Miss": "missed",
    "FalsePos": "all wrong",
    "FalseNeg": "all not found",
}
ORDER = ("correct", "classification", "location", "other", "background")


def costs(runs: Sequence[Run]) -> Section | None:
    """A table by group and run, and one by class; None without detections."""
    found, _ = looks(runs)  # what hinders a run is said by the section about errors
    if not found:
        return None
    groups = [group for group in ("all", "r", "c", "f") if any(_known(own, group) for _, own in found)]
    html = render(
        "costs.html",
        kinds=[(kind, TITLES[kind]) for kind in (*MAIN, *SPECIAL)],
        groups=[
            {
                "key": group,
                "name": "all" if group == "all" else group_name(group),
                "rows": [
                    {"name": runs[number].name, "color": color(number), **_group(own, group)}
                    for number, own in found
                    if _known(own, group)
                ],
            }
            for group in groups
        ],
        columns=[{"name": runs[number].name, "color": color(number)} for number, _ in found],
        several=len(found) > 1,
        rows=(rows := _classes(runs, found)),
        choices=group_choices(row["group"] for row in rows),
        shown=[(kind, TITLES[kind]) for kind in MAIN],
        types=[(kind, TYPES.index(kind)) for kind in ORDER],
    )
    return Section("What mistakes cost", html)


# ---- details ---------------------------------------------------------------------------------------------------------


def _known(own: Look, group: str) -> bool:
    return bool(np.isfinite(own.tide["groups"][group]["AP50"]))


def _group(own: Look, group: str) -> dict[str, Any]:
    values = own.tide["groups"][group]
    gains = {**values["main"], **values["special"]}
    worst = max(MAIN, key=lambda kind: values["main"][kind])
    return {
        "ap": values["AP50"] / 100,
        "cells": [
            {"value": gains[kind] / 100, "worst": kind == worst and gains[kind] > 0} for kind in (*MAIN, *SPECIAL)
        ],
    }


def _classes(runs: Sequence[Run], found: Sequence[tuple[int, Look]]) -> list[dict[str, Any]]:
    """One row per class with objects, the rarest first; classes of several runs are joined by name."""
    rows: dict[str, dict[str, Any]] = {}
    for number, own in found:
        images = {int(entry["id"]): entry.get("image_count") for entry in runs[number].categories if "id" in entry}
        table, counts = own.tide["per_category"], own.errors["counts"]
        for place in np.flatnonzero(np.isfinite(table["AP50"])).tolist():
            category = own.truth.categories[place]
            known = images.get(category.id)
            row = rows.setdefault(
                category.name or str(category.id),
                {
                    "name": category.name or str(category.id),
                    "group": own.letters[place] or "",
                    "images": float("inf") if known is None else known,
                    "objects": int(own.errors["num_gt"][place]),
                    "runs": {},
                },
            )
            total = int(counts[place].sum())
            gains = [float(table[kind][place]) / 100 for kind in MAIN]
            row["runs"][number] = {
                "ap": float(table["AP50"][place]) / 100,
                "gains": gains,
                "worst": int(np.argmax(gains)) if max(gains) > 0 else -1,
                "types": [100 * float(counts[place][TYPES.index(kind)]) / total for kind in ORDER] if total else None,
            }
    listed = sorted(rows.values(), key=lambda row: (row["images"], row["name"]))
    return [{**row, "cells": [row["runs"].get(number) for number, _ in found]} for row in listed]
