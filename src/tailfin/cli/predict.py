"""`tailfin predict`: detections for any pictures, as files and as drawings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailfin.cli.output import echo


def predict(
    model: Annotated[Path, typer.Argument(help="RUN/model.safetensors, or the run folder.")],
    paths: Annotated[
        list[str] | None, typer.Argument(metavar="PATH...", help="Images, folders, globs, videos, s3://... addresses.")
    ] = None,
    out: Annotated[
        Path, typer.Option(help="File to write: COCO results (.json), .csv, .parquet; or a folder of YOLO labels.")
    ] = Path("predictions.json"),
    format_name: Annotated[
        str | None,
        typer.Option("--format", help="json, csv, parquet or yolo; else what --out ends in (nothing: json)."),
    ] = None,
    lists: Annotated[list[Path] | None, typer.Option("--list", help="Text file of paths, one a line.")] = None,
    draw: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for pictures with drawn detections.")] = None,
    score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Keep detections from here on; else the model's thresholds, or 0.05. 0: all."),
    ] = None,
    draw_score: Annotated[float, typer.Option(min=0, max=1, help="Draw detections from this score on.")] = 0.3,
    classes: Annotated[str | None, typer.Option(help="Keep only these classes, separated by commas.")] = None,
    max_dets: Annotated[int | None, typer.Option(help="Detections per picture; -1 = no limit.")] = None,
    tile: Annotated[int, typer.Option(min=0, help="Look at tiles of this side in pixels; 0: at whole pictures.")] = 0,
    overlap: Annotated[float, typer.Option(help="Of neighbouring tiles, a share of their side.")] = 0.2,
    flip: Annotated[bool, typer.Option("--flip", help="Look at every picture mirrored too.")] = False,
    across: Annotated[
        float | None, typer.Option(min=0, max=1, metavar="IOU", help="Suppress over all classes above this IoU.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Pictures (or tiles) per step.")] = 8,
    threads: Annotated[int, typer.Option(min=1, help="Threads that read pictures ahead.")] = 2,
    skip_bad: Annotated[
        bool,
        typer.Option("--skip-bad/--no-skip-bad", help="Pass over files that cannot be read, and list them at the end."),
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing results file.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, cuda:1, ...")] = None,
) -> None:
    """Detect objects in pictures; no annotations are needed.

    Every entry of COCO results has the picture's `image_id` (1, 2, ... in order) and `file_name`, the category's id and
    name, an xywh box in pixels and a score; of a detector with masks also `segmentation`, the mask as RLE. All pictures
    are in `NAME.images.json` beside it. A call that was killed goes on where it stood when it is given again; torchrun
    shares the pictures among processes. The file appears when it is whole.
    """
    from tailfin.predicting.run import predict as predict_all
    from tailfin.predicting.views import Looks

    summary = predict_all(
        model,
        paths or (),
        out,
        lists=lists or (),
        format_name=format_name,
        score=score,
        max_dets=max_dets,
        classes=None if classes is None else [name.strip() for name in classes.split(",") if name.strip()],
        looks=Looks(tile, overlap, flip, across),
        draw=draw,
        draw_score=draw_score,
        batch=batch,
        threads=threads,
        skip_bad=skip_bad,
        overwrite=overwrite,
        device=device,
    )
    if not summary.main:
        return
    if summary.taken_up:
        echo(f"{summary.taken_up} inputs had been done before", err=True)
    drawings = f"; drawings in {draw}" if draw else ""
    echo(f"{summary.detections} detections in {summary.pictures} pictures: {out}{drawings}")
    if summary.bad:
        echo(f"{len(summary.bad)} files skipped:", err=True)
        for message in summary.bad:
            echo(f"  {message}", err=True)
