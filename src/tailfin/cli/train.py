"""`tailfin train`: run every stage of a recipe, go on with an interrupted run, or show what would happen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailfin.errors import UserError


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="Name (see `tailfin recipes list`) or YAML path, with :VARIANT, or a row's id.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. schedule.epochs=4 loss=focal.")
    ] = None,
    train_json: Annotated[
        Path | None, typer.Option("--train", help="Training annotations (COCO or LVIS JSON).")
    ] = None,
    val_json: Annotated[Path | None, typer.Option("--val", help="Validation annotations.")] = None,
    train_images: Annotated[Path | None, typer.Option(help="Folder of the training images.")] = None,
    val_images: Annotated[Path | None, typer.Option(help="Folder of the validation images.")] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder; without it one is named under runs/.")] = None,
    weights: Annotated[str | None, typer.Option(help="imagenet, none, or a file to start from.")] = None,
    stage1: Annotated[
        Path | None,
        typer.Option(
            "--stage1",
            metavar="RUN",
            help="A run whose finished first stage is taken, which must be the same; RUN/stages/K-NAME: all up to it.",
        ),
    ] = None,
    reuse: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="A run whose finished stages are taken, up to the first that differs."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on with an interrupted run.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing run folder.")] = False,
    auto_batch: Annotated[
        bool, typer.Option("--auto-batch", help="Take the largest batch that the memory holds, found by one step.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, memory estimate and one augmented batch; train nothing.")
    ] = False,
) -> None:
    """Train a detector, measure it and write its report.

    Under torchrun or accelerate launch the same command uses every process.
    """
    from tailfin import api

    if resume is not None and recipe is not None and "=" in recipe and not Path(recipe).is_file():
        overrides, recipe = [recipe, *(overrides or [])], None  # without a recipe the first override is in its place
    if (recipe is None) == (resume is None):
        raise UserError("give a recipe, or --resume RUN" + ("" if recipe is None else " (not both)"))
    if recipe is not None and "=" in recipe and not Path(recipe).exists():
        raise UserError(f"{recipe} stands where the recipe must: tailfin train RECIPE {recipe} ...")
    options = {
        "--train": train_json,
        "--val": val_json,
        "--train-images": train_images,
        "--val-images": val_images,
        "--out": out,
        "--weights": weights,
        "--stage1": stage1,
        "--reuse": reuse,
        "--auto-batch": auto_batch or None,
    }
    if resume is not None:
        _check_resumed_as_begun(resume, overrides or [], [name for name, value in options.items() if value is not None])
    if recipe is not None and train_json is None:
        _say_file_of_recipe(recipe, overrides or [])
    if dry_run:
        from tailfin.dry_run import show_plan

        if stage1 is not None or reuse is not None:
            raise UserError("--dry-run shows a run that trains all its stages: leave --stage1 and --reuse out")
        resolved = (
            api.resolve_recipe(recipe, train_json, val_json, train_images, val_images, weights, overrides or ())
            if recipe is not None
            else api.recipe_from_file(Path(str(resume)) / "recipe.yaml")
        )
        show_plan(api.with_largest_batch(resolved) if auto_batch else resolved, out, overwrite=overwrite)
        return
    if resume is not None:
        folder = api.train("", out=resume, resume=True)
    else:
        folder = api.train(
            str(recipe),
            train=train_json,
            val=val_json,
            train_images=train_images,
            val_images=val_images,
            out=out,
            weights=weights,
            overrides=overrides or (),
            overwrite=overwrite,
            stage1=stage1,
            reuse=reuse,
            auto_batch=auto_batch,
        )
    show_result(folder)


def _check_resumed_as_begun(run: Path, overrides: list[str], options: list[str]) -> None:
    """Refuse what would make a resumed run another one, and say how such a run is begun."""
    if not overrides and not options:
        return
    given = " ".join([*overrides, *options])
    raise UserError(
        f"--resume {run} goes on with the run as it was begun: with {given} what is left would be trained otherwise "
        f"than what is done. Begin a new run: tailfin train {run / 'recipe.yaml'} {' '.join(overrides)}"
        f"{' ' * bool(overrides)}--out NEW (with --reuse {run} it takes the finished stages that stay the same)"
    )


def _say_file_of_recipe(recipe: str, overrides: list[str]) -> None:
    """Name the training file of the working directory that a recipe file of the user names without a folder."""
    import os
    import sys

    from tailfin.config import load_recipe

    if not Path(recipe.partition(":")[0]).is_file() or any(text.startswith("data.") for text in overrides):
        return
    data = load_recipe(recipe, overrides).data
    file = Path(data.train.annotations)
    if data.train.annotations and not data.root and not file.is_absolute() and int(os.environ.get("RANK", "0")) == 0:
        print(f"note: {recipe} names {file}: {file.absolute()} is taken (--train names another)", file=sys.stderr)


def show_result(folder: Path) -> None:
    """The metrics table of a finished run and where its report is; on the main process only."""
    import os

    from rich.console import Console

    from tailfin.evaluation import metrics_table
    from tailfin.files import read_json

    if int(os.environ.get("RANK", "0")) != 0:
        return
    if (folder / "metrics.json").exists():
        Console().print(metrics_table(read_json(folder / "metrics.json")))
    typer.echo(f"model   {folder / 'model.safetensors'}")
    typer.echo(f"report  {folder / 'report.html'}")
