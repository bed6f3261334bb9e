"""`tailfin export`: a trained model to ONNX, torch.export or OpenVINO."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    model: Annotated[Path, typer.Argument(help="RUN/model.safetensors, or the run folder.")],
    out: Annotated[Path, typer.Option(help="File to write: .onnx, .pt2 (torch.export) or .xml (OpenVINO).")],
    score: Annotated[
        float | None, typer.Option(help="Detections count from here on; else the model's thresholds, else 0.05.")
    ] = None,
    max_dets: Annotated[int, typer.Option(min=1, help="Detections per picture, fixed in the file.")] = 100,
    photos: Annotated[
        list[str] | None, typer.Option(help="Pictures, folders or globs to check on; else those of the run.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Compare the file with the model on ten photos.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a trained model for other programs: ONNX, torch.export or OpenVINO.

    Batch, height and width may be any; calibration and thresholds are inside, names in the metadata. The file appears
    when it has found what the model finds.
    """
    from tailfin.export.model import export as export_model
    from tailfin.processes import limit_threads

    limit_threads()
    agreement = export_model(
        model, out, score=score, max_dets=max_dets, photos=photos, check=check, overwrite=overwrite
    )
    typer.echo(f"{out}: {agreement if agreement is not None else 'not checked'}")
