"""What a run directory says, read for the report; a run that is still going, or was cut off, reads too.

run = read_run("runs/bacl")
run.metrics       # None before the final evaluation
run.stages[0].training["loss"]
run.missing       # what is not there yet, in words
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tailfin.config import recipe_from_file
from tailfin.errors import UserError, nearest
from tailfin.evaluation.results import segm_results_path
from tailfin.files import read_object
from tailfin.schema.recipe import Recipe

# Columns of metrics.jsonl that are not parts of the loss.
NOT_LOSSES = frozenset(
    {"iteration", "epoch", "lr", "loss", "images_per_second", "seconds", "memory_gib", "grad_norm", "images", "scale"}
)
DIAGNOSTICS = ("accuracy_", "spread_", "unexplained_", "gradient_")  # of a pre-training's terms, also none


@dataclass(frozen=True)
class Stage:
    """One folder of RUN/stages: its training lines as columns, its evaluations as they are."""

    name: str
    training: dict[str, np.ndarray]  # column name -> float64 [lines], NaN where a line lacks it; empty without lines
    evaluations: list[dict[str, Any]]  # {"iteration", "epoch", "eval": {"bbox": {...}}}
    broken_lines: int  # lines that are not JSON, a cut last one aside

    @property
    def parts(self) -> list[str]:
        """Names of the parts of the loss, in the order of their first appearance."""
        return [name for name in self.training if name not in NOT_LOSSES and not name.startswith(DIAGNOSTICS)]


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    name: str  # short, different for each run of a report
    recipe: Recipe | None
    recipe_text: str
    environment: dict[str, Any]
    metrics: dict[str, Any] | None
    stages: list[Stage]
    missing: list[str]  # sentences about what is not there

    @property
    def results(self) -> Path:
        """Where the detections are, if there are any."""
        return self.path / "results.bbox.json"

    @property
    def masks(self) -> Path | None:
        """Where their masks are, if they have any."""
        file = segm_results_path(self.results)
        return file if file.is_file() else None

    @property
    def status(self) -> str:
        """ "finished", "trained" (no numbers yet), "unfinished" or "no training"."""
        if self.metrics is not None:
            return "finished"
        if (self.path / "model.safetensors").is_file():
            return "trained"
        return "unfinished" if self.stages else "no training"

    @property
    def categories(self) -> list[dict[str, Any]]:
        """`per_category` of metrics.json; empty before the evaluation."""
        return list((self.metrics or {}).get("per_category") or [])


def read_runs(paths: Sequence[str | Path]) -> list[Run]:
    """Several run directories; names that clash are told apart by their parent folders."""
    resolved = [Path(path).expanduser().resolve() for path in paths]
    return [read_run(path, name) for path, name in zip(resolved, _short_names(resolved), strict=True)]


def read_run(path: str | Path, name: str | None = None) -> Run:
    """One run directory.

    Raises:
        UserError: `path` is not a run directory, or a finished file in it is corrupt.
    """
    path = check_run(path)
    missing: list[str] = []
    recipe, recipe_text = _recipe(path, missing)
    environment = _optional(path / "environment.json", "environment file")
    if environment is None:
        missing.append("environment.json is missing: versions, seed and commit are unknown.")
    stages = [_stage(folder) for folder in _stage_folders(path)]
    if not any(stage.training for stage in stages):
        missing.append("No training lines have been written yet.")
    metrics = _metrics(path / "metrics.json")
    if metrics is None:
        missing.append("metrics.json is missing: the run has not been evaluated yet.")
    if not (path / "results.bbox.json").is_file():
        missing.append("results.bbox.json is missing: no detections to show.")
    return Run(path, name or path.name, recipe, recipe_text, environment or {}, metrics, stages, missing)


def check_run(path: str | Path) -> Path:
    """`path` as an absolute path if it is a run directory; otherwise a `UserError` that names the nearest one."""
    path = Path(path).expanduser().resolve()
    if path.is_dir():
        if any((path / part).exists() for part in ("recipe.yaml", "metrics.json", "stages")):
            return path
        inner = sorted(child.name for child in path.iterdir() if (child / "recipe.yaml").is_file())
        raise UserError(f"{path} is not a run directory: it has no recipe.yaml{nearest(path.name, inner)}")
    if path.is_file():
        raise UserError(f"{path} is a file: give the run directory, {path.parent}")
    siblings = sorted(child.name for child in path.parent.iterdir() if child.is_dir()) if path.parent.is_dir() else []
    raise UserError(f"run directory {path} does not exist{nearest(path.name, siblings)}")


def signature(paths: Sequence[Path]) -> str:
    """A text that changes when a file that the report reads has changed."""
    marks = []
    for path in paths:
        names = ("recipe.yaml", "environment.json", "metrics.json", "results.bbox.json", "results.segm.json")
        files = [path / name for name in names]
        files += [folder / "metrics.jsonl" for folder in _stage_folders(path)]
        for file in files:
            try:
                state = file.stat()
            except OSError:
                continue
            marks.append(f"{file.name}:{state.st_mtime_ns}:{state.st_size}")
    return "|".join(marks)


# ---- details ---------------------------------------------------------------------------------------------------------


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ; a run that is given twice gets a number."""
    names = [path.name or str(path) for path in paths]
    for depth in range(2, max((len(path.parts) for path in paths), default=1) + 1):
        clash = {name for name in names if len({p for p, n in zip(paths, names, strict=True) if n == name}) > 1}
        if not clash:
            break
        names = ["/".join(p.parts[-depth:]) if name in clash else name for p, name in zip(paths, names, strict=True)]
    return [f"{name} ({names[:i].count(name) + 1})" if name in names[:i] else name for i, name in enumerate(names)]


