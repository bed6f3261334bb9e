"""`tailfin train`: run every stage of a recipe, go on with an interrupted run, or show what would happen."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailfin.errors import UserError

if TYPE_CHECKING:
    from tailfin.auto.steps import Done

AUTO = "auto"  # in the place of a recipe's name


def train(
    recipe: Annotated[
        str | None,
        typer.Argument(
            help="Name (see `tailfin recipes list`) or YAML path, with :VARIANT, or a row's id; auto: chosen for you."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Changes, e.g. schedule.epochs=4 loss=focal.")
    ] = None,
    train_json: Annotated[
        Path | None,
        typer.Option("--train", help="Training annotations: COCO or LVIS JSON, YOLO folder or data.yaml, VOC folder."),
    ] = None,
    val_json: Annotated[Path | None, typer.Option("--val", help="Validation annotations, likewise.")] = None,
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
    export: Annotated[
        str | None, typer.Option("--export", metavar="onnx|pt2|openvino", help="auto: write this file too, checked.")
    ] = None,
    holdout: Annotated[
        Path | None, typer.Option(help="auto: annotated pictures that calibration and thresholds are chosen on.")
    ] = None,
    holdout_images: Annotated[Path | None, typer.Option(help="auto: folder of the hold-out images.")] = None,
    thresholds: Annotated[
        str | None, typer.Option(help="auto: f1 (default), precision=0.9 or recall=0.8; of the thresholds per class.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show plan, memory estimate and one augmented batch; train nothing.")
    ] = False,
) -> None:
    """Train a detector, measure it and write its report.

    Under torchrun or accelerate launch the same command uses every process. `tailfin train auto --train T --val V`
    chooses the recipe (docs/choosing.md), calibrates the detector and finds thresholds.
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
    own = {"--export": export, "--holdout": holdout, "--holdout-images": holdout_images, "--thresholds": thresholds}
    if recipe != AUTO and (given := [name for name, value in own.items() if value is not None]):
        raise UserError(f"{given[0]} goes with `tailfin train auto`")
    if resume is not None:
        _check_resumed_as_begun(resume, overrides or [], [name for name, value in options.items() if value is not None])
    if recipe == AUTO:
        if train_json is None or any(value is not None for value in (weights, stage1, reuse)) or auto_batch:
            raise UserError("train auto needs --train, and chooses start and batch: start=none, batch=8 change them")
        _auto(
            {"train": train_json, "val": val_json, "train_images": train_images, "val_images": val_images}
            | {"holdout": holdout, "holdout_images": holdout_images},
            overrides or [],
            thresholds,
            export,
            out,
            overwrite,
            dry_run,
        )
        return
    if resume is not None and not dry_run:
        from tailfin.auto import steps

        if steps.is_auto(resume):
            _show_auto(steps.go_on(resume, say=_say))
            return
    if recipe is not None and train_json is None:
        _say_file_of_recipe(recipe, overrides or [])
    if dry_run:
        from tailfin.coco_form import converted
        from tailfin.dry_run import show_plan

        if stage1 is not None or reuse is not None:
            raise UserError("--dry-run shows a run that trains all its stages: leave --stage1 and --reuse out")
        resolved = (
            api.resolve_recipe(recipe, train_json, val_json, train_images, val_images, weights, overrides or ())
            if recipe is not None
            else api.recipe_from_file(Path(str(resume)) / "recipe.yaml")
        )
        with converted(resolved) as ready:
            show_plan(api.with_largest_batch(ready) if auto_batch else ready, out, overwrite=overwrite)
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


def _auto(
    files: dict[str, Path | None],
    overrides: list[str],
    thresholds: str | None,
    export: str | None,
    out: Path | None,
    overwrite: bool,
    dry_run: bool,
) -> None:
    """`tailfin train auto`: begin or go on, or show the plan."""
    import tempfile

    from tailfin.auto import steps
    from tailfin.data.layouts import as_given

    named: dict[str, Any] = {name: None if path is None else as_given(path) for name, path in files.items()}
    wanted = steps.Wanted(**named, overrides=tuple(overrides), thresholds=thresholds or "f1", export=export)
    if not dry_run:
        _show_auto(steps.train_auto(wanted, out, overwrite=overwrite, say=_say))
        return
    from tailfin.dry_run import show_plan

    with tempfile.TemporaryDirectory(prefix="tailfin-auto-") as work:
        plan = steps.plan_of(wanted, Path(work).resolve())
        for line in [*plan.files.notes, *plan.lines()]:
            _say(line)
        show_plan(plan.recipe, out, overwrite=overwrite)


def _say(text: str) -> None:
    from tailfin.cli.output import echo

    echo(text)


def _show_auto(done: Done) -> None:
    """The numbers of a finished `train auto`, its thresholds and its files; on the main process only."""
    if not done.main:
        return
    here = f"{Path.cwd()}/"
    show_result(Path(str(done.run).removeprefix(here)))
    if done.choice is not None:
        from dataclasses import replace

        from tailfin.cli.calibrate import show_choice

        told = done.holdout.replace(here, "")
        _say(f"calibration: {done.choice.label}; it and the thresholds were chosen on {told}")
        show_choice(replace(done.choice, tried={}, crossed=None))  # the rest is in RUN/calibration.json
    if done.thresholds:
        _say("thresholds: " + ", ".join(f"{name} {value:.2f}" for name, value in done.thresholds.items()))
    for file in done.files:
        _say(f"wrote {str(file).removeprefix(here)}")


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
