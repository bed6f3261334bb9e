"""`tailfin calibrate`: scores that a long tail has tilted are set right after training, without training."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailfin.errors import UserError

if TYPE_CHECKING:
    from tailfin.calibrate.choice import Choice


def calibrate(
    source: Annotated[
        Path,
        typer.Argument(metavar="MODEL|RESULTS.json", help="Model file, run folder, or COCO results of any detector."),
    ],
    out: Annotated[Path, typer.Option(help="Model file, or results JSON, to write.")],
    method: Annotated[
        str | None,
        typer.Option(help="norcal, fracal, logit_adjustment, temperature, power (by commas), none, keep; else all."),
    ] = None,
    strength: Annotated[
        str | None, typer.Option(help="Of one method, instead of a search: 0.6; power: rare,common,frequent.")
    ] = None,
    gamma: Annotated[float | None, typer.Option(help="Short for --method norcal --strength.")] = None,
    train_json: Annotated[
        Path | None, typer.Option("--train", help="Training annotations; searched on where there is no --holdout.")
    ] = None,
    train_images: Annotated[Path | None, typer.Option(help="Folder of the training images.")] = None,
    holdout: Annotated[Path | None, typer.Option(help="Annotated pictures to choose on, not trained on.")] = None,
    holdout_images: Annotated[Path | None, typer.Option(help="Folder of the hold-out images.")] = None,
    test: Annotated[Path | None, typer.Option(help="Annotated pictures to measure on, before and after.")] = None,
    test_images: Annotated[Path | None, typer.Option(help="Folder of the test images.")] = None,
    by: Annotated[str, typer.Option(help="Number to choose by: AP, APr, APc or APf.")] = "AP",
    f_loss: Annotated[
        float | None, typer.Option("--f-loss", help="Only what lowers AP_f by at most so many points.")
    ] = None,
    folds: Annotated[int, typer.Option(min=1, help="Folds of the cross-validation that tells the gain.")] = 2,
    max_images: Annotated[int, typer.Option(min=1, help="Pictures to choose on.")] = 1000,
    thresholds: Annotated[
        str | None, typer.Option(help="Store operating points: f1, precision=0.9 or recall=0.8.")
    ] = None,
    undo: Annotated[bool, typer.Option("--undo", help="Bring the scores of the training's recipe back.")] = False,
    scores: Annotated[str | None, typer.Option(help="Results: softmax or sigmoid; else found from the scores.")] = None,
    protocol: Annotated[str, typer.Option(help="Results: protocol of the search.")] = "lvis",
    max_dets: Annotated[int | None, typer.Option(help="Results: detections per image in the search.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, mps, cuda:1, ...")] = None,
) -> None:
    """Calibrate the scores of a trained model, or those in any results file.

    Every method has a grid of strengths; the best on the pictures is taken, or the one that is given. The weights of a
    model stay as they are, and --undo brings its scores back. Of a results file the scores alone change.
    """
    if gamma is not None:
        if method not in (None, "norcal") or strength is not None:
            raise UserError("--gamma is short for --method norcal --strength: give one of them")
        method, strength = "norcal", str(gamma)
    common: dict[str, Any] = {
        "method": method,
        "strength": strength,
        "by": by,
        "f_loss": None if f_loss is None else f_loss / 100,
        "folds": folds,
        "overwrite": overwrite,
    }
    if source.suffix == ".json":
        others = {"--test": test, "--thresholds": thresholds, "--undo": undo or None, "--device": device}
        wrong = [name for name, value in others.items() if value is not None]
        if wrong:
            hint = " (`tailfin evaluate --results FILE --thresholds f1` prints them)" if thresholds else ""
            raise UserError(f"{wrong[0]} goes with a model, {source} is a results file{hint}")
        if train_json is None:
            raise UserError("a results file needs the training annotations of its detector: --train FILE")
        from tailfin.calibrate.results import calibrate_results

        choice, kind = calibrate_results(
            source, out, train=train_json, holdout=holdout, kind=scores, protocol=protocol, max_dets=max_dets, **common
        )
        typer.echo(f"scores taken for those of a {kind}")
        if (
            choice.tried
            and len({tuple(round(value, 5) for value in own.values()) for own in choice.tried.values()}) == 1
        ):
            typer.echo("AP is the same for all: with one class per box the order within a class does not change")
    else:
        if scores is not None or max_dets is not None or protocol != "lvis":
            raise UserError("--scores, --protocol and --max-dets go with a results file, a model has its own")
        from tailfin.calibrate.model import calibrate as calibrate_model

        choice = calibrate_model(
            source,
            out,
            train=train_json,
            train_images=train_images,
            holdout=holdout,
            holdout_images=holdout_images,
            test=test,
            test_images=test_images,
            max_images=max_images,
            thresholds=thresholds,
            undo=undo,
            device=device,
            **common,
        )
        for note in (choice.seen, choice.dropped):
            if note:
                typer.echo(note, err=True)
    show_choice(choice, by)
    typer.echo(f"{choice.label}: {out}")


def show_choice(choice: Choice, by: str = "AP") -> None:
    """The tables of what was tried and measured."""
    from rich.console import Console
    from rich.table import Table

    from tailfin.calibrate.choice import NUMBERS

    console = Console()

    def table(title: str, rows: dict[str, dict[str, float]]) -> None:
        shown = Table("calibration", *NUMBERS, title=title, title_justify="left")
        for name, numbers in rows.items():
            values = ("-" if numbers[key] < 0 else f"{100 * numbers[key]:.2f}" for key in NUMBERS)
            shown.add_row(name, *values, style="bold" if name == choice.label else None)
        console.print(shown)

    if choice.tried:
        table(f"chosen on (by {by}; means over the folds)", choice.tried)
    if choice.crossed is not None:
        plain, chosen = choice.crossed
        table("cross-validated: chosen on the other folds", {"none, each fold": plain, "chosen, each fold": chosen})
    if choice.tested:
        table("on the test pictures", choice.tested)
