"""`tailfin evaluate`: the numbers of a run, of a model or of a results file."""

from __future__ import annotations

import os
import tempfile
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from tailfin.cli.output import echo, table_console
from tailfin.config import recipe_from_file
from tailfin.data.box_forms import check_form
from tailfin.errors import UserError, nearest
from tailfin.evaluation import (
    IOU_TYPES,
    PROTOCOLS,
    TrainCounts,
    comparison_table,
    metrics_table,
    paired_bootstrap,
    per_category_table,
)
from tailfin.evaluation import evaluate as evaluate_results
from tailfin.evaluation.operating import Aim, operating_points
from tailfin.evaluation.table import difference_table, operating_table
from tailfin.files import existing_file, write_json
from tailfin.schema.recipe import Evaluation

# Detections per image that a model is run with. COCO's own limit is per class, but published numbers come from
# detectors that keep 100 per image.
IMAGE_LIMITS = {"lvis": 300, "coco": 100, "lvis-fixed": -1, "groups": 100}


def evaluate(
    run: Annotated[
        Path | None, typer.Argument(help="Run directory (its model.safetensors is evaluated), or a model file.")
    ] = None,
    model: Annotated[Path | None, typer.Option(help="The same, by name.")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(help="The detector that a --model of another project is one of: its weights are converted."),
    ] = None,
    results: Annotated[
        list[Path] | None,
        typer.Option(help="COCO results JSON or folder of shards instead of a run; repeat to compare."),
    ] = None,
    annotations: Annotated[
        Path | None, typer.Option(help="COCO or LVIS annotations; a run knows its own validation file.")
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Image folder; the default is the one beside the JSON.")] = None,
    protocol: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PROTOCOLS)}; a run has its own, else lvis.")
    ] = None,
    iou: Annotated[
        list[str] | None, typer.Option(help="bbox or segm, repeat for both; a run has its own, else bbox.")
    ] = None,
    max_dets: Annotated[
        int | None, typer.Option(help="Detections per image, -1 = no limit (lvis 300, coco and groups 100).")
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(help="lvis-fixed: detections per class over the set (10000; -1 = all).")
    ] = None,
    train: Annotated[Path | None, typer.Option(help="Training file whose counts make the frequency groups.")] = None,
    groups: Annotated[
        str | None, typer.Option(help="Largest training image count of a rare and of a common class, e.g. 10,100.")
    ] = None,
    box_form: Annotated[
        str | None,
        typer.Option(help="Form of the --results boxes: xywh, xyxy, yxyx or cxcywh, with -fractions for fractions."),
    ] = None,
    no_cats: Annotated[bool, typer.Option("--no-cats", help="Pool all classes (coco only).")] = False,
    per_category: Annotated[bool, typer.Option("--per-category", help="Show every class too.")] = False,
    thresholds: Annotated[
        str | None, typer.Option(help="Show a threshold per class for the f1, precision=0.9 or recall=0.8 asked for.")
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            help="Run or results to compare with: differences with an interval over images; repeat for seeds."
        ),
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Folder that keeps the results JSON of a run or model.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the metrics to this file.")] = None,
) -> None:
    """Average precision and recall of a run, a model or a results file."""
    if run is not None and run.is_file() and model is None:
        run, model = None, run
    sources = [("RUN", run), ("--model", model), ("--results", results or None)]
    given = [name for name, value in sources if value is not None]
    if len(given) != 1:
        raise UserError(f"give one of RUN, --model and --results ({' and '.join(given) or 'none'} given)")
    if recipe is not None and (model is None or annotations is None):
        raise UserError("--recipe goes with --model, weights of another project, and --annotations")
    own = None if run is None else _evaluation_of(run)
    if own is not None:
        iou = iou or list(own.iou)
    if protocol is None:
        protocol = "lvis" if own is None else own.protocol
        if own is not None and protocol == "lvis" and max_dets is None:
            max_dets = own.max_dets
    if protocol not in PROTOCOLS:  # checked before a model is run for nothing
        raise UserError(f'unknown protocol "{protocol}"{nearest(protocol, PROTOCOLS)}')
    kinds = tuple(dict.fromkeys(iou or ("bbox",)))
    for kind in kinds:
        if kind not in IOU_TYPES:
            raise UserError(f'unknown IoU type "{kind}"{nearest(kind, IOU_TYPES)}')
    aim = Aim.of(thresholds) if thresholds is not None else None
    options: dict[str, Any] = {
        "max_dets": max_dets,
        "per_class": per_class,
        "use_cats": not no_cats,
        "group_bounds": _bounds(groups),
        "train_counts": TrainCounts.from_json(train) if train else None,
    }
    if box_form is not None:
        if not results:
            raise UserError("--box-form goes with --results: a detector of tailfin gives boxes in pixels")
        options["box_form"] = check_form(box_form)

    with ExitStack() as stack:
        found: dict[str, Any]
        if results:
            if annotations is None:
                raise UserError("--results needs --annotations")
            found = {str(path): path for path in results}
        else:
            shown = str(run or model)
            folder = save or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tailfin-evaluate-")))
            if recipe is not None and model is not None and annotations is not None:
                scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tailfin-converted-")))
                _convert(recipe, model, existing_file(annotations, "annotations"), train, scratch / "model.safetensors")
                model = scratch / "model.safetensors"
            checkpoint, annotations, images = _model_and_files(run, model, annotations, images)
            found = {shown: _predict(checkpoint, annotations, images, folder, protocol, max_dets, kinds)}
            if int(os.environ.get("RANK", "0")):  # under torchrun the first process alone has the results
                return
            if recipe is None:  # the counts of a converted model are those of --train, or none
                options["train_counts"] = options["train_counts"] or _model_counts(checkpoint, annotations)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            metrics = {
                name: evaluate_results(annotations, source, protocol, kinds, **options)
                for name, source in found.items()
            }
            differences = {} if not against else _differences(annotations, found, against, protocol, kinds, options)
            points = {} if aim is None else {n: operating_points(annotations, own, aim) for n, own in found.items()}
    for text in dict.fromkeys(str(warning.message) for warning in caught):
        echo(f"warning: {text}", err=True)
    _show(metrics, per_category)
    for kind, table in differences.items():
        table_console().print(difference_table(table, f"{kind}, this against {', '.join(map(str, against or []))}"))
    for name, found_points in points.items():
        table_console().print(operating_table(found_points, name if len(points) > 1 else ""))
    if json is not None:
        document = next(iter(metrics.values())) if len(metrics) == 1 else dict(metrics)
        write_json(json, {**document, "against": differences} if differences else document, indent=2)
        echo(f"metrics written to {json}")


