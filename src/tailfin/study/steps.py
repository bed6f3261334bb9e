"""Optimiser steps of a recipe's stages, and the epochs that make a given number of them.

An epoch with repeated pictures has more steps than a plain one, so arms of equal epochs are not arms of equal cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailfin.data.dataset import Source, TrainingDataset, open_source
from tailfin.errors import UserError
from tailfin.run import batch_plan
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import PRETRAIN, Stage, stages
from tailfin.schema.training import Schedule
from tailfin.stats import ClassStats

SECTION = {  # where the schedule of a stage is
    PRETRAIN: "pretraining.schedule",
    "train": "schedule",
    "representation": "schedule",
    "classifier": "second.schedule",
}
TRIES = 20  # of an order that depends on the number of epochs


@dataclass(frozen=True)
class Files:
    """The training pictures of a set."""

    train: Source
    stats: ClassStats


def open_files(recipe: Recipe) -> Files:
    """A recipe's training annotations and their classes."""
    train = open_source(recipe.data.train, recipe.data.root, "train")
    return Files(train, ClassStats.from_index(train.index, group_bounds=recipe.evaluation.group_bounds))


def planned_steps(recipe: Recipe, files: Files) -> dict[str, int]:
    """Optimiser steps by stage; a stage of step-wise learning after the first one is counted once it is known."""
    found = {}
    for stage in stages(recipe):
        if stage.number and (recipe.stepwise is None or stage.name == "base"):
            found[stage.name] = _plan(stage.recipe, stage.recipe.schedule.epochs, files).iterations
    return found


def steps_overrides(recipe: Recipe, files: Files, steps: int | Sequence[int]) -> dict[str, Any]:
    """Overrides that give a recipe's stages so many steps: `steps` in all, or of each stage.

    Of a number for all, a pre-training has half, and the stages after it the rest in equal parts. The points where a
    rate drops keep their share of the stage.
    """
    plan = [stage for stage in stages(recipe) if stage.number]
    unknown = next((stage.name for stage in plan if stage.name not in SECTION), None)
    if recipe.stepwise is not None or unknown:
        raise UserError(
            f"the steps of stage {unknown or 'step-wise learning'} cannot be set: give the arm `steps: own`"
        )
    parts = _parts(plan, steps) if isinstance(steps, int) else list(steps)
    if len(parts) != len(plan):
        raise UserError(f"steps has {len(parts)} numbers for {len(plan)} stages ({', '.join(s.name for s in plan)})")
    found: dict[str, Any] = {}
    for stage, count in zip(plan, parts, strict=True):
        section, schedule = SECTION[stage.name], stage.recipe.schedule
        epochs = epochs_for(stage.recipe, files, count)
        found[f"{section}.epochs"] = epochs
        if schedule.decay == "multistep":
            found[f"{section}.milestones"] = _milestones(schedule, epochs)
    return found


def epochs_for(recipe: Recipe, files: Files, steps: int) -> float:
    """The epochs, a fraction of the last one where need be, whose plan has `steps` optimiser steps."""
    epochs = max(steps * recipe.schedule.batch / max(len(files.train.index), 1), 1e-3)
    for _ in range(TRIES):
        plan = _plan(recipe, epochs, files)
        whole = 0
        done = 0
        while True:  # whole epochs that fit
            length = -(-plan.length(whole) // recipe.schedule.batch)
            if done + length > steps:
                break
            done, whole = done + length, whole + 1
        found = round(whole + (steps - done) / length, 6)
        if found == epochs:
            return epochs
        epochs = found
        if _plan(recipe, epochs, files).iterations == steps:
            return epochs
    raise UserError(f"no number of epochs makes {steps} steps with sampler {recipe.sampler.name}")


def _parts(plan: Sequence[Stage[Recipe]], steps: int) -> list[int]:
    """`steps` over the stages."""
    if plan[0].name == PRETRAIN:
        return [steps - steps // 2, *_parts(plan[1:], steps // 2)]
    each = np.diff(np.linspace(0, steps, len(plan) + 1).round().astype(int))
    return [int(count) for count in each]


def _plan(recipe: Recipe, epochs: float, files: Files) -> BatchPlan:
    schedule = recipe.schedule.model_copy(update={"epochs": epochs})
    own = recipe.model_copy(update={"schedule": schedule})
    return batch_plan(own, TrainingDataset(files.train, own.data, own.seed), files.stats)


def _milestones(schedule: Schedule, epochs: float) -> list[float]:
    return [round(one * epochs / schedule.epochs, 4) for one in schedule.milestones]
