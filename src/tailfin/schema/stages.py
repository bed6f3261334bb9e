"""The stages of a recipe, in order: what each trains, what it starts from, and what it hands on. No torch.

    for stage in stages(recipe):
        stage.folder, stage.recipe.loss.name, stage.recipe.schedule.epochs, stage.trains, stage.starts_from

A method is a line of `METHODS` here, which says what its stages are, and one of `tailfin.methods.METHODS`, which trains
them. What depends on the classes of a data set (which of them a step is for, how many annotations it has) is filled in
by `tailfin.data.smooth_tail.planned_steps`.

`Stage.inputs` are the keys of the run's own recipe that the stage's weights follow from, beside those of the stage that
it starts from: with the same inputs, all the way up, a finished stage of another run can take its place
(`tailfin.reuse`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from pydantic import ValidationError

from tailfin import plugins
from tailfin.errors import nearest
from tailfin.schema.data import Data
from tailfin.schema.problems import explain
from tailfin.schema.stepwise import EVERYTHING, Step, Stepwise

WEIGHTS = "weights"  # what a first stage starts from: the recipe's `weights`
PRETRAIN = "pretrain"
CLASS_SPECIFIC = "class-specific"  # in `Stage.trains`: the parts that know the classes, by `detector.class_specific()`
SECTIONS = ("second", "stepwise")  # sections of a recipe that belong to a method
# What no stage depends on: its name, what comes after it, how it is measured and logged, how it is loaded.
FREE = ("name", "about", "method", "calibration", "evaluation", "logging", "pretraining", *SECTIONS)
FREE_DATA = ("root", "train", "val", "synthesize", "workers", "max_pixels", "test_size", "test_max_size")

R = TypeVar("R")
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Stage(Generic[R]):
    """One stage of a recipe. `R` is `Recipe`, which this module does not import: recipes are checked by it."""

    name: str
    recipe: R  # the stage's own, with every setting resolved; its model file carries it
    inputs: Inputs  # flat keys of the run's recipe -> values
    number: int = 1  # 0: nothing is trained, the recipe's `weights` are the stage's detector
    starts_from: str = WEIGHTS  # or the name of an earlier stage
    # parts of the detector, or `CLASS_SPECIFIC`; empty: all that the recipe does not freeze
    trains: tuple[str, ...] = ()
    hands_on: tuple[str, ...] = ("detector",)  # to later stages
    # files of the run folder that follow from the stage -> the further keys that they depend on
    files: Mapping[str, Inputs] = field(default_factory=dict)
    reads: Mapping[str, Path] = field(default_factory=dict)  # keys -> files from outside that the stage follows from

    @property
    def folder(self) -> str:
        """Its folder in RUN/stages."""
        return f"{self.number}-{self.name}"


def stages(recipe: R) -> list[Stage[R]]:
    """All stages of a recipe, in order; the last one makes the final model."""
    whole: Any = recipe
    own: list[Stage[R]] = METHODS[whole.method].stages(whole)
    if whole.pretraining is None:
        return own
    keeps = keeps_predictor(whole)
    parts = ("backbone", "fpn", "rpn", "head", *(("classifier", "box") if keeps else ()))
    kept = {"pretraining.keep_predictor": keeps}
    before = Stage(PRETRAIN, pretraining_recipe(recipe), _pretraining_inputs(whole), hands_on=parts)
    follower, *rest = (replace(stage, number=stage.number + 1) for stage in own)
    follower = replace(follower, starts_from=PRETRAIN, inputs={**follower.inputs, **kept})
    return [before, follower, *rest]


def final_stage(recipe: R) -> Stage[R]:
    """The stage that makes the final model; its recipe rebuilds it."""
    return stages(recipe)[-1]


def check_stages(recipe: Any) -> None:
    """Raise `ValueError` where a recipe's method lacks its section, or one of its stages cannot be."""
    method = METHODS[recipe.method]
    for section in SECTIONS:
        given = getattr(recipe, section) is not None
        if given != (section == method.section):
            raise ValueError(f"method {recipe.method} {'has no' if given else 'needs a'} section `{section}`")
    method.check(recipe)


