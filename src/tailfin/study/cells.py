"""The cells of a study: arm x set x seed, each with its command, its folder and the stages that it has.

    cells = make_cells(study, out)          # seeds are the outer loop, so that what is there is paired early
    cells[0].words                          # ["train", "road12/packaged", "seed=0", "data.sizes=[96]", ...]

Two cells have stages in common where these follow from the same inputs all the way up (`schema.stages`); the later one
takes them from the earlier one's folder by `--reuse`, which compares them again by their resolved recipes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tailfin.config import check_recipe, load_recipe
from tailfin.errors import UserError, nearest
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import stages
from tailfin.study.spec import Arm, Calibrate, Study, filled, placed_sets
from tailfin.study.steps import Files, open_files, planned_steps, steps_overrides

MADE_HERE = ("data.root", "data.train", "data.val")  # overrides of a set that name files of this machine


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    set: str
    arm: str
    seed: int
    folder: Path  # the run folder
    words: tuple[str, ...]  # arguments of `tailfin` that mean the same on any machine
    files: tuple[str, ...]  # overrides that name files of this machine
    recipe: Recipe  # as it is trained; of a calibration, the trained cell's
    steps: dict[str, int]  # optimiser steps by stage
    control: str
    keys: tuple[str, ...] = ()  # of each stage: what it and all before it follow from
    calibrate: Calibrate | None = None
    of: Path | None = None  # the folder of the calibrated cell
    train: str = ""  # training annotations of a calibration

    @property
    def name(self) -> str:
        """As folders and messages have it."""
        return f"{self.set}/{self.arm}/seed-{self.seed}"

    @property
    def note(self) -> Path:
        """What is known of its sessions, beside the run folder."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        """What its processes print."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def total_steps(self) -> int:
        return sum(self.steps.values())

    def stage_files(self) -> list[Path]:
        """The model files of its stages, in order."""
        return [self.folder / "stages" / stage.folder / "model.safetensors" for stage in stages(self.recipe)]


@dataclass
class _Loaded:
    """Data files that cells have in common, opened once."""

    files: dict[str, Files] = field(default_factory=dict)

    def of(self, recipe: Recipe) -> Files:
        key = json.dumps([recipe.data.root, recipe.data.train.model_dump(), recipe.evaluation.group_bounds])
        if key not in self.files:
            self.files[key] = open_files(recipe)
        return self.files[key]


def make_cells(
    study: Study, out: Path, *, arms: Sequence[str] = (), seeds: Sequence[int] = (), sets: Sequence[str] = ()
) -> list[Cell]:
    """All cells, or those of some arms, seeds and sets (with the cells that calibrations among them need)."""
    for name in arms:
        if name not in study.arms:
            raise UserError(f'the study has no arm "{name}"{nearest(name, study.arms)}')
    wanted = {name for name in study.arms if not arms or name in arms}
    needed = {own.of for name in wanted if (own := study.arms[name].calibrate) is not None}
    order = [name for name in study.arms if name in wanted | needed]
    loaded = _Loaded()
    found: dict[tuple[str, str, int], Cell] = {}
    for seed in sorted({seed for name in order for seed in seeds_of(study, study.arms[name])}):
        for one in placed_sets(study, sets):
            if seeds and seed not in seeds:
                continue
            for name in order:
                own_sets = study.arms[name].sets
                if seed in seeds_of(study, study.arms[name]) and (own_sets is None or one in own_sets):
                    found[one, name, seed] = _cell(study, out, one, name, seed, loaded, found)
    return list(found.values())


def seeds_of(study: Study, arm: Arm) -> tuple[int, ...]:
    """The seeds of an arm; a calibration has those of what it calibrates."""
    if arm.seeds is not None:
        return arm.seeds
    if arm.calibrate is not None:
        return seeds_of(study, study.arms[arm.calibrate.of])
    return study.seeds


