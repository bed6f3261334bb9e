"""A study's file: which arms on which data sets with which seeds, checked; `cells.py` makes the cells of it.

    title: RFS beside softmax
    sets:
      road12: {root: DATA, recipe: road12/packaged, values: {threshold: 0.08}}
    seeds: [0, 1, 2]
    steps: 504                       # optimiser steps of every cell, all its stages together
    overrides: {data.sizes: [96], schedule.decay: cosine}
    control: softmax
    arms:
      softmax: {}                    # the set's recipe
      rfs: {overrides: {sampler: {name: rfs, threshold: $threshold}}}
      bacl: {variant: bacl, seeds: [0]}
      norcal: {calibrate: {of: softmax, method: norcal, strength: 0.6}}

An arm is a recipe (`recipe`), a variant of the set's recipe (`variant`), or that recipe itself, with the overrides of
the study, of the set and its own, in this order; or the calibration of another arm's cells, which trains nothing.
`$name` stands for the set's value of that name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from tailfin.errors import UserError, nearest
from tailfin.files import existing_file, read_text, write_atomic, writing
from tailfin.recipe_values import parse_yaml
from tailfin.schema.base import Count, NotNegative, Section
from tailfin.schema.problems import explain

KEPT = "study.yaml"  # in the folder of the cells
PLACES = ("data.root", "data.train", "data.train.annotations")  # overrides that say where a set is
NAME = re.compile(r"[\w.+-]+")
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Steps = Count | tuple[Count, ...] | Literal["own"]  # of the whole cell, of each stage, or as the recipe has them


class DataSet(Section):
    """A data set: where it is, which recipe its arms start from, and values that `$name` in overrides stands for."""

    root: str = ""  # the folder of its annotation files; `--data NAME=FOLDER` takes the place of it
    recipe: str = ""
    values: dict[str, Any] = {}
    overrides: dict[str, Any] = {}
    steps: Steps | None = None  # in the place of the study's


class Calibrate(Section):
    """The calibration of an arm's trained cells (`tailfin calibrate`): what is searched is searched on training
    pictures, by `by`; with a strength nothing is."""

    of: str
    method: str = ""  # as `tailfin calibrate --method`; empty: all are tried
    strength: str | float | None = None
    by: Literal["AP", "APr", "APc", "APf"] = "AP"
    f_loss: NotNegative | None = None  # points of APf that may be lost


class Arm(Section):
    """One row of a study."""

    about: str = ""
    recipe: str = ""  # by name or path, in the place of the set's
    variant: str = ""  # of the set's recipe
    overrides: dict[str, Any] = {}
    calibrate: Calibrate | None = None
    steps: Steps | None = None  # in the place of the study's
    seeds: tuple[Seed, ...] | None = None
    sets: tuple[str, ...] | None = None  # only on these
    control: str = ""  # in the place of the study's
    against: tuple[str, ...] = ()  # other arms that differences are worked out to

    @model_validator(mode="after")
    def _check(self) -> Arm:
        if self.recipe and self.variant:
            raise ValueError("recipe and variant: give one of them (recipe: NAME:VARIANT has both)")
        own = [key for key in ("recipe", "variant", "overrides", "steps") if getattr(self, key)]
        if self.calibrate is not None and own:
            raise ValueError(f"{own[0]} has no place beside calibrate, which trains nothing")
        return self


class Study(Section):
    """A whole study."""

    title: str = ""
    sets: dict[str, DataSet]
    arms: dict[str, Arm]
    control: str  # the arm that the others are compared with
    seeds: tuple[Seed, ...] = (0,)
    steps: Steps = "own"
    overrides: dict[str, Any] = {}
    metrics: tuple[str, ...] = ("AP", "AP50", "APr", "APc", "APf")
    executor: Literal["local", "ray", "submitit"] = "local"
    workers: Count = 1  # cells at a time; with submitit jobs in the queue at a time
    threads: Count = 1  # of each cell
    launcher: str = ""  # words in the place of the Python that runs a cell: torchrun --standalone --nproc-per-node 2
    resources: dict[str, Any] = {}  # of a cell: options of ray.remote, or parameters of submitit's AutoExecutor

    @model_validator(mode="after")
    def _check(self) -> Study:
        if not self.sets or not self.arms:
            raise ValueError("a study needs at least one set and one arm")
        for name in (*self.sets, *self.arms):
            if not NAME.fullmatch(name) or name.startswith("."):
                raise ValueError(f'"{name}": the name of a set or an arm has letters, digits, _, -, + and . only')
        self._known("control", self.control, self.arms)
        for name, arm in self.arms.items():
            for key, other in [("control", arm.control), *(("against", one) for one in arm.against)]:
                if other:
                    self._known(f"arms.{name}.{key}", other, self.arms)
            for one in arm.sets or ():
                self._known(f"arms.{name}.sets", one, self.sets)
            if arm.calibrate is not None:
                self._known(f"arms.{name}.calibrate.of", arm.calibrate.of, self.arms)
                if self.arms[arm.calibrate.of].calibrate is not None:
                    raise ValueError(f"arms.{name}.calibrate.of: {arm.calibrate.of} is a calibration itself")
        return self

    @staticmethod
    def _known(key: str, name: str, names: Mapping[str, Any]) -> None:
        if name not in names:
            raise ValueError(f'{key}: there is no "{name}"{nearest(name, names)}')


def load_study(path: str | Path, roots: Mapping[str, str] | None = None) -> Study:
    """The study of a file; `roots` are folders of sets, as `--data NAME=FOLDER` gives them."""
    path = existing_file(path, "study")
    values = parse_yaml(read_text(path, "study"), str(path))
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a study: a mapping of keys is needed")
    for name, arm in (values.get("arms") or {}).items() if isinstance(values.get("arms"), dict) else ():
        values["arms"][name] = {} if arm is None else arm  # `softmax:` alone is the set's recipe
    try:
        study = Study.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, str(path), Study)) from None
    for name in roots or {}:
        if name not in study.sets:
            raise UserError(f'--data {name}: the study has no set "{name}"{nearest(name, study.sets)}')
    given = {name: str(Path(root).absolute()) for name, root in (roots or {}).items()}
    sets = {
        name: one.model_copy(update={"root": given.get(name) or (one.root and str(Path(one.root).absolute()))})
        for name, one in study.sets.items()
    }
    return study.model_copy(update={"sets": sets})


def open_study(path: Path, out: Path | None = None, data: Sequence[str] = ()) -> tuple[Study, Path]:
    """The study of a file, or of a folder of cells, and the folder; `data` has SET=FOLDER texts."""
    roots = {}
    for text in data:
        name, equals, root = text.partition("=")
        if not equals or not root:
            raise UserError(f'--data "{text}": write SET=FOLDER')
        roots[name] = root
    if not path.is_dir():
        return load_study(path, roots), Path(out or Path("studies") / path.stem).absolute()
    if not (path / KEPT).is_file():
        raise UserError(f"{path} is no folder of a study: it has no {KEPT}")
    return load_study(path / KEPT, roots), path.absolute()


def placed_sets(study: Study, names: Sequence[str] = ()) -> list[str]:
    """The sets to run on: those that are named, else those whose files are somewhere, else all."""
    for name in names:
        if name not in study.sets:
            raise UserError(f'the study has no set "{name}"{nearest(name, study.sets)}')
    placed = [name for name, one in study.sets.items() if one.root or any(key in PLACES for key in one.overrides)]
    return [name for name in study.sets if name in (names or placed or study.sets)]


def keep(study: Study, out: Path) -> None:
    """The study in the folder of its cells, for `tailfin study show FOLDER`; places that sets had before stay."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    sets = dict(study.sets)
    if (out / KEPT).is_file():
        for name, one in load_study(out / KEPT).sets.items():
            if name in sets and one.root and not sets[name].root:
                sets[name] = sets[name].model_copy(update={"root": one.root})
    write_atomic(out / KEPT, dump_study(study.model_copy(update={"sets": sets})))


def dump_study(study: Study) -> str:
    """The study as YAML text, with the folders of its sets, that loads to the same study."""
    return yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def filled(value: Any, values: Mapping[str, Any], where: str) -> Any:
    """`value` with the set's own values in the place of `$name`."""
    if isinstance(value, str) and value.startswith("$"):
        if value[1:] not in values:
            raise UserError(f"{where}: the set has no value {value}{nearest(value[1:], values)}")
        return values[value[1:]]
    if isinstance(value, dict):
        return {key: filled(inner, values, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [filled(inner, values, where) for inner in value]
    return value
