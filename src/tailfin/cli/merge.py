"""`tailfin merge`: one detector of the classes of two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def merge(
    first: Annotated[Path, typer.Argument(help="Model file or run; features and shared classes are its.")],
    second: Annotated[Path, typer.Argument(help="Model file or run whose further classes are added.")],
    out: Annotated[Path, typer.Option(help="Model file to write.")],
    aliases: Annotated[
        Path | None, typer.Option("--map", help="File of `name in the first: name in the second`.")
    ] = None,
    as_start: Annotated[
        bool, typer.Option("--as-start", help="Features may differ: a start for a training on the data of both.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Merge the classes of two models with the same features into one detector.

    Body, pyramid, proposals and shared layers must be the same weights in both; rows of classes are joined by name.
    Models whose features differ are refused, or written as a start for training.
    """
    from tailfin.merging import merge_models

    for line in merge_models(first, second, out, aliases=aliases, as_start=as_start, overwrite=overwrite):
        typer.echo(line)
