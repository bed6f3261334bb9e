"""The numbers: one table per kind of IoU, a row per run or per recipe with several seeds, the best value marked,
differences to the first row, grey where they may be the choice of pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailfin.report.page import Section, defined, render
from tailfin.report.runs import Run
from tailfin.report.seeds import Column, Difference, columns, difference

_FIRST = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")  # in this order, the others as they come
_KINDS = {"bbox": "Boxes", "segm": "Masks"}


def summary(runs: Sequence[Run]) -> Section:
    """Tables of all metrics in metrics.json."""
    shown = columns(runs)
    measured = [column for column in shown if any(run.metrics is not None for run in column.runs)]
    sure = {column.name: difference(measured[0], column) for column in measured[1:]}
    tables = [_table(measured, kind, sure) for kind in _KINDS]
    protocols = sorted({str(run.metrics.get("protocol", "unknown")) for run in runs if run.metrics is not None})
    fingerprints = {_fingerprint(run) for run in runs if run.metrics is not None} - {""}
    draws = [own.draws for own in sure.values() if own is not None]
    return Section(
        "Summary",
        render(
            "summary.html",
            tables=[table for table in tables if table["rows"]],
            protocols=protocols,
            different_data=len(fingerprints) > 1,
            several=len(measured) > 1,
            seeds=any(column.seeds > 1 for column in measured),
            draws=min(draws, default=0),
            waiting=[run.name for run in runs if run.metrics is None],
        ),
    )


# ---- details ---------------------------------------------------------------------------------------------------------


def _fingerprint(run: Run) -> str:
    """Hash of the evaluated file, where the environment has it."""
    data = run.environment.get("data")
    return str(data.get("val") or "") if isinstance(data, dict) else ""


def _table(shown: Sequence[Column], kind: str, sure: dict[str, Difference | None]) -> dict[str, Any]:
    measured = [
        column
        for column in shown
        if any(run.metrics is not None and isinstance(run.metrics.get(kind), dict) for run in column.runs)
    ]
    seen = dict.fromkeys(
        key
        for column in measured
        for run in column.runs
        for key, value in ((run.metrics or {}).get(kind) or {}).items()
        if _numeric(value)
    )
    keys = [key for key in _FIRST if key in seen] + [key for key in seen if key not in _FIRST]
    means = [{key: column.mean(kind, key) for key in keys} for column in measured]
    best = {key: max((value for own in means if defined(value := own[key])), default=None) for key in keys}
    rows = []
    for position, (column, own) in enumerate(zip(measured, means, strict=True)):
        cells = []
        for key in keys:
            value, base, values = own[key], means[0][key], column.values(kind, key)
            known = sure.get(column.name) if kind == "bbox" else None
            cells.append(
                {
                    "value": value,
                    "range": (min(values), max(values)) if len(values) > 1 else None,
                    "best": len(measured) > 1 and defined(value) and round(value, 4) == round(best[key] or 0, 4),
                    "change": value - base if position and defined(value) and defined(base) else None,
                    "interval": known.metrics.get(key) if known is not None else None,
                }
            )
        rows.append({"name": column.name, "color": column.color, "cells": cells})
    return {"title": _KINDS[kind], "keys": keys, "rows": rows}


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
