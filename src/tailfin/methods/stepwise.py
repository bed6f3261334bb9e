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

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tailfin.checkpoint import content_hash, file_hash, load_model_file, save_model
from tailfin.class_rows import class_names, read_aliases
from tailfin.data import smooth_tail
from tailfin.data.dataset import TrainingDataset
from tailfin.data.index import AnnotationIndex
from tailfin.data.smooth_tail import Exemplars, PlannedStep, planned_steps
from tailfin.errors import UserError, nearest
from tailfin.exemplar_scores import read_scores, score_annotations
from tailfin.files import read_object, write_json, writing
from tailfin.joins import join_classes
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
from tailfin.stats import ClassStats
from tailfin.weights import load_whole, memories


def train(run: Run) -> None:
    """All steps, each measured; an interrupted run goes on inside the step, or the selection, that it was in."""
    settings = run.recipe.stepwise
    assert settings is not None
    parts = class_parts(run.recipe, run.stats, run.out / "stages" / run.planned("base").folder / "model.safetensors")
    planned = planned_steps(settings, parts, run.stats.instance_count)
    files = kept_by_files(run.recipe, run.train.index, planned)
    begun = on_main(run.accelerator, (run.out / "exemplars.json").exists)
    chosen = None if begun else given_exemplars(run.recipe, run.train.index, planned)
    model = _given(run, planned) if settings.base == "given" else _step0(run, settings, parts, planned)
    name = "base"
    exemplars = None
    if any(not step.file for step in planned):
        exemplars = select_exemplars(run, model, settings, parts, chosen)
    for step in planned:
        _measure(run, model, name)
        if step.file:
            kept = files[step.name]
        else:
            assert exemplars is not None
            kept = _chosen(run, step, exemplars)
        model = _step(run, model, step, kept, settings)
        name = step.name
    metrics = run.finish(model)
    if metrics is not None:
        on_main(run.accelerator, lambda: write_json(_metrics_file(run, name), metrics, indent=1))


def class_parts(recipe: Recipe, stats: ClassStats, begun: Path | None = None) -> NDArray[np.int64]:
    """Part of each class, int64 [C]: by its training images, or 0 for a class that `weights` knows and 1 for a new one.

    `begun` is the copy of the given detector in a run that has begun, which remembers the classes.
    """
    settings = recipe.stepwise
    assert settings is not None
    if settings.parts == "images":
        return smooth_tail.divide(stats.image_count, settings.division, settings.boundary)
    if settings.parts == "rank":
        if settings.division[-1] >= len(stats.names):
            raise UserError(
                f"stepwise.division {list(settings.division)} by rank: the data have {len(stats.names)} classes, "
                "the last cut leaves none behind it"
            )
        return smooth_tail.divide_by_rank(stats.instance_count, settings.division)
    if begun is not None and begun.exists():
        old = load_model_file(begun).fact("known")
    else:
        old = class_names(recipe.weights)
    if old is None:
        raise UserError(f"stepwise.parts known: weights {recipe.weights} is no model file, which says its classes")
    aliases = read_aliases(recipe.classes.map) if recipe.classes.map else None
    parts = (join_classes(stats.names, old, aliases).rows < 0).astype(np.int64)
    if not parts.any() or parts.all():
        many = "all" if not parts.any() else "none"
        raise UserError(f"stepwise.parts known: {recipe.weights} knows {many} of the data's {len(parts)} classes")
    return parts


def kept_by_files(
    recipe: Recipe, index: AnnotationIndex, planned: Sequence[PlannedStep]
) -> dict[str, NDArray[np.bool_]]:
    """What the steps keep that name an annotation file, read before anything trains."""
    return {step.name: smooth_tail.read_kept(_file(recipe, step.file), index) for step in planned if step.file}


def given_exemplars(recipe: Recipe, index: AnnotationIndex, planned: Sequence[PlannedStep]) -> Exemplars | None:
    """The lists of `exemplars.file`, read before anything trains; None where the run selects them."""
    assert recipe.stepwise is not None
    file = recipe.stepwise.exemplars.file
    if not file or all(step.file for step in planned):
        return None
    return smooth_tail.read_exemplars(_exemplar_file(recipe, file), index)


