"""A stage as the feature module of its detector wants it (`FeatureModule.around`): other samples, another step."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from tailfin.checkpoint import resume_point
from tailfin.engine import seed_iteration
from tailfin.models.detector import Detector
from tailfin.models.features.base import StageFacts
from tailfin.run import Run, batch_plan
from tailfin.schema.recipe import Recipe


def feature_stage(run: Run, name: str, model: Detector, recipe: Recipe | None = None, **options: Any) -> Detector:
    """`run.stage` with what the feature module of the detector `model` needs; without one just that."""
    recipe = recipe or run.planned(name).recipe
    if model.features is not None:
        model.features.check(model)
        rank = run.accelerator.process_index
        facts = StageFacts(
            recipe,
            run.train,
            run.stats,
            run.accelerator,
            plan=lambda dataset: batch_plan(recipe, dataset, run.stats),
            seed=partial(seed_iteration, recipe.seed, rank=rank),
            say=run.say,
            later=bool(run.stages_done) and not _begun(run.out / "stages" / run.planned(name).folder),
        )
        options = {**options, **model.features.around(model, facts)}
    return run.stage(name, model, recipe=recipe, **options)


def _begun(folder: Path) -> bool:
    """Whether the stage has a resume point or is finished: it brings its own memory."""
    return resume_point(folder) is not None or (folder / "model.safetensors").exists()