def known_method(name: str) -> str:
    """`name` if it is a method, else a `ValueError`."""
    if name not in METHODS and (own := plugins.load(plugins.METHODS, name)) is not None:
        if not isinstance(getattr(own, "METHOD", None), Method) or not callable(getattr(own, "train", None)):
            raise ValueError(
                f'the method "{name}" of an installed package lacks METHOD (a stages.Method) or train(run)'
            )
        METHODS[name] = own.METHOD
    if name not in METHODS:
        raise ValueError(f'"{name}" is not a choice{nearest(name, [*METHODS, *plugins.names(plugins.METHODS)])}')
    return name


# ---- pre-training ----------------------------------------------------------------------------------------------------


def pretraining_recipe(recipe: R) -> R:
    """The recipe of the pre-training stage: its loss, sampler and schedule, a plain detector, no evaluation."""
    whole: Any = recipe
    own = {name: getattr(whole.pretraining, name) for name in ("loss", "sampler", "schedule")}
    evaluation = whole.evaluation.model_copy(update={"every": 0, "patience": 0, "select": "last"})
    without = {"method": "baseline", "features": None, "second": None, "stepwise": None, "pretraining": None}
    return whole.model_copy(update={**own, **without, "evaluation": evaluation})


def keeps_predictor(recipe: Any) -> bool:
    """Whether the method goes on with the classifier and the box layer of the pre-training.

    Its classes are the recipe's; but a classifier learnt with one loss says something else to another.
    """
    own = recipe.pretraining
    if own.keep_predictor is not None:
        return bool(own.keep_predictor)
    return bool(own.detects and own.det_loss == "class_aware" and own.loss == recipe.loss)


def _pretraining_inputs(recipe: Any) -> dict[str, Any]:
    """Of the recipe's own keys those of detector, start and data; the method's loss, sampler and rates come later."""
    later = ("loss", "sampler", "schedule", "evaluation", "features")
    own = {key: value for key, value in own_inputs(recipe).items() if key.partition(".")[0] not in later}
    own |= _section(recipe, "pretraining")
    del own["pretraining.keep_predictor"]
    if recipe.pretraining.one_curve:  # the rates are those of `schedule`, over its epochs too
        keys = ("epochs", "lr", "warmup", "warmup_ratio", "decay", "milestones", "gamma")
        own |= flat(_dumped(recipe.schedule, *keys), "schedule.")
    if recipe.pretraining.proposals.file:  # relative to the data's root, which may differ
        own["pretraining.proposals.file"] = str(Path(recipe.data.root) / recipe.pretraining.proposals.file)
    return own


# ---- one stage -------------------------------------------------------------------------------------------------------


def _one(recipe: Any) -> list[Stage[Any]]:
    return [Stage("train", recipe, own_inputs(recipe))]


# ---- two stages ------------------------------------------------------------------------------------------------------


def _two(recipe: Any) -> list[Stage[Any]]:
    first = Stage("representation", recipe, own_inputs(recipe))
    second = Stage(
        "classifier",
        second_recipe(recipe),
        _section(recipe, "second"),
        number=2,
        starts_from=first.name,
        trains=tuple(recipe.second.trains),
    )
    return [first, second]


def second_recipe(recipe: R) -> R:
    """The recipe of the second stage alone: its loss, sampler, schedule and pictures, all else as in the first."""
    whole: Any = recipe
    second = whole.second
    data = Data.model_validate({**whole.data.model_dump(), **second.data})
    own = {name: getattr(second, name) for name in ("loss", "sampler", "schedule", "features")}
    if second.classifier is not None:
        own["detector"] = whole.detector.with_classifier(second.classifier)
    return whole.model_copy(update={**own, "data": data, "method": "baseline", "second": None})