def select_exemplars(
    run: Run, model: Detector, settings: Stepwise, parts: NDArray[np.int64], given: Exemplars | None = None
) -> Exemplars:
    """The lists of RUN/exemplars.json; where the file is not there yet they are those `given`, or made with `model`."""
    path, folder = run.out / "exemplars.json", run.out / "exemplars.shards"
    index, options = run.train.index, settings.exemplars
    divided = {"division": list(settings.division), "boundary": settings.boundary}
    if given is not None:
        source = _exemplar_file(run.recipe, options.file)
        facts = {
            **smooth_tail.read_facts(source),
            **divided,
            "source": {"file": str(source), "sha256": file_hash(source)},
        }
        on_main(run.accelerator, lambda: smooth_tail.write_exemplars(path, given, index, parts, facts))
        run.say(f"exemplars: those of {source}")
    elif options.order == "random":

        def draw() -> None:
            if path.exists():
                return
            rows = index.clean().rows
            scores = smooth_tail.random_scores(index, rows, run.recipe.seed)
            made = smooth_tail.rank_exemplars(
                index, rows, scores, threshold=1.0, distinct_images=False, length=options.length
            )
            facts: dict[str, Any] = {**divided, "order": "random", "seed": run.recipe.seed, "length": options.length}
            smooth_tail.write_exemplars(path, made, index, parts, facts)

        on_main(run.accelerator, draw)
        run.say("exemplars: whole pictures of each class by chance")
    elif on_main(run.accelerator, lambda: not path.exists()):
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
                **divided,
                **options.model_dump(exclude={"shard", "file"}),
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


def check_given(recipe: Recipe) -> None:
    """Refuse weights that are no detector in the place of step 0."""
    if recipe.weights in NAMED_WEIGHTS:
        raise UserError(f"stepwise.base given needs a trained detector: weights is {recipe.weights}, not a model file")


def check_trains(model: Detector, planned: Sequence[PlannedStep]) -> None:
    """Refuse steps that this detector cannot do, before anything trains: parts that it lacks or that are frozen whole,
    a teacher for one that cannot be taught.
    """
    parts = model.parts()
    for step in planned:
        names = step.config.trains or model.class_specific()
        for name in names if EVERYTHING not in names else ():
            if name not in parts:
                raise UserError(
                    f'step {step.name} trains "{name}", this detector has no such part{nearest(name, parts)}'
                )
        trained = [parts[name] for name in names] if EVERYTHING not in names else [model]
        if not any(parameter.requires_grad for part in trained for parameter in part.parameters()):
            raise UserError(f"step {step.name} trains {', '.join(names)}, all of which the detector's section freezes")
        if step.config.distillation is not None and step.old.any() and (why := model.untaught()):
            raise UserError(f"stepwise: {why}; step {step.name} has a teacher (distillation: null leaves it out)")


def _file(recipe: Recipe, file: str) -> Path:
    return Path(recipe.data.root) / file


def _exemplar_file(recipe: Recipe, file: str) -> Path:
    """A file of exemplars, or that of a run folder."""
    path = _file(recipe, file)
    return path / "exemplars.json" if path.is_dir() else path


def _hash_of(recipe: Recipe, file: Path) -> str:
    return file_hash(_exemplar_file(recipe, str(file.absolute())))


def _chosen(run: Run, step: PlannedStep, exemplars: Exemplars) -> NDArray[np.bool_]:
    """What a step keeps of the exemplars; lists that are too short for it are said."""
    index = run.train.index
    if few := smooth_tail.few_exemplars(exemplars, index, step.counts):
        label = few[0]
        listed, wanted = int(np.diff(exemplars.offsets)[label]), int(step.counts[label])
        run.say(
            f"step {step.name}: {len(few)} classes have fewer exemplars listed than the step wants, "
            f'first "{index.names[label]}" with {listed} of {wanted}'
        )
    return smooth_tail.choose(exemplars, index, step.counts)


def _step0(run: Run, settings: Stepwise, parts: NDArray[np.int64], planned: Sequence[PlannedStep]) -> Detector:
    """The plain detector on all annotations, or on those of head classes."""
    recipe = run.planned("base").recipe
    kept = (parts == 0)[run.train.index.labels] if settings.base == "head" else None
    dataset = TrainingDataset(run.train, recipe.data, recipe.seed, kept=kept)
    model = start(run)
    check_trains(model, planned)
    return run.stage("base", model, dataset=dataset)


