"""Files that hold weights: the model for use (safetensors) and the resume point of a stage (`last/`).

A model file carries, beside the weights, everything needed to use it: the recipe, the categories with their training
counts, versions, and the hashes of the models it started from. A resume point is written beside the old one and swapped
in, and counts only with its completeness mark, so that a kill at any moment leaves one that works.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tailfin.config import dump_recipe, parse_yaml, stored_recipe
from tailfin.errors import UserError
from tailfin.files import existing_file, ordinary_mode, read_object, write_json, writing
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats
from tailfin.weights import memories

FORMAT = "tailfin-1"


@dataclass(frozen=True)
class ModelFile:
    """What a model file holds."""

    path: Path
    recipe: Recipe
    stats: ClassStats
    weights: dict[str, Tensor]
    metadata: dict[str, str]

    def fact(self, name: str, default: Any = None) -> Any:
        """What the metadata says under `name`, in plain values; damaged text is a `UserError`."""
        if name not in self.metadata:
            return default
        try:
            return json.loads(self.metadata[name])
        except (ValueError, RecursionError) as error:
            raise UserError(f"model {self.path}: its metadata is damaged ({name}: {error})") from None


def save_model(
    path: Path,
    model: nn.Module,
    recipe: Recipe,
    stats: ClassStats,
    *,
    parents: Iterable[str] = (),
    parts: tuple[str, ...] = ("",),
    **facts: str,
) -> None:
    """Write `model`'s weights with recipe, categories and provenance, atomically.

    Of `parts` only: beginnings of the weights' names. Memories of a stage (`memories`) are left out.
    """
    without = memories(model)
    state = {
        key: value for key, value in model.state_dict().items() if key.startswith(parts) and not key.startswith(without)
    }
    weights = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    metadata = {
        "format": FORMAT,
        "tailfin": importlib.metadata.version("tailfin") if _installed() else "source",
        "torch": str(torch.__version__),
        "recipe": dump_recipe(recipe),
        "categories": json.dumps(stats.to_dict()),
        "parents": json.dumps(list(parents)),
        **facts,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(weights, temporary, metadata=metadata)
            temporary.chmod(ordinary_mode())
            temporary.replace(path)
    except safetensors.SafetensorError as error:  # its own name for a full disk
        raise UserError(f"{path} cannot be written: {error}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_model_file(path: str | Path) -> ModelFile:
    """Read a model file of tailfin; anything else is a `UserError`."""
    path = existing_file(path, "model")
    if path.suffix in (".pt", ".pth", ".pkl", ".bin"):
        raise UserError(f"model {path}: a pickle is not loaded as a model, tailfin's models are .safetensors files")
    weights, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"model {path} was not written by tailfin (no recipe in its metadata)")
    try:
        recipe = stored_recipe(parse_yaml(metadata["recipe"], f"the recipe in {path}"), f"the recipe in {path}")
        stats = ClassStats.from_dict(json.loads(metadata["categories"]))
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"model {path}: its metadata is damaged ({error})") from None
    return ModelFile(path, recipe, stats, weights, metadata)


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a damaged one is a `UserError`."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def content_hash(path: Path) -> str:
    """SHA-256 of a model's weights (names, types, shapes, bytes), hexadecimal: how a model names its parents.

    Two trainings to equal weights have equal hashes; the bytes of their files differ, as the order of the metadata is
    not fixed. Of a file that is no safetensors file, its own hash.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length)) if 8 + length <= size else None
        except (ValueError, RecursionError):
            header = None
        if not isinstance(header, dict):
            return file_hash(path)
        header.pop("__metadata__", None)
        digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


# ---- resume points ---------------------------------------------------------------------------------------------------

PLACES = ("last", "last.new", "last.old")  # where a resume point of a stage may lie


def save_resume_point(stage: Path, state: dict[str, Any], iteration: int) -> None:
    """Write `stage/last/` with everything that training needs to go on from `iteration`.

    Raises:
        UserError: it cannot be written (full disk, ...); the one before is as it was.
    """
    last, new, old = (stage / name for name in PLACES)
    file = new / "state.pt"
    try:
        with writing(last):
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
            with file.open("wb") as opened:
                try:
                    torch.save(state, opened)
                except RuntimeError as error:  # torch's name for a write that failed
                    raise UserError(f"{last} cannot be written: {' '.join(str(error).split())[:200]}") from None
                opened.flush()
                os.fsync(opened.fileno())
            write_json(new / "complete.json", {"iteration": iteration, "bytes": file.stat().st_size})
            shutil.rmtree(old, ignore_errors=True)
            if last.exists():
                last.rename(old)
            new.rename(last)
    except UserError:
        if file not in _found(stage)[0][:1]:  # else it is whole, and the only one where `last` has been moved away
            shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)


def resume_points(stage: Path) -> list[Path]:
    """Files of the complete resume points of a stage, the newest first.

    A damaged one, which no kill leaves, is a warning where there is another, else a `UserError`: training does not
    begin again by itself.
    """
    complete, problems = _found(stage)
    if problems and not complete:
        raise UserError(problems[0])
    for problem in problems:
        warnings.warn(f"an older resume point is used: {problem}", UserWarning, stacklevel=2)
    return complete


def resume_point(stage: Path) -> Path | None:
    """File of the newest complete resume point of a stage, or none; see `resume_points`."""
    return next(iter(resume_points(stage)), None)


def _found(stage: Path) -> tuple[list[Path], list[str]]:
    """(complete resume points, the newest first; what is wrong with others that are no leftovers of a kill)."""
    complete: list[tuple[int, Path]] = []
    problems = []
    for folder in (stage / name for name in PLACES):
        mark, state = folder / "complete.json", folder / "state.pt"
        if not (mark.is_file() and state.is_file()):
            continue
        try:
            facts = read_object(mark)
        except UserError:
            facts = {}
        iteration, size = facts.get("iteration"), facts.get("bytes")
        whole = type(iteration) is int and type(size) is int
        if isinstance(iteration, int) and whole and size == state.stat().st_size:
            complete.append((iteration, state))
        elif not whole or folder.name == PLACES[0]:  # a kill leaves a shorter state in the other two alone
            damaged = state if whole else mark
            problems.append(
                f"resume point {damaged} is damaged: remove the folder {folder} to do without this resume point"
            )
    return [state for _, state in sorted(complete, key=lambda entry: -entry[0])], problems


def load_resume_point(stage: Path) -> dict[str, Any] | None:
    """What the newest readable resume point of a stage holds, or none where there is no complete one."""
    problem = ""
    for path in resume_points(stage):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if isinstance(state, dict) and isinstance(state.get("iteration"), int):
                return state
            reason = "it holds no iteration"
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
        problem = problem or f"resume point {path} is damaged: {reason}"
    if problem:
        raise UserError(f"{problem}; remove {stage} to train this stage again")
    return None


def _installed() -> bool:
    try:
        importlib.metadata.version("tailfin")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
