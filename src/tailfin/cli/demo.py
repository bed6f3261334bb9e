"""`tailfin demo`: the whole line on the embedded synthetic set in a few CPU minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

DEMO_PICTURES = 800
DEMO_RECIPES = {"baseline": "demo/faster_rcnn_r18_softmax", "bacl": "demo/bacl"}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the data, the runs and the report.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="Seed of both runs.")] = 0,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes to both runs; second.... to BACL's.")
    ] = None,
) -> None:
    """Make the embedded long-tailed set, train the plain baseline and BACL on it, and compare them."""
    from rich.console import Console

    from tailfin import api
    from tailfin.data.synth import demo_set
    from tailfin.evaluation import comparison_table
    from tailfin.files import read_json
    from tailfin.progress import Progress
    from tailfin.report import write_report

    began = time.monotonic()
    with Progress("demo set", DEMO_PICTURES) as progress:
        train_json, val_json = demo_set(out / "data", progress=lambda done, _: progress.update(done))
    runs = {}
    for name, recipe in DEMO_RECIPES.items():
        runs[name] = api.train(
            recipe,
            train=train_json,
            val=val_json,
            out=out / name,
            overrides=[f"seed={seed}", *(word for word in overrides or () if name == "bacl" or not _of_second(word))],
            overwrite=True,
        )
    report = write_report(list(runs.values()), out / "report.html", title="tailfin demo")
    Console().print(comparison_table({name: read_json(run / "metrics.json") for name, run in runs.items()}))
    typer.echo(f"{time.monotonic() - began:.0f} s; report: {report.absolute()}")


def _of_second(override: str) -> bool:
    """Whether an override is of the second stage, which the plain detector does not have."""
    return override.startswith("second.")
