"""Finished stages of another run in the place of training them: `tailfin train RECIPE --reuse RUN`.

The arms of an ablation share the stages in which they do not differ: a pre-training, a representation, step-wise
learning's step 0 with its exemplars, its expert. A stage is taken as it is, by its bits: the new run has a copy of it,
its model file names it as a parent, and its recipe is the one that trained it. `--reuse` takes every finished stage
with the same inputs (`tailfin.schema.stages`), in order, up to the first that differs, and says which keys do.
`--stage1` demands the first one, and it alone, or with `RUN/stages/K-NAME` that one and all before it; there the
mistake has the overrides that take the stage as it is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tailfin.checkpoint import ModelFile, content_hash, file_hash, load_model_file
from tailfin.config import recipe_from_file
from tailfin.errors import UserError
from tailfin.files import read_object, writing
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import PRETRAIN, Stage, differences, own_inputs, stages
from tailfin.stats import ClassStats

FIRST = ("", "train", "representation", "base")  # what the model file of a first stage says that it is
SHOWN = 8  # differences in a message
# what goes with a stage's model: its log, pictures for the report, what a step trained on
BESIDE = ("metrics.jsonl", "pictures.npz", "step.json")
NO_MEASURE = {"every", "patience", "select"}  # of `evaluation`, what does not change the numbers of a finished stage


class Data(NamedTuple):
    """What a run is trained on."""

    stats: ClassStats
    train: str  # fingerprints of its annotation files
    val: str = ""


@dataclass(frozen=True)
class Finished:
    """A finished stage of another run that takes the place of one of this run."""

    stage: Stage[Recipe]  # of this run
    model: Path
    sha256: str
    run: Path
    files: tuple[Path, ...] = ()  # of the run folder, that follow from it
    metrics: Path | None = None  # of the stage, where they were measured as this run would

    def copy_to(self, out: Path) -> None:
        """The stage in the run folder `out`, its model last and whole: with it the stage counts as finished."""
        folder = out / "stages" / self.stage.folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        for name in BESIDE:
            if (other := self.model.with_name(name)).is_file():
                _copy(other, folder / name)
        if self.metrics is not None:
            _copy(self.metrics, folder / "metrics.json")
        for file in self.files:
            _copy(file, out / file.name)
        _copy(self.model, folder / "model.safetensors")

    def facts(self) -> dict[str, str]:
        """For environment.json."""
        return {"stage": self.stage.name, "run": str(self.run), "model": str(self.model), "sha256": self.sha256}


@dataclass(frozen=True)
class Reused:
    """The stages that are taken, in order, and lines that say why no more are."""

    stages: list[Finished] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def first_stage(given: Path, recipe: Recipe, data: Data) -> Reused:
    """The first stage of the run `given` (or a model file), if `recipe` would train the same one; where `given` is a
    later stage of a run (its folder or model file), that one and all before it.

    Raises:
        UserError: no finished stage there, other classes, other annotations, or another recipe of it.
    """
    plan = stages(recipe)
    if len(plan) == 1:
        raise UserError(f"--stage1 {given}: {recipe.name or 'the recipe'} has one stage only (method {recipe.method})")
    option = f"--stage1 {given}"
    run, count = _up_to(given)
    if count > len(plan):
        raise UserError(f"{option}: it is stage {count} of its run, this recipe has {len(plan)} stages")
    return _matched(option, run, plan[:count], data, demanded=True, measured=recipe.stepwise is not None)


def finished_stages(given: Path, recipe: Recipe, data: Data) -> Reused:
    """Every finished stage of the run `given` that `recipe` would train the same, up to the first that differs.

    Raises:
        UserError: no finished stage there, other classes or other annotations.
    """
    measured = recipe.stepwise is not None  # the only method that measures its stages
    return _matched(f"--reuse {given}", given, stages(recipe), data, demanded=False, measured=measured)


# ---- details ---------------------------------------------------------------------------------------------------------


def _matched(
    option: str, given: Path, plan: Sequence[Stage[Recipe]], data: Data, *, demanded: bool, measured: bool
) -> Reused:
    run, models = _located(option, given)
    trained_on = _check_data(option, run, load_model_file(models[0]), data)
    their_plan = _plan(run, given)
    reused = Reused()
    for number, stage in enumerate(plan):
        if number == len(models) and demanded:
            raise UserError(f"{option}: its stage {stage.name} is not finished")
        if number == len(models):
            reused.notes.append(f"stage {stage.name} is not taken from {run}: it has no more finished ones")
            break
        file = load_model_file(models[number])
        theirs = their_plan[number] if their_plan else _alone(file)
        reason = _reason(stage, theirs, demanded)
        if not reason and their_plan:
            reason = _other_weights(stage, theirs, file, reused.stages)
        if not reason:
            reason = _other_reads(stage, models[number])
        if not reason and _chosen_on_val(stage.recipe) and trained_on.get("val") != data.val:
            reason = "its weights were chosen on other validation annotations"
        if reason and demanded:
            raise UserError(f"{option}: {reason}")
        if reason:
            reused.notes.append(f"stage {stage.name} is not taken from {run}: {reason}")
            break
        sha256 = content_hash(models[number])
        files, missing = _files(stage, theirs, run, (sha256, file_hash(models[number])))
        metrics = None
        if measured and data.val and trained_on.get("val") == data.val:
            metrics = _metrics(stage, theirs, models[number], run if len(their_plan) == 1 else None)
        reused.stages.append(Finished(stage, models[number].absolute(), sha256, run.absolute(), files, metrics))
        if missing and demanded and number + 1 < len(plan):
            raise UserError(f"{option}: {missing}, and the stages behind it follow from it")
        if missing:
            reused.notes.append(missing)
            break
    if not reused.stages:
        raise UserError(f"{option}: nothing can be taken: {'; '.join(reused.notes)}")
    return reused


def _up_to(given: Path) -> tuple[Path, int]:
    """(run or file to look into, number of stages that are meant): of a later stage of a run all up to it."""
    folder = given.parent if given.is_file() else given
    number = re.match(r"(\d+)-", folder.name)
    run = folder.absolute().parent.parent
    if folder.absolute().parent.name != "stages" or number is None:
        return given, 1
    first = 0 if any(run.glob("stages/0-*")) else 1
    count = int(number[1]) - first + 1
    return (folder / "model.safetensors" if count == 1 else run), count


def _located(option: str, given: Path) -> tuple[Path, list[Path]]:
    """(run folder, model files of its finished stages without a gap); of a model file itself, and the run around it."""
    if given.is_file():
        parents = list(given.absolute().parents)
        inside = parents[1].name == "stages" if len(parents) > 1 else False
        return (parents[2] if inside else parents[0]), [given]
    if not given.is_dir():
        raise UserError(f"{option} does not exist")
    found = {int(path.parent.name.partition("-")[0]): path for path in given.glob("stages/[0-9]*-*/model.safetensors")}
    first = 0 if 0 in found else 1
    models: list[Path] = []
    while first + len(models) in found:
        models.append(found[first + len(models)])
    if not models:
        begun = "its first stage is not finished" if (given / "recipe.yaml").is_file() else "it is no run folder"
        raise UserError(f"{option}: {begun} (no stages/1-*/model.safetensors in it)")
    return given, models


def _plan(run: Path, given: Path) -> list[Stage[Recipe]]:
    """The stages of the run; none where there is only a model file, whose own recipe has to say what it is."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        return []
    plan = stages(recipe_from_file(recipe))
    if given.is_file():
        return [stage for stage in plan if stage.folder == given.absolute().parent.name]
    return plan


