"""Lines and tables for the user whose names come from files."""

from __future__ import annotations

import typer
from rich.console import Console

from tailfin.errors import printable

PLAIN_WIDTH = 500  # of a table that is not on a terminal: one line per entry, no name is cut or folded


def table_console() -> Console:
    """Where tables go: as wide as the terminal, or wide enough for any name."""
    console = Console()
    return console if console.is_terminal else Console(width=PLAIN_WIDTH)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line; what a terminal would obey in the place of showing it appears as an escape."""
    typer.echo(printable(text), err=err)