def _differences(
    annotations: Path,
    found: dict[str, Any],
    against: list[Path],
    protocol: str,
    kinds: tuple[str, ...],
    options: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """`paired_bootstrap` per IoU type; several --results are seeds, and so are several --against."""
    if not options["use_cats"]:
        raise UserError("--against compares the AP of classes: leave out --no-cats")
    if "box_form" in options:
        raise UserError("--against reads boxes as [x, y, width, height]: leave out --box-form")
    chosen = {key: options[key] for key in ("max_dets", "group_bounds", "train_counts")}
    return {
        kind: paired_bootstrap(
            list(against), list(found.values()), annotations, protocol=protocol, iou_type=kind, **chosen
        )
        for kind in kinds
    }


def _model_and_files(
    run: Path | None, model: Path | None, annotations: Path | None, images: Path | None
) -> tuple[Path, Path, Path | None]:
    """Model file, annotation file and image folder (None: the documented folder beside the file)."""
    checkpoint = model
    if run is not None:
        if not run.is_dir():
            near = (
                nearest(run.name, (p.name for p in run.parent.iterdir() if p.is_dir())) if run.parent.is_dir() else ""
            )
            raise UserError(f"run {run} is not a folder{near if 'did you mean' in near else ''}")
        checkpoint = run / "model.safetensors"
    assert checkpoint is not None
    existing_file(checkpoint, "model")
    if annotations is None:
        if run is None:
            raise UserError("a model file needs --annotations")
        from tailfin.api import validation_files

        own_annotations, own_images = validation_files(run)
        return checkpoint, Path(own_annotations), images or own_images
    return checkpoint, existing_file(annotations, "annotations"), images


def _convert(recipe: str, weights: Path, annotations: Path, train: Path | None, out: Path) -> None:
    """A model file of another project's weights for this process; the first one says what became of them."""
    from tailfin.convert import converted

    for note in converted(recipe, weights, annotations, out, train=train):
        if not int(os.environ.get("RANK", "0")):
            typer.echo(note)


def _evaluation_of(run: Path) -> Evaluation | None:
    """How the run's recipe measures; none where there is no recipe to read (what follows says what is missing)."""
    recipe = run / "recipe.yaml"
    return recipe_from_file(recipe).evaluation if recipe.is_file() else None


def _model_counts(checkpoint: Path, annotations: Path) -> TrainCounts:
    from tailfin.api import train_counts

    return train_counts(checkpoint, annotations)


def _predict(
    checkpoint: Path,
    annotations: Path,
    images: Path | None,
    folder: Path,
    protocol: str,
    max_dets: int | None,
    kinds: tuple[str, ...],
) -> dict[str, Path]:
    from tailfin.api import predict_to_results

    limit = IMAGE_LIMITS[protocol] if max_dets is None else max_dets
    return predict_to_results(checkpoint, annotations, images, folder, max_dets=limit, kinds=kinds)


def _bounds(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--groups {text}: two whole numbers are needed, for example 10,100") from None


def _show(metrics: dict[str, Any], per_category: bool) -> None:
    console = table_console()
    if len(metrics) == 1:
        name, each = next(iter(metrics.items()))
        echo(name)
        console.print(metrics_table(each))
    else:
        console.print(comparison_table(metrics))
    if per_category:
        for name, each in metrics.items():
            for kind in (kind for kind in IOU_TYPES if kind in each):
                table = per_category_table(each, kind)
                table.title = Text(f"{name}: {kind} per class") if len(metrics) > 1 else table.title
                console.print(table)
