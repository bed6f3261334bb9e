"""Calibrating a detector of tailfin (`tailfin calibrate MODEL`): a model file in, a model file out.

Only the recipe in the file changes (`calibration`), the weights are the same; what the training's recipe said is kept
beside it, and `undo` brings it back. The network sees every picture once; the candidates share its outputs.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tailfin import evaluation
from tailfin.api import THRESHOLDS, Detector, load
from tailfin.calibrate.candidates import KEPT, PLAIN, dimensions, grid, label, methods_of, with_strength
from tailfin.calibrate.choice import NUMBERS, Choice, Goal, Numbers, best_of_each, choose, crossed
from tailfin.calibrate.pictures import Folds, make_folds
from tailfin.checkpoint import content_hash, load_model_file, save_model
from tailfin.config import check_recipe
from tailfin.data.dataset import Source, evaluation_loader
from tailfin.data.index import image_folder, open_index
from tailfin.errors import UserError
from tailfin.evaluation.operating import Aim, OperatingPoints, operating_points
from tailfin.evaluation.results import ResultWriter
from tailfin.files import existing_file, writing
from tailfin.inference import category_ids_for, counts_by_id, picture_scale
from tailfin.models.rescoring import rescorer, score_kind
from tailfin.plan_notes import shared_pictures
from tailfin.progress import Progress
from tailfin.schema.calibration import Calibration
from tailfin.schema.recipe import Recipe

BEFORE = "calibration_before"  # metadata: the calibration of the training's recipe, as JSON


def calibrate(
    model: str | Path,
    out: str | Path,
    *,
    method: str | Sequence[str] | None = None,
    strength: str | float | Sequence[float] | None = None,
    train: str | Path | None = None,
    train_images: str | Path | None = None,
    holdout: str | Path | None = None,
    holdout_images: str | Path | None = None,
    test: str | Path | None = None,
    test_images: str | Path | None = None,
    by: str = "AP",
    f_loss: float | None = None,
    folds: int = 2,
    max_images: int = 1000,
    thresholds: str | None = None,
    undo: bool = False,
    overwrite: bool = False,
    device: str | None = None,
) -> Choice:
    """Write the calibrated model to `out`; returns what was chosen and the numbers of what was tried.

    Args:
        model: model file or run folder of any detector with classes.
        method: names (or "a,b") of `candidates.METHODS`; all where none is given. "none" is plain scores, "keep" those
            that the model has: for thresholds alone.
        strength: of one method, instead of a search.
        train, train_images: training annotations and the folder of their pictures: what FRACAL is measured on, and
            what is searched on where there is no `holdout`.
        holdout, holdout_images: annotated pictures that were not trained on, to search on.
        test, test_images: pictures that nothing is chosen on; plain scores and the best of each method are measured.
        by: the number that the choice is made by: AP, APr, APc or APf.
        f_loss: candidates whose AP_f is lower than that of plain scores by more than this fraction are out.
        folds: parts of the searched pictures; from two on the gain is told by cross-validation too.
        max_images: so many pictures are searched on, drawn class by class where there are more.
        thresholds: "f1", "precision=0.9" or "recall=0.8": operating points are found on the same pictures and stored.
        undo: write the scores of the training's recipe back, without operating points; nothing is searched.
    """
    path, target = _paths(model, out, overwrite)
    file = load_model_file(path)
    before = file.fact(BEFORE, _plain_values(file.recipe))
    detector = load(path, device)
    if undo:
        recipe = check_recipe({**file.recipe.model_dump(mode="json"), "calibration": before}, f"model {path}")
        _write(target, path, detector, recipe, {})
        return Choice(label(recipe.calibration), recipe.calibration)
    if detector.model.loss is None:
        raise UserError(f"model {path}: {detector.recipe.detector.name} has no scores of classes to calibrate")
    goal, aim = Goal(by, f_loss), None if thresholds is None else Aim.of(thresholds)
    if folds < 1:
        raise UserError(f"--folds must be at least 1 (given: {folds})")
    as_is = method in (PLAIN, KEPT)
    methods = () if as_is else methods_of(method)
    if strength is not None and len(methods) != 1:
        raise UserError("--strength belongs to one --method")
    tuning, tuning_images = (holdout, holdout_images) if holdout is not None else (train, train_images)
    if tuning is None and ((strength is None and not as_is) or aim is not None):
        raise UserError(
            "give pictures to choose on (--holdout FILE, or --train FILE), or a method with its strength "
            "(--method norcal --strength 0.6)"
        )
    dimension: dict[str, float] = {}
    if "fracal" in methods:
        if train is not None:
            dimension = dimensions(detector.stats, train)
        elif method is not None:
            raise UserError("--method fracal needs the training file (--train FILE), whose geometry it measures")
        else:
            methods = tuple(name for name in methods if name != "fracal")
    searched = strength is None and not as_is
    candidates = grid(methods, dimension) if searched else {}
    if strength is not None:
        fixed = with_strength(methods[0], strength, dimension)
        choice = Choice(label(fixed), fixed)
    else:
        own_config = file.recipe.calibration if method == KEPT else None
        choice = Choice(label(own_config), own_config)
    points: OperatingPoints | None = None
    searched_on: Source | None = None
    with tempfile.TemporaryDirectory(prefix="tailfin-calibrate-") as temporary:
        folder = Path(temporary)
        if tuning is not None and (searched or aim is not None):
            own = make_folds(tuning, folder / "tuning", folds=folds, most=max_images, seed=detector.recipe.seed)
            source = searched_on = Source(open_index(own.whole), image_folder(tuning, tuning_images))
            wanted = {PLAIN: None, **candidates} if searched else {choice.label: choice.config}
            _detect(detector, source, wanted, folder / "tuning", own)
            if searched:
                measured = {name: _measure(detector, own, folder / "tuning" / _place(name)) for name in wanted}
                chosen, means = choose(measured, goal)
                choice = Choice(chosen, candidates.get(chosen), means, crossed(measured, goal))
            if aim is not None:
                found = folder / "tuning" / _place(choice.label)
                points = operating_points(own.whole, _joined(found, folds), aim)
        if test is not None:
            picked = best_of_each(choice.tried, goal) if choice.tried else [PLAIN]
            wanted = {name: candidates.get(name) for name in picked} | {choice.label: choice.config}
            own = make_folds(test, folder / "test", folds=1)
            source = Source(open_index(own.whole), image_folder(test, test_images))
            if searched_on is not None and (both := shared_pictures(searched_on, source)):
                seen = f"{both} of the {len(source.index)} test pictures are among those that the choice was made on"
                choice = replace(choice, seen=f"{seen}: their numbers say nothing of other pictures")
            _detect(detector, source, wanted, folder / "test", own)
            tested = {name: _measure(detector, own, folder / "test" / _place(name))[0] for name in wanted}
            choice = replace(choice, tested=tested)
    recipe = file.recipe.model_copy(update={"calibration": choice.config})
    facts = {BEFORE: json.dumps(before)}
    if points is not None:
        facts[THRESHOLDS] = json.dumps(points.to_dict())
    elif THRESHOLDS in file.metadata:
        choice = replace(
            choice, dropped="the operating points of the model are left out: they were found for its scores"
        )
    _write(target, path, detector, recipe, facts)
    return choice


def _paths(model: str | Path, out: str | Path, overwrite: bool) -> tuple[Path, Path]:
    path, target = Path(model), Path(out)
    path = existing_file(path / "model.safetensors" if path.is_dir() else path, "model")
    if target.suffix != ".safetensors" or target.is_dir():
        raise UserError(f"--out {target} must be a file that ends in .safetensors")
    if target.exists() and not overwrite:
        raise UserError(f"--out {target} exists already; add --overwrite to replace it")
    return path, target


def _plain_values(recipe: Recipe) -> Any:
    return None if recipe.calibration is None else recipe.calibration.model_dump(mode="json")


def _write(target: Path, path: Path, detector: Detector, recipe: Recipe, facts: dict[str, Any]) -> None:
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    save_model(target, detector.model, recipe, detector.stats, parents=[content_hash(path)], **facts)


@torch.inference_mode()
def _detect(
    detector: Detector, source: Source, candidates: Mapping[str, Calibration | None], folder: Path, folds: Folds
) -> None:
    """Detections under every candidate, from one pass of the network, as shards in `folder/<place>/fold<k>`."""
    model, recipe, stats = detector.model, detector.recipe, detector.stats
    assert model.loss is not None
    ids = category_ids_for(detector.names, source.index)
    kind = score_kind(model.loss)
    own: dict[str, nn.Module | None] = {
        name: None if config is None else rescorer(config, stats, kind).to(detector.device)
        for name, config in candidates.items()
    }
    before = model.rescore
    try:
        with ExitStack() as stack:
            loader = evaluation_loader(source, recipe.data, batch=recipe.evaluation.batch, rank=0, processes=1)
            stack.enter_context(closing(loader))
            writers = {
                name: [
                    stack.enter_context(ResultWriter(folder / _place(name) / f"fold{k}", k))
                    for k in range(len(folds.files))
                ]
                for name in own
            }
            progress = stack.enter_context(Progress("calibration", len(source.index)))
            done = 0
            for images, rows in loader:
                seen = model.outputs([image.to(detector.device) for image in images])
                for name, rescore in own.items():
                    model.rescore = rescore
                    for image, row, output in zip(images, rows, model.boxes_only(seen, model.limits), strict=True):
                        image_id = int(source.index.image_ids[row])
                        boxes = output["boxes"].cpu().numpy() * picture_scale(image.shape[-2:], source.index, row)
                        labels, scores = output["labels"].cpu().numpy(), output["scores"].cpu().numpy()
                        writers[name][folds.of_image[image_id]].add(image_id, boxes, scores, ids[labels])
                done += len(rows)
                progress.update(done)
    finally:
        model.rescore = before


def _measure(detector: Detector, folds: Folds, folder: Path) -> list[Numbers]:
    """The numbers of one candidate on each fold."""
    limits = detector.recipe.evaluation
    found = []
    for number, file in enumerate(folds.files):
        metrics = evaluation.evaluate(
            file,
            folder / f"fold{number}",
            limits.protocol,
            "bbox",
            max_dets=limits.max_dets if limits.protocol == "lvis" else None,
            group_bounds=limits.group_bounds,
            train_counts=counts_by_id(detector.stats, open_index(file)),
        )["bbox"]
        found.append({name: float(metrics[name]) for name in NUMBERS})
    return found


def _joined(folder: Path, folds: int) -> Path:
    """One folder of shards from those of the folds, which are named by their number."""
    together = folder / "together"
    together.mkdir()
    for number in range(folds):
        for shard in (folder / f"fold{number}").glob("rank-*.shard"):
            shard.rename(together / shard.name)
    return together


def _place(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")
