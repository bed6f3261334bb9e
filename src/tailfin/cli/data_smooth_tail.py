"""`tailfin data smooth-tail`: exemplars and the two sets of step-wise learning, without the training."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from tailfin.cli.output import echo
from tailfin.errors import UserError


def smooth_tail(
    source: Annotated[
        Path, typer.Argument(metavar="MODEL_OR_SCORES", help="Run, model, JSON of scores, or an exemplars.json.")
    ],
    annotations: Annotated[Path, typer.Option(help="COCO or LVIS annotation file of the training set.")],
    out: Annotated[Path, typer.Option(help="Folder for exemplars.json, d_head.json, d_tail.json and curves.html.")],
    images: Annotated[Path | None, typer.Option(help="Picture folder of the annotations.")] = None,
    division: Annotated[str, typer.Option(help="Image counts that part the classes, as 30 or 10,100.")] = "30",
    boundary: Annotated[str, typer.Option(help="Head classes have more images than the cut (gt), or as many (ge).")] = (
        "gt"
    ),
    head: Annotated[str, typer.Option(help="d_head: annotations of a head class and of a tail class.")] = "200,30",
    tail: Annotated[str, typer.Option(help="d_tail: the same.")] = "50,all",
    score: Annotated[str, typer.Option(help="Over all classes (max), or of the own class (gt_class).")] = "max",
    threshold: Annotated[float, typer.Option(help="First come scores above it, each from another image.")] = 0.5,
    any_image: Annotated[bool, typer.Option("--any-image", help="Plain order of scores above it, too.")] = False,
    length: Annotated[int, typer.Option(help="Exemplars listed per class.")] = 500,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is already in the folder.")] = False,
) -> None:
    """Choose exemplars of every class and write the smooth-tail sets: kept annotations are as they were.

    A stopped choice with a model goes on where it was when the command is given again; under torchrun each process
    scores its share of the pictures, and the first one writes. Scores are a JSON object {"annotation id": score} or a
    list of {"annotation_id": ..., "score": ...}.
    """
    from tailfin.data import smooth_tail as sets
    from tailfin.data.index import open_index
    from tailfin.stats import ClassStats

    settings = _settings(
        division=_numbers("--division", division),
        boundary=boundary,
        exemplars={"score": score, "threshold": threshold, "distinct_images": not any_image, "length": length},
        head=_counts("--head", head),
        tail=_counts("--tail", tail),
    )
    by_model = source.is_dir() or source.suffix == ".safetensors"
    alone = _on_main if by_model or int(os.environ.get("WORLD_SIZE", "1")) > 1 else _here
    index = open_index(annotations)
    stats = ClassStats.from_index(index)
    parts = sets.divide(stats.image_count, settings.division, settings.boundary)
    steps = sets.planned_steps(settings, parts)
    files = [out / "exemplars.json", *(out / f"d_{step.name}.json" for step in steps), out / "curves.html"]

    def check() -> None:
        taken = [path for path in files if path.exists()]
        if taken and not overwrite:
            raise UserError(f"{taken[0]} exists already; add --overwrite to replace it")

    alone(check)
    shards = _score(source, index, images, out, settings) if by_model else None
    alone(lambda: _write(source, shards, index, settings, stats, parts, steps, files))


# ---- details ---------------------------------------------------------------------------------------------------------


def _here(action: Callable[[], Any]) -> Any:
    return action()


def _on_main(action: Callable[[], Any]) -> Any:
    from tailfin.processes import on_main, process_state

    return on_main(process_state(), action)


def _write(
    source: Path,
    shards: Path | None,
    index: Any,
    settings: Any,
    stats: Any,
    parts: NDArray[np.int64],
    steps: Sequence[Any],
    files: Sequence[Path],
) -> None:
    """All files of the command, on one process."""
    from tailfin.data import smooth_tail as sets
    from tailfin.data.stats_report import write_picture

    exemplars = _exemplars(source, shards, index, settings)
    facts = {
        "division": list(settings.division),
        "boundary": settings.boundary,
        **settings.exemplars.model_dump(exclude={"shard", "file"}),
    }
    sets.write_exemplars(files[0], exemplars, index, parts, facts)
    counted = {"all": stats.instance_count}
    for step, path in zip(steps, files[1:-1], strict=True):
        kept = sets.choose(exemplars, index, step.counts)
        pictures, objects = sets.write_subset(path, index, kept)
        counted[path.stem] = sets.count_kept(index, kept)
        echo(f"{path}: {objects} annotations in {pictures} images, {_range(counted[path.stem])} per class")
    write_picture(files[-1], sets.curves(counted, stats.names))
    groups = np.bincount(parts, minlength=len(settings.division) + 1).tolist()
    names = [sets.part_name(part, len(settings.division)) for part in range(len(groups))]
    echo(f"{files[0]}: {len(exemplars.rows)} exemplars")
    echo("classes: " + ", ".join(f"{count} {name}" for name, count in zip(names, groups, strict=True)))
    echo(f"{files[-1]}: annotations per class")
    if shards is not None:
        shutil.rmtree(shards)


def _exemplars(source: Path, shards: Path | None, index: Any, settings: Any) -> Any:
    """The lists, by the scores of a model, by given ones, or as an earlier selection left them."""
    from tailfin.data.smooth_tail import rank_exemplars, read_exemplars

    options = settings.exemplars
    if shards is not None:
        from tailfin.exemplar_scores import read_scores

        rows, scores = read_scores(shards, len(index.clean().rows))
    else:
        from tailfin.files import read_json

        value = read_json(source, "scores")
        if isinstance(value, dict) and "classes" in value:
            return read_exemplars(source, index)
        rows, scores = _given_scores(source, value, index)
    return rank_exemplars(
        index,
        rows,
        scores,
        threshold=options.threshold,
        distinct_images=options.distinct_images,
        length=options.length,
    )


def _score(source: Path, index: Any, images: Path | None, out: Path, settings: Any) -> Path:
    """This process's share of the scores; returns the folder with those of all."""
    from tailfin.api import load
    from tailfin.checkpoint import file_hash
    from tailfin.data.dataset import Source
    from tailfin.data.index import image_folder
    from tailfin.exemplar_scores import score_annotations
    from tailfin.processes import new_accelerator
    from tailfin.stop_signals import Interrupted

    model = source / "model.safetensors" if source.is_dir() else source
    detector = load(model, "cpu")
    accelerator = new_accelerator(detector.recipe.schedule.precision)
    # scores of another model, file or kind are none of this selection's
    shards = out / f".scores-{file_hash(model)[:12]}-{index.fingerprint[:12]}-{settings.exemplars.score}"
    try:
        score_annotations(
            detector.model.to(accelerator.device),
            Source(index, image_folder(index.path, images)),
            detector.recipe.data,
            shards,
            accelerator=accelerator,
            batch=detector.recipe.evaluation.batch,
            score=settings.exemplars.score,
            names=detector.names,
        )
    except Interrupted as stop:
        echo(f"{stop}; give the same command again to go on", err=True)
        raise typer.Exit(stop.exit_code) from None
    accelerator.wait_for_everyone()
    return shards