def unwrapped(recipe: R) -> R:
    """The recipe of the second stage's detector before its classifier is put around the trained one."""
    whole: Any = recipe
    return whole.model_copy(update={"detector": whole.detector.unwrapped()})


def _check_two(recipe: Any) -> None:
    if recipe.second.classifier is not None and not recipe.detector.BOX_HEAD:
        raise ValueError("second.classifier needs a box head on proposals: detector.name faster_rcnn")
    try:
        second_recipe(recipe)
    except ValidationError as error:
        raise ValueError(explain(error, "second.data", Data)) from None
    _check_parts("second.trains", recipe.second.trains, recipe.detector)
    one_precision(recipe, "second")


def _check_parts(key: str, names: Sequence[str], detector: Any, more: tuple[str, ...] = ()) -> None:
    known = (*detector.PARTS, *more)
    for name in names:
        if name not in known:
            raise ValueError(f'{key}: {detector.name} has no part "{name}"{nearest(name, known)}')


def one_precision(recipe: Any, section: str) -> None:
    """Raise `ValueError` where a section's schedule has another precision than the recipe's."""
    own = getattr(recipe, section).schedule.precision
    if own != recipe.schedule.precision:
        raise ValueError(
            f'{section}.schedule.precision is "{own}", schedule.precision "{recipe.schedule.precision}": a run has one '
            "precision, set both"
        )


# ---- step-wise learning ----------------------------------------------------------------------------------------------


def steps(settings: Stepwise) -> list[tuple[str, int, Step]]:
    """The steps after step 0: name, the part of the classes that it is for (0 head, 1 and on tail; -1 all), settings.

    With several cuts there is one tail step for each part after the head.
    """
    last = len(settings.division)
    found: list[tuple[str, int, Step]] = []
    if settings.head is not None:
        found.append(("head", 0, settings.head))
    if settings.tail is not None:
        found += [("tail" if last == 1 else f"tail{part}", part, settings.tail) for part in range(1, last + 1)]
    if settings.both is not None:
        found.append(("both", -1, settings.both))
    return found


def _steps(recipe: Any) -> list[Stage[Any]]:
    settings: Stepwise = recipe.stepwise
    parted = {f"stepwise.{key}": value for key, value in _dumped(settings, "division", "boundary", "parts").items()}
    inputs = own_inputs(recipe)
    if settings.base == "head":
        inputs |= {"stepwise.base": "head", **parted}
    seen = _dumped(recipe.data, "test_size", "test_max_size")  # the pictures that step 0 scores annotations in
    exemplars = settings.exemplars.model_dump(mode="json", exclude={"shard"})
    given = settings.base == "given"
    planned = steps(settings)
    selected = not settings.exemplars.file and any(not step.annotations for _, _, step in planned)
    shown = {**flat(seen, "data."), **parted, **flat(exemplars, "stepwise.exemplars.")}
    found = [
        Stage(
            "base",
            base_recipe(recipe),
            inputs,
            number=0 if given else 1,
            hands_on=("detector", "exemplars"),
            files={"exemplars.json": shown} if selected else {},
        )
    ]
    for name, part, step in planned:
        section = "head" if part == 0 else "both" if part < 0 else "tail"
        reads = {key: Path(recipe.data.root) / file for key, file in outside(settings, section, part).items()}
        found.append(
            Stage(
                name,
                step_recipe(recipe, step),
                {**parted, **flat(step.model_dump(mode="json"), f"stepwise.{section}."), **_names(reads)},
                number=found[-1].number + 1,
                starts_from=found[-1].name,
                trains=() if EVERYTHING in step.trains else tuple(step.trains) or (CLASS_SPECIFIC,),
                reads=reads,
            )
        )
    return found