def _check_data(option: str, run: Path, file: ModelFile, data: Data) -> dict[str, str]:
    """Fingerprints of what the run was trained and measured on; other classes or annotations are a mistake."""
    if list(file.stats.names) != list(data.stats.names):
        raise UserError(
            f"{option}: it has other classes ({file.stats.num_classes}, this run has {data.stats.num_classes})"
        )
    environment = run / "environment.json"
    trained_on = read_object(environment).get("data", {}) if environment.is_file() else {}
    if not isinstance(trained_on, dict):
        raise UserError(f"{option}: {environment} is damaged, its data are no JSON object")
    counts = (file.stats.image_count.tolist(), file.stats.instance_count.tolist())
    own = (data.stats.image_count.tolist(), data.stats.instance_count.tolist())
    if trained_on.get("train") not in (None, data.train) or counts != own:
        raise UserError(f"{option}: it was trained on other annotations than this run's")
    return trained_on


def _reason(stage: Stage[Recipe], theirs: Stage[Recipe], demanded: bool) -> str:
    """Why `theirs` is not what this run would train; empty where it is."""
    if (stage.name == PRETRAIN) != (theirs.name == PRETRAIN):
        if stage.name == PRETRAIN:
            return f"this recipe's stage is its pre-training, that run's is {theirs.name}: set pretraining=null"
        return f"that run's stage is a pre-training, this recipe's is {stage.name}"
    if 0 in (stage.number, theirs.number) and stage.number != theirs.number:
        given, trained = ("there", "here") if theirs.number == 0 else ("here", "there")
        return f"its detector is given by weights {given} and trained {trained} (stepwise.base)"
    if stage.number != theirs.number:
        return f"it is stage {theirs.number} of its run, {theirs.name}"
    different = differences(theirs.inputs, stage.inputs)
    if not different:
        return ""
    shown = _listed(different)
    if not demanded:
        return shown
    overrides = " ".join(f"'{key}={_text(there)}'" for key, there, _ in different)
    what = "first stage" if stage.number < 2 else f"stage {stage.name}"
    return f"this recipe would train another {what}: {shown}. To take it as it is: {overrides}"


