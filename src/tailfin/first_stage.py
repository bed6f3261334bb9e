"""A finished first stage as the start of a new two-stage run: `tailfin train RECIPE --stage1 RUN`.

The arms of an ablation share one representation stage, so that they differ in their second stage alone. The stage is
taken as it is, by its bits: the new run has a copy of it in `stages/1-...`, its model file names it as its parent, and
its recipe is the one that trained it. So both recipes must agree on everything that stage 1 depends on; where they do
not, the mistake lists what differs, with the overrides that take the stage as it is.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailfin.checkpoint import file_hash, load_model_file
from tailfin.errors import UserError
from tailfin.files import read_json
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

# What a first stage does not depend on: its name, what comes after it, how it is measured and logged, how it is loaded.
FREE = ("name", "about", "method", "second", "stepwise", "calibration", "evaluation", "logging")
FREE_DATA = ("root", "train", "val", "synthesize", "workers", "max_pixels", "test_size", "test_max_size")
SHOWN = 8  # differences in a message


@dataclass(frozen=True)
class FirstStage:
    """A finished first stage: its model file and what is known of its run."""

    model: Path
    sha256: str
    run: Path

    def copy_to(self, folder: Path) -> None:
        """The stage's model and log in `folder`, the model last and whole: with it the stage counts as finished."""
        folder.mkdir(parents=True, exist_ok=True)
        log = self.model.with_name("metrics.jsonl")
        if log.is_file():
            shutil.copyfile(log, folder / log.name)
        begun = folder / f".{self.model.name}"
        shutil.copyfile(self.model, begun)
        begun.replace(folder / "model.safetensors")

    def facts(self) -> dict[str, str]:
        """For environment.json."""
        return {"run": str(self.run), "model": str(self.model), "sha256": self.sha256}


def first_stage(given: Path, recipe: Recipe, stats: ClassStats, fingerprint: str) -> FirstStage:
    """The first stage of the run `given` (or a model file), if `recipe` would train the same one.

    Args:
        given: a run folder whose first stage is finished, or its model file.
        recipe, stats: the new run's.
        fingerprint: of the new run's training annotations.

    Raises:
        UserError: no finished first stage there, other classes, other annotations, or another recipe of it.
    """
    if recipe.second is None and recipe.stepwise is None:
        raise UserError(f"--stage1 {given}: {recipe.name or 'the recipe'} has one stage only (method {recipe.method})")
    if recipe.pretraining is not None:
        raise UserError(f"--stage1 {given}: this recipe's first stage is its pre-training, set pretraining=null")
    run, model = located(given)
    file = load_model_file(model)
    if list(file.stats.names) != list(stats.names):
        raise UserError(
            f"--stage1 {given}: it has other classes ({file.stats.num_classes}, this run has {stats.num_classes})"
        )
    environment = run / "environment.json"
    trained_on = read_json(environment).get("data", {}).get("train") if environment.is_file() else None
    counts = (file.stats.image_count.tolist(), file.stats.instance_count.tolist())
    if trained_on not in (None, fingerprint) or counts != (stats.image_count.tolist(), stats.instance_count.tolist()):
        raise UserError(f"--stage1 {given}: it was trained on other annotations than this run's")
    different = differences(stage_settings(file.recipe), stage_settings(recipe))
    if different:
        shown = "; ".join(
            f"{key} is {_text(there)} there, {_text(here)} here" for key, there, here in different[:SHOWN]
        )
        more = f"; {len(different) - SHOWN} more" if len(different) > SHOWN else ""
        overrides = " ".join(f"'{key}={_text(there)}'" for key, there, _ in different)
        raise UserError(
            f"--stage1 {given}: this recipe would train another first stage: {shown}{more}. To take it as it is: "
            f"{overrides}"
        )
    return FirstStage(model.absolute(), file_hash(model), run.absolute())


def located(given: Path) -> tuple[Path, Path]:
    """(run folder, model file of its first stage)."""
    if given.is_file():
        parents = list(given.absolute().parents)
        inside = parents[1].name == "stages" if len(parents) > 1 else False
        return (parents[2] if inside else parents[0]), given
    if not given.is_dir():
        raise UserError(f"--stage1 {given} does not exist")
    finished = sorted(given.glob("stages/1-*/model.safetensors"))
    if not finished:
        begun = "its first stage is not finished" if (given / "recipe.yaml").is_file() else "it is no run folder"
        raise UserError(f"--stage1 {given}: {begun} (no stages/1-*/model.safetensors in it)")
    return given, finished[0]


def stage_settings(recipe: Recipe) -> dict[str, Any]:
    """What the weights of the first stage follow from, as flat keys; annotations and classes are compared apart."""
    values = recipe.model_dump(mode="json", exclude=set(FREE))
    for key in FREE_DATA:
        del values["data"][key]
    return _flat(values)


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Keys with the values of both, where they differ; a key that one lacks has None there."""
    keys = dict.fromkeys([*here, *there])
    return [(key, there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)
