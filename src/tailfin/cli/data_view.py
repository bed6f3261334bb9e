"""`tailfin data view FILE`: a data set on one page."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from tailfin.cli.output import echo
from tailfin.progress import Progress


def view(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="COCO or LVIS annotation file.")],
    images: Annotated[
        Path | None, typer.Option("--images", help="Image folder; else the folder with the file's stem, else its own.")
    ] = None,
    val: Annotated[
        Path | None, typer.Option(help="Another file: which of its pictures are among these; else none is compared.")
    ] = None,
    val_images: Annotated[Path | None, typer.Option(help="Image folder of --val.")] = None,
    out: Annotated[Path | None, typer.Option(help="The HTML file. Default: FILE-view.html beside FILE.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of each class; fewer of many classes.")] = 20,
) -> None:
    """Write one page: classes with pictures and boxes, near duplicates, leaks into --val, odd boxes."""
    from tailfin.report.data_view import write_view

    target = out or file.with_name(f"{file.stem}-view.html")
    written = write_view(file, target, images=images, val=val, val_images=val_images, pictures=pictures, track=_track)
    echo(f"data view: {written}")


def _track(paths: Iterable[Path], total: int) -> Iterator[Path]:
    with Progress("comparing pictures", total, enabled=total >= 2000) as progress:
        for done, path in enumerate(paths, 1):
            progress.update(done)
            yield path