def _recipe(path: Path, missing: list[str]) -> tuple[Recipe | None, str]:
    file = path / "recipe.yaml"
    if not file.is_file():
        missing.append("recipe.yaml is missing: the settings are unknown.")
        return None, ""
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        return recipe_from_file(file), text
    except UserError as error:  # written by another version: the numbers are still worth a report
        missing.append(f"The recipe cannot be read: {error}")
        return None, text


def _optional(file: Path, what: str) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    return read_object(file, what)


def _metrics(file: Path) -> dict[str, Any] | None:
    """The metrics of a run, as far as their form goes: numbers by IoU type, for each class and its id too."""
    metrics = _optional(file, "metrics file")
    if metrics is None:
        return None
    classes = metrics.get("per_category") or []
    rows = classes if isinstance(classes, list) else [None]
    kinds = [entry.get(kind) for entry in (metrics, *rows) if isinstance(entry, dict) for kind in ("bbox", "segm")]
    named = all(isinstance(row, dict) and type(row.get("id")) is int for row in rows)
    if not named or any(not isinstance(kind, dict | None) for kind in kinds):
        raise UserError(f"metrics file {file} is damaged: it does not hold numbers by IoU type and class")
    return metrics


def _stage_folders(path: Path) -> list[Path]:
    """Stage folders in the order of the number that their names start with."""
    root = path / "stages"
    if not root.is_dir():
        return []

    def key(folder: Path) -> tuple[float, str]:
        number = folder.name.partition("-")[0]
        return (int(number) if number.isdecimal() else float("inf"), folder.name)

    return sorted((folder for folder in root.iterdir() if folder.is_dir()), key=key)


def _stage(folder: Path) -> Stage:
    file = folder / "metrics.jsonl"
    raw = file.read_bytes().splitlines() if file.is_file() else []
    training: list[dict[str, Any]] = []
    evaluations: list[dict[str, Any]] = []
    broken = 0
    for number, line in enumerate(raw, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)  # unlike a strict parser it reads the NaN of a loss that blew up
        except (ValueError, RecursionError):
            broken += number < len(raw)  # the last line may just be being written
            continue
        if not isinstance(value, dict) or not isinstance(value.get("iteration"), int | float):
            broken += 1
        elif isinstance(value.get("eval"), dict):
            evaluations.append(value)
        else:
            training.append(value)
    name = folder.name.partition("-")[2] or folder.name
    return Stage(name, _columns(_newest(training)), _newest(evaluations), broken)


def _newest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the lines that a resumed run wrote again: of lines for the same iterations the later ones count."""
    kept: list[dict[str, Any]] = []
    for line in lines:
        while kept and kept[-1]["iteration"] >= line["iteration"]:
            kept.pop()
        kept.append(line)
    return kept


def _columns(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names: dict[str, None] = {}
    for line in lines:
        for key, value in line.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                names.setdefault(key)
    return {name: np.array([_float(line.get(name)) for line in lines], dtype=np.float64) for name in names}


def _float(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