def _given(run: Run, steps: Sequence[PlannedStep]) -> Detector:
    """The detector of `weights` in the place of step 0; a copy of it in the run is what later steps start from."""
    planned = run.planned("base")
    path = run.out / "stages" / planned.folder / "model.safetensors"
    recipe = run.final_recipe = planned.recipe
    check_given(recipe)
    torch.manual_seed(recipe.seed)  # classes that the weights lack start the same on every process
    model, notes = build_detector(recipe, run.stats, start=not path.exists())
    check_trains(model, steps)
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
                known = json.dumps(class_names(recipe.weights))
                save_model(path, model, recipe, run.stats, parents=[source], stage="base", known=known)

        on_main(run.accelerator, save)
    run.parents = [*run.parents, content_hash(path)]
    return model


def _step(run: Run, trained: Detector, step: PlannedStep, kept: NDArray[np.bool_], settings: Stepwise) -> Detector:
    """One step from the weights of `trained`."""
    config, index = step.config, run.train.index
    recipe = run.planned(step.name).recipe
    dataset = TrainingDataset(run.train, recipe.data, recipe.seed, kept=kept)
    plan = _plan(run, recipe, step, dataset, settings)
    if config.shows == "all":
        dataset = TrainingDataset(run.train, recipe.data, recipe.seed)
        recipe = _stretched(recipe, plan.iterations, _plan(run, recipe, step, dataset, settings).iterations)
        plan = _plan(run, recipe, step, dataset, settings)
    own = dataset.clean.rows
    run.say(f"step {step.name}: {len(own)} annotations in {len(dataset.rows())} images, {plan.length(0)} an epoch")
    on_main(run.accelerator, lambda: _record(run, step, plan, index.labels[own]))
    model = _copy(run, recipe, trained)
    freeze_but(model, config.trains)
    if config.distillation is None or not step.old.any():
        return run.stage(step.name, model, recipe=recipe, dataset=dataset, plan=plan)
    shell = Transfer(model, _copy(run, recipe, trained), torch.from_numpy(step.old), config.distillation)
    return run.stage(step.name, shell, recipe=recipe, dataset=dataset, plan=plan, product="student")


def _plan(run: Run, recipe: Recipe, step: PlannedStep, dataset: TrainingDataset, settings: Stepwise) -> BatchPlan:
    """The order of a step: the images of `dataset`, repeated by the bands of their classes."""
    index, own, rfs = run.train.index, dataset.clean.rows, step.config.rfs
    factors = step_factors(
        index.image_of[own].astype(np.int64),
        index.labels[own].astype(np.int64),
        len(index),
        run.stats.image_count,
        rfs,
        step.own,
        expert=not step.old.any(),
        division=settings.division,
        boundary=settings.boundary,
    )
    return BatchPlan(
        index,
        dataset.rows(),
        run.stats,
        Sampler(name="plain", rounding=rfs.rounding),
        recipe.schedule.batch,
        recipe.schedule.epochs,
        recipe.seed,
        recipe.data.group_by_aspect,
        factors,
    )


def _stretched(recipe: Recipe, iterations: int, planned: int) -> Recipe:
    """The recipe with epochs and milestones such that `iterations` come of them, in the place of the `planned` ones."""
    share, schedule = iterations / planned, recipe.schedule
    update = {"epochs": schedule.epochs * share, "milestones": tuple(epoch * share for epoch in schedule.milestones)}
    return recipe.model_copy(update={"schedule": schedule.model_copy(update=update)})


def _record(run: Run, step: PlannedStep, plan: BatchPlan, labels: NDArray[np.int32]) -> None:
    """`step.json`: what a step is for and trains on, for the report and for other runs that take it."""
    planned = run.planned(step.name)
    path = run.out / "stages" / planned.folder / "step.json"
    if path.exists():
        return
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    facts = {
        "step": step.name,
        "annotations": np.bincount(labels, minlength=len(step.own)).tolist(),
        "own": np.flatnonzero(step.own).tolist(),
        "old": np.flatnonzero(step.old).tolist(),
        "images": len(plan.rows),
        "epoch": plan.length(0),
        "iterations": plan.iterations,
        "trains": list(step.config.trains),
        "reads": {key: _hash_of(run.recipe, file) for key, file in planned.reads.items()},
    }
    write_json(path, facts)


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
