"""`tailfin push`: a model with a card to the hub or to a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    model: Annotated[Path, typer.Argument(help="RUN/model.safetensors, or the run folder.")],
    target: Annotated[str, typer.Argument(help="OWNER/NAME on the hub, or a folder (/path, ./path, path/).")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a model in a folder.")] = False,
) -> None:
    """Put a model with its recipe, numbers and a card to a model hub or a folder."""
    from tailfin.hub import push as push_model

    typer.echo(push_model(model, target, private=private, overwrite=overwrite))