def outside(settings: Stepwise, section: str, part: int) -> dict[str, str]:
    """Key and name of the file that says which annotations a step keeps; none where the run's own selection does."""
    step = getattr(settings, section)
    if step.annotations:
        return {f"stepwise.{section}.annotations": step.annotations[max(part - 1, 0)]}
    return {"stepwise.exemplars.file": settings.exemplars.file} if settings.exemplars.file else {}


def _names(reads: Mapping[str, Path]) -> dict[str, str]:
    return {key: str(path) for key, path in reads.items()}


def base_recipe(recipe: R) -> R:
    """The recipe of step 0 of step-wise learning: a plain detector."""
    whole: Any = recipe
    return whole.model_copy(update={"method": "baseline", "stepwise": None, "pretraining": None})


def step_recipe(recipe: R, step: Step) -> R:
    """The recipe of one step of step-wise learning: its rates and pictures, all else as in the whole recipe."""
    whole: Any = recipe
    own = {name: getattr(step, name) for name in ("epochs", "lr", "decay", "milestones", "warmup")}
    schedule = whole.schedule.model_copy(update=own)
    data = Data.model_validate({**whole.data.model_dump(), "photometric": step.photometric, **step.data})
    base: Any = base_recipe(recipe)
    return base.model_copy(update={"schedule": schedule, "data": data})


def _check_steps(recipe: Any) -> None:
    settings: Stepwise = recipe.stepwise
    if not recipe.detector.CLASSES:
        raise ValueError(
            f"method stepwise needs a detector with classes: detector.name {recipe.detector.name} has none"
        )
    for name in ("head", "tail", "both"):
        step = getattr(settings, name)
        try:
            if step is not None:
                _check_parts(f"stepwise.{name}.trains", step.trains, recipe.detector, (EVERYTHING,))
                step_recipe(recipe, step)
        except ValidationError as error:
            raise ValueError(explain(error, f"stepwise.{name}.data", Data)) from None
    if settings.base == "given" and recipe.pretraining is not None:
        raise ValueError("stepwise.base given is a trained detector: pretraining has no place before it")
    if settings.base == "head" and recipe.sampler.name != "plain":
        raise ValueError("stepwise.base head shows its images evenly: set sampler plain")


# ---- the table -------------------------------------------------------------------------------------------------------


class Method(NamedTuple):
    """What the schema knows of a method."""

    section: str  # of the recipe, which this method needs and no other has; "": none
    stages: Callable[[Any], list[Stage[Any]]]
    check: Callable[[Any], None]


METHODS: dict[str, Method] = {
    "baseline": Method("", _one, lambda recipe: None),
    "decoupled": Method("second", _two, _check_two),
    "bacl": Method("second", _two, _check_two),
    "stepwise": Method("stepwise", _steps, _check_steps),
}


# ---- inputs ----------------------------------------------------------------------------------------------------------


def own_inputs(recipe: Any) -> dict[str, Any]:
    """What a stage that trains by the recipe's own sections follows from, as flat keys; annotations and classes are
    compared apart. How it is measured matters where that decides which weights are kept."""
    values = recipe.model_dump(mode="json", exclude=set(FREE))
    for key in FREE_DATA:
        del values["data"][key]
    chosen = recipe.evaluation.select == "best" or recipe.evaluation.patience > 0
    keys = () if chosen else ("patience", "select")
    evaluation = recipe.evaluation.model_dump(mode="json", include=set(keys) or None)
    return flat({**values, "evaluation": evaluation})


def differences(there: Inputs, here: Inputs) -> list[tuple[str, Any, Any]]:
    """Keys with the values of both, where they differ; a key that one lacks has None there."""
    keys = dict.fromkeys([*here, *there])
    return [(key, there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)]


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one mapping, keys joined by points."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value
    return found


def _section(recipe: Any, name: str) -> dict[str, Any]:
    return flat(getattr(recipe, name).model_dump(mode="json"), f"{name}.")


def _dumped(section: Any, *keys: str) -> dict[str, Any]:
    values: dict[str, Any] = section.model_dump(mode="json", include=set(keys))
    return values
