"""What the stages of a recipe train, made as their trainings make it, but of starting weights alone.

    for planned in stage_models(recipe, source, stats):
        planned.stage.name, planned.module, planned.dataset, planned.plan

Nothing trains and no weights are downloaded; what a later stage would refuse is refused here: parts that it lacks, a
classifier or feature module that does not go with it, files that cannot be read. `--dry-run` looks at the pictures and
the memory of these. Of a method of another package only the first stage is known.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from tailfin.data.dataset import Source, TrainingDataset
from tailfin.data.smooth_tail import planned_steps
from tailfin.methods import decoupled, drcl, stepwise
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.models.transfer import Transfer
from tailfin.run import batch_plan
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import PRETRAIN, Stage, stages
from tailfin.stats import ClassStats


class StageModel(NamedTuple):
    """A stage before it trains."""

    stage: Stage[Recipe]
    module: nn.Module  # what trains: the detector or the shell around it
    detector: Detector
    dataset: TrainingDataset
    plan: BatchPlan
    start: list[str]  # what a first stage starts from, in lines
    beside: nn.Module | None = None  # in memory without training: a teacher


def stage_models(recipe: Recipe, source: Source, stats: ClassStats) -> Iterator[StageModel]:
    """The stages in order, each made when it is asked for. Later steps of step-wise learning without a teacher are left
    out where step 0 trains: they need less than that."""
    planned = {stage.name: stage for stage in stages(recipe)}
    torch.manual_seed(recipe.seed)
    settings, config = recipe.stepwise, recipe.pretraining
    parts = stepwise.class_parts(recipe, stats) if settings is not None else None
    steps = planned_steps(settings, parts, stats.instance_count) if settings is not None and parts is not None else []
    if settings is not None:
        stepwise.kept_by_files(recipe, source.index, steps)
        stepwise.given_exemplars(recipe, source.index, steps)
        if settings.base == "given":
            stepwise.check_given(recipe)
    starts = recipe.weights != "imagenet"  # these may have to be downloaded
    if config is not None:
        before = planned.pop(PRETRAIN)
        proposals, views = drcl.views(source, before.recipe, config)
        plan = drcl.rebalanced(source, stats, before.recipe, config, proposals, views)
        detector, start = build_detector(before.recipe, stats, start=starts)
        shell = drcl.terms(detector, before.recipe, config, plan)
        yield _made(before, shell, detector, source, stats, start, dataset=views, plan=plan)
    detector, start = build_detector(recipe, stats, start=starts and config is None)
    first = next(iter(planned.values()))
    if detector.features is not None:
        detector.features.check(detector)
    if settings is not None:
        stepwise.check_trains(detector, steps)
        kept = None if parts is None or settings.base != "head" else (parts == 0)[source.index.labels]
        own = TrainingDataset(source, first.recipe.data, recipe.seed, kept=kept)
        yield _made(first, detector, detector, source, stats, start, dataset=own)
        for step in steps:
            taught = step.config.distillation if step.old.any() else None
            if taught is None and first.number:
                continue
            later = planned[step.name]
            student, _ = build_detector(later.recipe, stats, start=False)
            stepwise.freeze_but(student, step.config.trains)
            if taught is None:
                yield _made(later, student, student, source, stats)
            else:
                taught_by = Transfer(student, detector, torch.from_numpy(step.old), taught)
                yield _made(later, taught_by, student, source, stats)._replace(beside=detector)
        return
    yield _made(first, detector, detector, source, stats, start)
    if recipe.method in ("decoupled", "bacl"):
        second = planned["classifier"]
        model = decoupled.second_detector(recipe, second.recipe, stats, detector)
        yield _made(second, model, model, source, stats, **decoupled.samples(recipe, second.recipe, source, stats))


def _made(
    stage: Stage[Recipe],
    module: nn.Module,
    detector: Detector,
    source: Source,
    stats: ClassStats,
    start: list[str] | None = None,
    dataset: Any = None,
    plan: BatchPlan | None = None,
) -> StageModel:
    """A stage with its usual data set and order where it has no others."""
    dataset = dataset or TrainingDataset(source, stage.recipe.data, stage.recipe.seed)
    if "segm" in detector.kinds:
        dataset = dataset.with_masks()
    return StageModel(stage, module, detector, dataset, plan or batch_plan(stage.recipe, dataset, stats), start or [])
