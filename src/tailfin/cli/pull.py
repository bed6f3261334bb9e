"""`tailfin pull`: a model from the hub or from a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def pull(
    source: Annotated[str, typer.Argument(help="OWNER/NAME on the hub, or a folder (/path, ./path, path/).")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model that is there.")] = False,
) -> None:
    """Get a model from a model hub or a folder; it is opened and checked before it is there."""
    from tailfin.hub import pull as pull_model

    typer.echo(str(pull_model(source, out, revision=revision, overwrite=overwrite)))