def _other_reads(stage: Stage[Recipe], model: Path) -> str:
    """Why files from outside, that the stage follows from, are not those that it followed from there; or empty."""
    if not stage.reads:
        return ""
    step = model.with_name("step.json")
    read = read_object(step).get("reads", {}) if step.is_file() else {}
    for key, path in stage.reads.items():
        file = path / "exemplars.json" if path.is_dir() else path
        if not isinstance(read, dict) or not file.is_file() or read.get(key) != file_hash(file):
            return f"{key}: {path} is another file by now"
    return ""


def _metrics(stage: Stage[Recipe], theirs: Stage[Recipe], model: Path, whole: Path | None) -> Path | None:
    """The metrics of a stage, where they were measured as this run measures; `whole` is a run of this stage alone."""

    def how(recipe: Recipe) -> Any:
        calibration = None if recipe.calibration is None else recipe.calibration.model_dump()
        return (
            recipe.evaluation.model_dump(exclude=NO_MEASURE),
            (recipe.data.inference_size, recipe.data.resize == "stretch"),
            calibration,
        )

    if how(stage.recipe) != how(theirs.recipe):
        return None
    places = [model.with_name("metrics.json"), *([whole / "metrics.json"] if whole is not None else [])]
    return next((path.absolute() for path in places if path.is_file()), None)


def _other_weights(stage: Stage[Recipe], theirs: Stage[Recipe], file: ModelFile, before: Sequence[Finished]) -> str:
    """Why a model file does not come from its run's recipe and the stages `before` it; or empty."""
    if differences(own_inputs(file.recipe), own_inputs(theirs.recipe)):
        return f"{file.path} was trained by another recipe than its run has now"
    parents = file.fact("parents", [])
    if stage.number == 0:
        source = Path(stage.recipe.weights)
        known = source.is_file() and parents in ([content_hash(source)], [file_hash(source)])
        return "" if known else f"{source} is another file by now"
    # runs of earlier versions name their parents by the bytes of their files
    if parents != [one.sha256 for one in before] and parents != [file_hash(one.model) for one in before]:
        return f"{file.path} started from other weights than the stages before it have"
    return ""


def _alone(file: ModelFile) -> Stage[Recipe]:
    """The stage that a model file without its run is: a first one, or the final model of a run that has no more."""
    name, parents = file.metadata.get("stage", ""), file.fact("parents", [])
    if name not in FIRST or not isinstance(parents, list) or len(parents) > (not name):
        raise UserError(f"{file.path} is not the model of a first stage{f', but of {name}' if name else ''}")
    return stages(file.recipe)[0]


def _chosen_on_val(recipe: Recipe) -> bool:
    return recipe.evaluation.select == "best" or recipe.evaluation.patience > 0


def _files(
    stage: Stage[Recipe], theirs: Stage[Recipe], run: Path, hashes: Sequence[str]
) -> tuple[tuple[Path, ...], str]:
    """Files of the run folder that follow from a stage and are the same; and why one that later stages need is not."""
    found = []
    for name, inputs in stage.files.items():
        path = run / name
        if name not in theirs.files or not path.is_file():
            return (), f"{name} is not in {run}, it is made anew"
        different = differences(theirs.files[name], inputs)
        if different:
            return (), f"{name} is not taken from {run}: {_listed(different)}"
        if read_object(path).get("model") not in hashes:
            return (), f"{name} is not taken from {run}: it was made with another model"
        found.append(path)
    return tuple(found), ""


def _listed(different: Sequence[tuple[str, Any, Any]]) -> str:
    shown = "; ".join(f"{key} is {_text(there)} there, {_text(here)} here" for key, there, here in different[:SHOWN])
    return shown + (f"; {len(different) - SHOWN} more" if len(different) > SHOWN else "")


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def _copy(source: Path, target: Path) -> None:
    """A copy that is there whole or not at all."""
    begun = target.with_name(f".{target.name}.{os.getpid()}")
    with writing(target):
        try:
            shutil.copyfile(source, begun)
            begun.replace(target)
        finally:
            begun.unlink(missing_ok=True)
