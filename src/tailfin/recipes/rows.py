"""The published rows: every result row of the three papers as printed, from `published.json` beside this file."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec

from tailfin.errors import UserError, nearest


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One printed result. `metrics` are percent (cost figures in their own units); None is a dash or a lost cell."""

    id: str  # paper/table/method[+2drcl]/dataset/backbone[/switch]
    paper: str
    table: str
    row: int  # order in the table
    method: str  # as printed
    method_key: str
    is_proposed: bool  # any part of the paper's own method is on
    role: Literal["baseline", "comparison", "ablation", "full"]
    dataset: str
    detector: str | None  # None: the paper does not say
    backbone: str
    sampler: str | None
    schedule: str | None
    pretraining: str | None
    settings: dict[str, Any]  # the row's switches; all else stands at the paper's defaults
    metrics: dict[str, float | None]
    metric_kind: Literal["box", "mask", "both"]
    values: Literal["printed", "partial", "dash", "figure"]
    inferred: list[str]  # fields that the table does not print
    same_numbers_as: list[str]
    doubt: str | None

    @property
    def caption(self) -> str:
        return papers()[self.paper].tables[self.table].caption

    @property
    def numbers(self) -> dict[str, float]:
        """The printed numbers under the names of `metrics.json` (box AP is "AP"; mask numbers end in "_m")."""
        return {("AP" if key == "AP_b" else key): value for key, value in self.metrics.items() if value is not None}


class Table(msgspec.Struct, frozen=True):
    """A table of a paper: what it shows and how many rows it has."""

    caption: str
    rows: int


class Paper(msgspec.Struct, frozen=True):
    """A paper with its default settings, and what is doubtful about its numbers as a whole."""

    title: str
    venue: str
    year: int
    defaults: dict[str, Any]
    doubts: list[str]
    tables: dict[str, Table]


def rows() -> tuple[Row, ...]:
    """All published rows, in the order of papers and tables."""
    return _data()[1]


def papers() -> dict[str, Paper]:
    """The three papers by key: 2drcl, stepwise, bacl."""
    return _data()[0]


def published_row(row_id: str) -> Row:
    """The row with this id; an unknown id is a `UserError` that names the nearest."""
    row = _by_id().get(row_id)
    if row is None:
        raise UserError(f'there is no published row "{row_id}"{nearest(row_id, _by_id())}')
    return row


# ---- details ---------------------------------------------------------------------------------------------------------


class _File(msgspec.Struct, frozen=True):
    version: int
    papers: dict[str, Paper]
    rows: tuple[Row, ...]


@cache
def _data() -> tuple[dict[str, Paper], tuple[Row, ...]]:
    data = msgspec.json.decode((Path(__file__).parent / "published.json").read_bytes(), type=_File)
    return data.papers, data.rows


@cache
def _by_id() -> dict[str, Row]:
    return {row.id: row for row in rows()}
