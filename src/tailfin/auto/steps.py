"""The steps of `tailfin train auto`: the plan, training, calibration with thresholds, export; each is done once.

RUN/auto.json  data/*.json (what was converted or split)   beside the files of a run (`run.py`)
RUN/calibrated.safetensors  calibration.json  model.onnx

An interrupted call goes on with `tailfin train --resume RUN`, or by being given again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tailfin import api
from tailfin.auto.plan import Plan, make_plan, move_files
from tailfin.calibrate.choice import Choice
from tailfin.config import dump_recipe
from tailfin.errors import UserError
from tailfin.evaluation.operating import Aim
from tailfin.files import existing_file, read_object, write_atomic, write_json, writing
from tailfin.processes import limit_threads, on_main, process_state
from tailfin.run import run_folder
from tailfin.run_files import empty_run

FILE = "auto.json"
MODEL, NUMBERS = "calibrated.safetensors", "calibration.json"
EXPORTS = {"onnx": "model.onnx", "pt2": "model.pt2", "openvino": "model.xml"}
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """A call of `train auto`; the same call given again goes on."""

    train: str
    val: str | None = None
    train_images: str | None = None
    val_images: str | None = None
    holdout: str | None = None
    holdout_images: str | None = None
    overrides: tuple[str, ...] = ()
    thresholds: str = "f1"
    by: str = "AP"
    export: str | None = None

    def __post_init__(self) -> None:
        Aim.of(self.thresholds)
        if self.export is not None and self.export not in EXPORTS:
            raise UserError(f'--export: there is no form "{self.export}" (choices: {", ".join(EXPORTS)})')


@dataclass(frozen=True)
class Done:
    """What a finished call has made."""

    run: Path
    choice: Choice | None = None
    holdout: str = ""  # which pictures
    thresholds: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)
    main: bool = True  # whether this is the process that speaks for all


def plan_of(wanted: Wanted, work: Path) -> Plan:
    """The plan of a call; its files lie in `work`."""
    return make_plan(
        wanted.train,
        wanted.val,
        work,
        train_images=wanted.train_images,
        val_images=wanted.val_images,
        holdout=wanted.holdout,
        holdout_images=wanted.holdout_images,
        overrides=wanted.overrides,
    )


def train_auto(
    wanted: Wanted, out: str | Path | None = None, *, overwrite: bool = False, say: Say = lambda text: None
) -> Done:
    """Begin, or go on with, what was wanted; `say` gets the plan line by line."""
    state = process_state()
    folder = on_main(state, lambda: _begun(wanted, out, overwrite) or _begin(wanted, out, overwrite, say))
    return go_on(folder, say=say)


def go_on(run: str | Path, *, say: Say = lambda text: None) -> Done:
    """Do the steps of a begun run that are not done yet."""
    run, state = Path(run), process_state()
    wanted, holdout = _read(run)
    if not ((run / "metrics.json").exists() and (run / "report.html").exists()):
        api.train("", out=run, resume=True)
    if not state.is_main_process:
        return Done(run, main=False)
    limit_threads()
    files = [run / "report.html"]
    choice = None
    if holdout is not None:
        if not ((run / MODEL).exists() and (run / NUMBERS).exists()):
            _calibrate(run, wanted, holdout)
        files.insert(0, run / MODEL)
        choice = _stored_choice(run)
    else:
        files.insert(0, run / "model.safetensors")
    points = api.load(files[0], "cpu").points
    if wanted.export is not None:
        target = run / EXPORTS[wanted.export]
        if not target.exists():
            from tailfin.export.model import export

            agreement = export(files[0], target)
            say(f"{target.name}: {agreement}")
        files.append(target)
    told = "" if holdout is None else str(holdout["told"])
    return Done(run, choice, told, {} if points is None else points.thresholds, files)


def is_auto(run: str | Path) -> bool:
    """Whether a run folder is one of `train auto`."""
    return (Path(run) / FILE).is_file()


# ---- details ---------------------------------------------------------------------------------------------------------


def _begin(wanted: Wanted, out: str | Path | None, overwrite: bool, say: Say) -> Path:
    """Look, choose, and write what a run begins with."""
    with tempfile.TemporaryDirectory(prefix="tailfin-auto-") as temporary:
        work = Path(temporary).resolve()
        plan = plan_of(wanted, work)
        folder = run_folder(out, plan.recipe, overwrite=overwrite).absolute()
        for line in [*plan.files.notes, *plan.lines()]:
            say(line)
        if overwrite and (folder / "recipe.yaml").exists():
            empty_run(folder)
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            plan = move_files(plan, work, folder / "data")
    write_json(folder / FILE, {"wanted": asdict(wanted), **plan.to_dict(), "holdout": _holdout(plan)}, indent=1)
    write_atomic(folder / "recipe.yaml", dump_recipe(plan.recipe))  # last: now it can be resumed
    return folder


def _begun(wanted: Wanted, out: str | Path | None, overwrite: bool) -> Path | None:
    """The folder of the same call, which goes on; without `out` one that is not finished."""
    if overwrite:
        return None
    places = [Path(out)] if out is not None else sorted(Path("runs").glob("auto-*"))
    for place in places:
        if (place / FILE).is_file() and (place / "recipe.yaml").is_file():
            own, holdout = _read(place)
            last = EXPORTS[own.export] if own.export else NUMBERS if holdout is not None else "report.html"
            if own == wanted and (out is not None or not (place / last).exists()):
                return place.absolute()
    return None


def _holdout(plan: Plan) -> dict[str, Any] | None:
    """Which pictures are chosen on, and which measured."""
    files = plan.files
    if files.holdout is None:
        return None
    described = {
        "half_of_val": f"a half of the validation pictures ({files.holdout}); numbers are of the other ({files.test})",
        "train": f"training pictures ({files.holdout}), which flatter a detector; numbers are of {files.test}",
    }
    told = described.get(plan.value("holdout"), f"{files.holdout}; numbers are of {files.test}")
    return {
        "told": told,
        "annotations": str(files.holdout),
        "images": str(files.holdout_images),
        "test": str(files.test),
        "test_images": str(files.val_images),
        "train": str(files.train),
        "train_images": str(files.train_images),
    }


def _read(run: Path) -> tuple[Wanted, dict[str, Any] | None]:
    path = existing_file(run / FILE, "plan")
    stored = read_object(path, "plan")
    try:
        wanted = stored["wanted"]
        return Wanted(**{**wanted, "overrides": tuple(wanted["overrides"])}), stored["holdout"]
    except (KeyError, TypeError):
        raise UserError(f"plan {path} is damaged: begin anew with --overwrite") from None


def _calibrate(run: Path, wanted: Wanted, holdout: dict[str, Any]) -> None:
    from tailfin.calibrate.model import calibrate

    on_train = holdout["annotations"] == holdout["train"]
    choice = calibrate(
        run,
        run / MODEL,
        train=holdout["train"],
        train_images=holdout["train_images"],
        holdout=None if on_train else holdout["annotations"],
        holdout_images=None if on_train else holdout["images"],
        test=holdout["test"],
        test_images=holdout["test_images"],
        thresholds=wanted.thresholds,
        by=wanted.by,
        overwrite=True,
    )
    numbers = {"label": choice.label, "tried": choice.tried, "crossed": choice.crossed, "tested": choice.tested}
    write_json(run / NUMBERS, numbers, indent=1)


def _stored_choice(run: Path) -> Choice:
    stored = read_object(run / NUMBERS, "calibration")
    crossed = stored.get("crossed")
    return Choice(
        str(stored.get("label")), None, stored.get("tried", {}), tuple(crossed) if crossed else None,
        stored.get("tested", {}),
    )  # fmt: skip
