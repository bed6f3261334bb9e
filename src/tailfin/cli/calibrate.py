"""`tailfin calibrate`: scores that a long tail has tilted are set right after training, without training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailfin.cli.output import echo


def calibrate(
    model: Annotated[Path, typer.Argument(help="RUN/model.safetensors, or the run folder.")],
    out: Annotated[Path, typer.Option(help="Model file to write.")],
    gamma: Annotated[
        float | None, typer.Option(help="Strength; without it the best one on the training pictures is taken.")
    ] = None,
    train_json: Annotated[Path | None, typer.Option("--train", help="Training annotations, to find gamma.")] = None,
    train_images: Annotated[Path | None, typer.Option(help="Folder of the training images.")] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Training pictures to look at.")] = 1000,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, cuda:1, ...")] = None,
) -> None:
    """Calibrate a trained model's scores by class size; predict and evaluate the result like any model.

    Every foreground probability is divided by its class's number of training images to the power of gamma, and
    normalised with the background. The weights stay as they are.
    """
    from rich.console import Console
    from rich.table import Table

    from tailfin.calibration_search import calibrate as calibrate_model

    chosen, tried = calibrate_model(
        model,
        out,
        gamma=gamma,
        train=train_json,
        train_images=train_images,
        max_images=max_images,
        overwrite=overwrite,
        device=device,
    )
    if tried:
        table = Table("gamma", "AP", title="on training pictures", title_justify="left")
        for value, precision in tried.items():
            table.add_row(f"{value:g}", f"{100 * precision:.2f}", style="bold" if value == chosen else None)
        Console().print(table)
    echo(f"gamma {chosen:g}: {out}")
