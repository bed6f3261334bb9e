"""`tailfin convert`: a detector of another project's model zoo as a model file of tailfin."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def convert(
    checkpoint: Annotated[
        str, typer.Argument(help=".pth or .pkl of detectron2, mmdetection or torchvision; coco: torchvision's own.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes of the recipe.")
    ] = None,
    recipe: Annotated[str, typer.Option(help="The detector that the checkpoint is one of.")] = "",
    classes: Annotated[
        Path, typer.Option(help="Annotation file whose classes and counts the model gets, or a text file of names.")
    ] = Path(),
    out: Annotated[Path, typer.Option(help="Model file to write.")] = Path("model.safetensors"),
    style: Annotated[str, typer.Option(help="caffe or pytorch, where the checkpoint does not say it.")] = "",
    source_classes: Annotated[
        Path | None, typer.Option(help="The checkpoint's classes in its order: a text file, or its annotation file.")
    ] = None,
    aliases: Annotated[
        Path | None, typer.Option("--map", help="File of `name in --classes: name in the checkpoint`.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
) -> None:
    """Convert a detector of detectron2, mmdetection, torchvision or transformers to a model file.

    The recipe says what the detector is; keys in which the project differs are set and shown. Classes are joined by
    name. A pickle that wants code is refused.
    """
    from tailfin.convert import convert as convert_model
    from tailfin.errors import UserError

    if not recipe or classes == Path():
        raise UserError("give --recipe, the detector that the checkpoint is one of, and --classes, a file")
    lines = convert_model(
        checkpoint,
        recipe,
        classes,
        out,
        overrides=overrides or (),
        style=style,
        source_classes=source_classes,
        aliases=aliases,
        overwrite=overwrite,
    )
    for line in lines:
        typer.echo(line)
