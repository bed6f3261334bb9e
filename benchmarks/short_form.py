"""The short form of a benchmark, `--short`: smaller sizes, one thread, CPU seconds, and lines for docs/performance.md.

short(parser, rounds=3, cpu_time=True)      adds the option, which sets these values
line(what, ours, peer, ratio)               one line of the page, which `performance.py` takes from the output
table_lines(table, ...)                     the rows of a printed table as such lines
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table


class _Short(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str, values: dict[str, Any], **more: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, default=False, help="small, one thread, CPU seconds", **more)
        self.values = values

    def __call__(self, parser: object, namespace: argparse.Namespace, *_: object) -> None:
        for name, value in {**self.values, self.dest: True}.items():
            setattr(namespace, name, value)


def short(parser: argparse.ArgumentParser, **values: Any) -> None:
    """Add `--short`; options that come after it go before its values."""
    parser.add_argument("--short", action=_Short, values=values)


def line(what: str, ours: str, peer: str = "", ratio: str = "") -> None:
    """Print a line of the page; `what` says on what, `peer` begins with who that is."""
    print("| " + " | ".join(" ".join(cell.split()) for cell in (what, ours, peer, ratio)) + " |", flush=True)


def table_lines(
    table: Table,
    before: str,
    *,
    unit: str = "",
    ours: int = 1,
    peer: int | None = 2,
    ratio: int | None = 3,
    spread: int | None = None,
    who: str = "",
) -> None:
    """Print every row of `table`: its first column behind `before`, and the columns `ours`, `peer`, `ratio` with the
    range `spread` over the rounds."""
    columns = [[str(cell) for cell in column._cells] for column in table.columns]
    for number, name in enumerate(columns[0]):
        shown = [columns[own][number] if own is not None else "" for own in (ours, peer)]
        shown = [f"{cell}{unit}" if cell else "" for cell in shown]
        found = columns[ratio][number] if ratio is not None else ""
        if found and spread is not None and columns[spread][number]:
            found += f" ({columns[spread][number].replace(' .. ', ' to ')})"
        line(f"{before}{name}", shown[0], f"{who} {shown[1]}" if shown[1] else "", found)


def data(name: str, part: str = "") -> Path | None:
    """A file or folder of a set in the folder that TAILFIN_DATA names, where there is one."""
    root = os.environ.get("TAILFIN_DATA")
    path = Path(root, name, part) if root else None
    return path if path is not None and path.exists() else None