def _cell(
    study: Study,
    out: Path,
    set_name: str,
    name: str,
    seed: int,
    loaded: _Loaded,
    found: dict[tuple[str, str, int], Cell],
) -> Cell:
    arm, data_set = study.arms[name], study.sets[set_name]
    folder = out / set_name / name / f"seed-{seed}"
    control = arm.control or study.control
    if arm.calibrate is not None:
        of = (set_name, arm.calibrate.of, seed)
        base = found[of] if of in found else _cell(study, out, *of, loaded, found)
        train = base.recipe.data.train.annotations
        own = arm.calibrate
        words = ["calibrate", own.of, *([f"--method={own.method}"] if own.method else []), f"--by={own.by}"]
        words += [f"--strength={own.strength}"] if own.strength is not None else []
        words += [f"--f-loss={own.f_loss:g}"] if own.f_loss is not None else []
        return replace(
            base,
            arm=name,
            folder=folder,
            control=control,
            words=tuple(words),
            calibrate=own,
            of=base.folder,
            train=str(Path(base.recipe.data.root) / train),
        )
    where = f"arms.{name} on set {set_name}"
    address = arm.recipe or (f"{data_set.recipe}:{arm.variant}" if arm.variant else data_set.recipe)
    if not address:
        raise UserError(f"{where}: no recipe is named (arms.{name}.recipe or sets.{set_name}.recipe)")
    overrides: dict[str, Any] = {"seed": seed}
    for given in (study.overrides, data_set.overrides, arm.overrides):
        for key, value in filled(given, data_set.values, where).items():
            overrides.pop(key, None)  # the last one counts, in its own place
            overrides[key] = value
    files = {key: value for key, value in overrides.items() if key.startswith(MADE_HERE)}
    if data_set.root:
        files.setdefault("data.root", data_set.root)
    overrides = {key: value for key, value in overrides.items() if key not in files}
    try:
        recipe = load_recipe(address, [*texts(overrides), *texts(files)])
        steps = next(given for given in (arm.steps, data_set.steps, study.steps) if given is not None)
        data = loaded.of(recipe)
        if steps != "own":
            overrides |= steps_overrides(recipe, data, steps)
            recipe = load_recipe(address, [*texts(overrides), *texts(files)])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not recipe.data.val.annotations:
        raise UserError(f"{where}: there is no validation set to measure on (data.val.annotations)")
    return Cell(
        set_name,
        name,
        seed,
        folder,
        ("train", address, *texts(overrides)),
        tuple(texts(files)),
        recipe,
        planned_steps(recipe, data),
        control,
        stage_keys(recipe),
    )


def texts(overrides: dict[str, Any]) -> list[str]:
    """Overrides as the command line has them."""
    return [
        f"{key}={value if isinstance(value, str) and value else json.dumps(value)}" for key, value in overrides.items()
    ]


def stage_keys(recipe: Recipe) -> tuple[str, ...]:
    """For each stage what it, and the stages before it, follow from; equal keys are the same trained weights."""
    data = [recipe.data.root, recipe.data.train.model_dump(mode="json")]
    before, found = json.dumps(data), []
    for stage in stages(recipe):
        reads = {key: str(path) for key, path in stage.reads.items()}
        before = json.dumps([before, stage.number, dict(stage.inputs), reads], sort_keys=True)
        found.append(before)
    return tuple(found)


def shared(one: Cell, other: Cell) -> int:
    """How many first stages two cells have in common."""
    count = 0
    for first, second in zip(one.keys, other.keys, strict=False):
        if first != second:
            break
        count += 1
    return count


def donor(cell: Cell, others: Iterable[Cell]) -> tuple[Cell | None, int]:
    """The cell whose finished stages `cell` takes, the most of them, and how many."""
    best: tuple[Cell | None, int] = (None, 0)
    for other in others:
        common = shared(cell, other) if other.folder != cell.folder and other.calibrate is None else 0
        if common <= best[1]:
            continue
        finished = 0
        for file in other.stage_files()[:common]:
            if not file.is_file():
                break
            finished += 1
        if finished > best[1]:
            best = (other, finished)
    return best


def differing(cells: Sequence[Cell]) -> list[str]:
    """What arms differ in from their control beside their method: steps, pictures a step, the start."""
    by_place = {(cell.set, cell.arm, cell.seed): cell for cell in cells}
    notes: dict[str, None] = {}
    for cell in cells:
        control = by_place.get((cell.set, cell.control, cell.seed))
        if control is None or control is cell:
            continue
        for what, own, other in (
            ("optimiser steps", cell.total_steps, control.total_steps),
            ("pictures a step", cell.recipe.schedule.batch, control.recipe.schedule.batch),
            ("weights at the start", cell.recipe.weights, control.recipe.weights),
            ("backbone", cell.recipe.backbone, control.recipe.backbone),
            ("size of pictures", cell.recipe.data.sizes, control.recipe.data.sizes),
        ):
            if own != other:
                seed = f", seed {cell.seed}" if what == "optimiser steps" else ""
                notes[f"{cell.set}/{cell.arm}{seed}: {what} {own}, {control.arm} {other}"] = None
    return list(notes)


def calibrated_recipe(cell: Cell, calibration: Any) -> Recipe:
    """The recipe of a calibration's cell, once it is known which."""
    values = cell.recipe.model_dump(mode="json") | {"calibration": calibration}
    return check_recipe(values, cell.name)
