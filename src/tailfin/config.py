"""The recipe: one YAML file that says everything about a training run, checked against the schema.

A recipe states what differs from the schema's defaults; `tailfin recipes show NAME` and `RUN/recipe.yaml` print all of
it. A file may have variants, `FILE:VARIANT` (`recipe_values.py`); nothing is inherited between files. An unknown key is
an error that names its path and the nearest key that exists. Overrides are `a.b=c` and pass the same check::

    recipe = load_recipe("fod/losses:seesaw", ["schedule.epochs=4"])
    recipe = load_recipe("fod/faster_rcnn_r18_softmax", ["schedule.epochs=4", "loss=focal", "loss.focal_gamma=1.5"])

A section that is chosen by name (`loss`, `sampler`, `features`, `detector.classifier`, ...) may be given as the bare
name; a new name drops the options of the old one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from tailfin import recipes
from tailfin.errors import UserError
from tailfin.files import existing_file, read_text
from tailfin.recipe_values import assign, parse_recipe, parse_yaml, split_override
from tailfin.schema.presets import PRESETS, change_preset, own_terms
from tailfin.schema.problems import explain
from tailfin.schema.recipe import Recipe
from tailfin.schema.training import Schedule

__all__ = [
    "check_data_is_named",
    "check_recipe",
    "dump_recipe",
    "load_recipe",
    "parse_yaml",
    "recipe_from_file",
    "split_override",
    "stored_recipe",
]
SCHEDULES = ("schedule", "second.schedule", "pretraining.schedule")


def load_recipe(name: str | Path, overrides: Iterable[str] | Mapping[str, Any] = ()) -> Recipe:
    """A recipe with overrides (`["a.b=c"]` or `{"a.b": c}`) on top.

    `name` is that of a recipe of the package, the path of a YAML file, one of these with `:VARIANT`, or the id of a
    published row.
    """
    found = recipes.find(str(name))
    values = found.values()
    given = list(overrides.items() if isinstance(overrides, Mapping) else map(split_override, overrides))
    _change_preset(values, dict(given).get("pretraining.preset"), found.label)
    batches = {section: _at(values, f"{section}.batch") or Schedule().batch for section in SCHEDULES}
    for key, value in given:
        assign(values, key, value)
    for section, batch in batches.items():  # the batch that the recipe's rate is for
        rule = _at(values, f"{section}.lr_rule") or "none"
        if rule != "none" and not _at(values, f"{section}.lr_batch"):
            assign(values, f"{section}.lr_batch", batch)
    return check_recipe(values, found.label)


def recipe_from_file(path: str | Path) -> Recipe:
    """The recipe that a run has stored, `RUN/recipe.yaml`."""
    path = existing_file(path, "recipe")
    values, _ = parse_recipe(read_text(path, "recipe"), str(path))
    return stored_recipe(values, str(path))


def stored_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """A resolved recipe of a run or model file; those of before 0.1 have options of terms that a preset lacks."""
    section = values.get("pretraining")
    if isinstance(section, dict) and (preset := section.get("preset")) in PRESETS:
        own, _ = own_terms(section, preset)
        weights = section.get("weights") or {}
        if lost := [term for term, weight in weights.items() if weight and term not in own.get("weights", {})]:
            _say(f"{source}: it was pre-trained with {', '.join(lost)} too, which preset {preset} does not have")
        values = {**values, "pretraining": own}
    return check_recipe(values, source)


def check_recipe(values: Mapping[str, Any], source: str) -> Recipe:
    """Plain values to a `Recipe`; the first problem becomes a `UserError` that names its path."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, source, Recipe)) from None


def check_data_is_named(name: str, recipe: Recipe, overrides: Mapping[str, Any] | Sequence[str]) -> None:
    """Refuse what a recipe of the package finds by chance: the file of the working directory that has the name of its
    own data's file."""
    data = recipe.data
    file = Path(data.train.annotations)
    if data.root or not data.train.annotations or file.is_absolute() or not recipes.find(name).packaged:
        return
    if any(key.startswith(("data.root", "data.train")) for key in overrides):
        return
    found = f", and {file} of the working directory would be taken" if file.is_file() else ""
    this = " (data.root=. for this one)" if found else ""
    raise UserError(
        f"{name}: no training data is named{found}: give --train FILE and --val FILE, or data.root=FOLDER{this}"
    )


def dump_recipe(recipe: Recipe) -> str:
    """The fully resolved recipe as YAML text that loads to the same recipe."""
    values = recipe.model_dump(mode="json")
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=120)


def _at(values: Any, key: str) -> Any:
    """The plain value at a dotted key, or none."""
    for part in key.split("."):
        values = values.get(part) if isinstance(values, dict) else None
    return values


def _change_preset(values: dict[str, Any], preset: Any, source: str) -> None:
    """Let the pre-training preset of an override take the place of the file's, and say what goes with that."""
    section = values.get("pretraining")
    if preset not in PRESETS or not isinstance(section, dict) or section.get("preset", "drcl") == preset:
        return
    values["pretraining"], dropped = change_preset(section, preset)
    if dropped:
        keys = ", ".join(f"pretraining.{key}" for key in dropped)
        _say(f"{source}: preset {preset} in the place of {section.get('preset', 'drcl')}, without {keys}")


def _say(text: str) -> None:
    """A line for the user, from one process."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr)