def _given_scores(source: Path, value: Any, index: Any) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """(rows of the index, scores) of a file of scores; annotations without one are no exemplars."""
    from tailfin.data.smooth_tail import rows_of

    try:
        pairs = (
            [(int(key), float(score)) for key, score in value.items()]
            if isinstance(value, dict)
            else [(int(entry["annotation_id"]), float(entry["score"])) for entry in value]
        )
        numbers = np.array([number for number, _ in pairs], dtype=np.int64)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError(
            f'scores {source}: {{"annotation id": score}} or a list of {{"annotation_id", "score"}} is needed'
        ) from None
    rows = rows_of(numbers, index, f"scores {source}")
    scores = np.array([score for _, score in pairs], dtype=np.float32)
    values, times = np.unique(rows, return_counts=True)
    if (times > 1).any():
        raise UserError(f"scores {source}: annotation {index.annotation_ids[values[times > 1][0]]} has two scores")
    if not np.isfinite(scores).all():
        raise UserError(f"scores {source}: a score is not a finite number")
    usable = np.isin(rows, index.clean().rows)  # crowds and boxes without area cannot train
    return rows[usable], scores[usable]


def _settings(**values: Any) -> Any:
    from pydantic import ValidationError

    from tailfin.schema.problems import explain
    from tailfin.schema.stepwise import Stepwise

    try:
        return Stepwise.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, "data smooth-tail", Stepwise)) from None


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: whole numbers are needed, as 30 or 10,100") from None


def _counts(option: str, text: str) -> dict[str, Any]:
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 2 or not all(part == "all" or part.isdecimal() for part in parts):
        raise UserError(f"{option} {text}: two counts are needed, of a head class and of a tail class, as 50,all")
    values = ["all" if part == "all" else int(part) for part in parts]
    return {"per_head_class": values[0], "per_tail_class": values[1]}


def _range(counts: NDArray[np.int64]) -> str:
    present = counts[counts > 0]
    return f"{present.min()} to {present.max()}" if len(present) else "0"
