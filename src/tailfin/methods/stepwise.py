"""Step-wise learning on smooth-tail data (Dong et al., "Boosting Long-tailed Object Detection via Step-wise Learning on
Smooth-tail Data", ICCV 2023).

    step 0  4.1  the detector on whole data                                         the recipe's own sections
            3.1  exemplars: the annotations of each class that step 0 is sure of     exemplar_scores.py
                 D_head: 200 of a head class, 30 of a tail class;
                 D_tail: 50 of a head class, all of a tail class                      data/smooth_tail.py
    step 1  3.2  head class expert: the class-specific layers, on D_head
    step 2  3.3  the same layers on D_tail, taught by the expert                      models/transfer.py
            4.3  repeat factors of bands of classes in both steps                     samplers/stepwise.py

Everything but the class-specific layers keeps its bits in steps 1 and 2. With more cuts there are more parts, and step
2 is repeated for each, taught by the step before. All of it is switched in the recipe's section `stepwise`.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tailfin.checkpoint import content_hash, load_model_file, save_model
from tailfin.data import smooth_tail
from tailfin.data.dataset import TrainingDataset
from tailfin.data.smooth_tail import Exemplars, PlannedStep, planned_steps
from tailfin.errors import UserError
from tailfin.exemplar_scores import read_scores, score_annotations
from tailfin.files import read_object, write_json
from tailfin.methods.drcl import start
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.models.transfer import Transfer
from tailfin.processes import on_main
from tailfin.run import Run
from tailfin.samplers.plan import BatchPlan
from tailfin.samplers.stepwise import step_factors
from tailfin.schema.backbones import NAMED_WEIGHTS
from tailfin.schema.recipe import Recipe
from tailfin.schema.stepwise import EVERYTHING, Stepwise
from tailfin.schema.training import Sampler
from tailfin.weights import load_whole, memories


def train(run: Run) -> None:
    """All steps, each measured; an interrupted run goes on inside the step, or the selection, that it was in."""
    settings = run.recipe.stepwise
    assert settings is not None
    parts = smooth_tail.divide(run.stats.image_count, settings.division, settings.boundary)
    model = _given(run) if settings.base == "given" else _step0(run, settings, parts)
    name = "base"
    exemplars = select_exemplars(run, model, settings, parts)
    for step in planned_steps(settings, parts):
        _measure(run, model, name)
        model = _step(run, model, step, exemplars, len(settings.division) + 1)
        name = step.name
    metrics = run.finish(model)
    if metrics is not None:
        on_main(run.accelerator, lambda: write_json(_metrics_file(run, name), metrics, indent=1))


def select_exemplars(run: Run, model: Detector, settings: Stepwise, parts: NDArray[np.int64]) -> Exemplars:
    """The lists of RUN/exemplars.json; they are made, with `model`, where the file is not there yet."""
    path, folder = run.out / "exemplars.json", run.out / "exemplars.shards"
    index, options = run.train.index, settings.exemplars
    if on_main(run.accelerator, lambda: not path.exists()):
        score_annotations(
            model.to(run.accelerator.device),
            run.train,
            run.recipe.data,
            folder,
            accelerator=run.accelerator,
            batch=run.recipe.evaluation.batch,
            score=options.score,
            shard=options.shard,
        )
        run.accelerator.wait_for_everyone()

        def write() -> None:
            rows, scores = read_scores(folder, len(index.clean().rows))
            made = smooth_tail.rank_exemplars(
                index,
                rows,
                scores,
                threshold=options.threshold,
                distinct_images=options.distinct_images,
                length=options.length,
            )
            facts: dict[str, Any] = {
                "model": run.parents[-1] if run.parents else "",
                "division": list(settings.division),
                "boundary": settings.boundary,
                **options.model_dump(exclude={"shard"}),
            }
            smooth_tail.write_exemplars(path, made, index, parts, facts)
            shutil.rmtree(folder)

        on_main(run.accelerator, write)
    return smooth_tail.read_exemplars(path, index)


def freeze_but(model: Detector, names: Sequence[str]) -> None:
    """Only the named parts of a detector go on training, none: its class-specific ones; norms of frozen layers keep
    their statistics.
    """
    if EVERYTHING in names:
        return
    model.freeze_but(names or model.class_specific())


# ---- details ---------------------------------------------------------------------------------------------------------


def _step0(run: Run, settings: Stepwise, parts: NDArray[np.int64]) -> Detector:
    """The plain detector on all annotations, or on those of head classes."""
    recipe = run.planned("base").recipe
    kept = (parts == 0)[run.train.index.labels] if settings.base == "head" else None
    dataset = TrainingDataset(run.train, recipe.data, recipe.seed, kept=kept)
    return run.stage("base", start(run), dataset=dataset)


def _given(run: Run) -> Detector:
    """The detector of `weights` in the place of step 0; a copy of it in the run is what later steps start from."""
    planned = run.planned("base")
    path = run.out / "stages" / planned.folder / "model.safetensors"
    recipe = run.final_recipe = planned.recipe
    if recipe.weights in NAMED_WEIGHTS:
        raise UserError(f"stepwise.base given needs a trained detector: weights is {recipe.weights}, not a model file")
    model, notes = build_detector(recipe, run.stats, start=not path.exists())
    if path.exists():
        load_whole(model, load_model_file(path).weights, str(path))
        run.begin()
    else:
        for note in notes:
            run.say(note)
        source = content_hash(Path(recipe.weights))
        run.begin()  # may bring the file from another run

        def save() -> None:
            if not path.exists():
                save_model(path, model, recipe, run.stats, parents=[source], stage="base")

        on_main(run.accelerator, save)
    run.parents = [*run.parents, content_hash(path)]
    return model


def _step(run: Run, trained: Detector, step: PlannedStep, exemplars: Exemplars, parts: int) -> Detector:
    """One step from the weights of `trained`."""
    config, index = step.config, run.train.index
    recipe = run.planned(step.name).recipe
    dataset = TrainingDataset(
        run.train, recipe.data, recipe.seed, kept=smooth_tail.choose(exemplars, index, step.counts)
    )
    own = dataset.clean.rows
    factors = step_factors(
        index.image_of[own].astype(np.int64),
        index.labels[own].astype(np.int64),
        len(index),
        run.stats.image_count,
        config.rfs,
        step.own,
        expert=not step.old.any(),
        parts=parts,
    )
    plan = BatchPlan(
        index,
        dataset.rows(),
        run.stats,
        Sampler(name="plain", rounding=config.rfs.rounding),
        recipe.schedule.batch,
        recipe.schedule.epochs,
        recipe.seed,
        recipe.data.group_by_aspect,
        factors,
    )
    run.say(f"step {step.name}: {len(own)} annotations in {len(dataset.rows())} images, {len(plan.order(0))} an epoch")
    model = _copy(run, recipe, trained)
    freeze_but(model, config.trains)
    if config.distillation is None or not step.old.any():
        return run.stage(step.name, model, dataset=dataset, plan=plan)
    shell = Transfer(model, _copy(run, recipe, trained), torch.from_numpy(step.old), config.distillation)
    return run.stage(step.name, shell, dataset=dataset, plan=plan, product="student")


def _copy(run: Run, recipe: Recipe, trained: Detector) -> Detector:
    """A new detector with the weights of `trained`, as the recipe freezes and wraps it; memories start empty."""
    torch.manual_seed(recipe.seed)
    model, _ = build_detector(recipe, run.stats, start=False)
    anew = memories(trained)  # a step that was finished before has none either
    weights = {key: value for key, value in trained.state_dict().items() if not key.startswith(anew)}
    load_whole(model, weights, "the step before")
    return model


def _measure(run: Run, model: Detector, name: str) -> None:
    """Metrics of a finished step in its folder, once; a damaged file is made anew."""
    path = _metrics_file(run, name)

    def missing() -> bool:
        try:
            return "protocol" not in read_object(path, "metrics")
        except UserError:
            return True

    if run.val is not None and on_main(run.accelerator, missing):
        metrics = run.measure(model.to(run.accelerator.device))
        on_main(run.accelerator, lambda: write_json(path, metrics, indent=1))


def _metrics_file(run: Run, name: str) -> Path:
    return run.out / "stages" / run.planned(name).folder / "metrics.json"
