"""Files that hold weights: the model for use (safetensors) and the resume point of a stage (`last/`).

A model file carries, beside the weights, everything needed to use it: the recipe, the categories with their training
counts, versions, and the hashes of the models it started from. A resume point is written beside the old one and swapped
in, and counts only with its completeness mark, so that a kill at any moment leaves one that works.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
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
from tailfin.files import existing_file, ordinary_mode, read_json, write_json
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
    path.parent.mkdir(parents=True, exist_ok=True)
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
        safetensors.torch.save_file(weights, temporary, metadata=metadata)
        temporary.chmod(ordinary_mode())
        temporary.replace(path)
    finally:
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
    except (KeyError, ValueError) as error:
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
    """SHA-256 of a file, hexadecimal: how a model names its parents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- resume points ---------------------------------------------------------------------------------------------------


def save_resume_point(stage: Path, state: dict[str, Any], iteration: int) -> None:
    """Write `stage/last/` with everything that training needs to go on from `iteration`."""
    new, last, old = stage / "last.new", stage / "last", stage / "last.old"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    with (new / "state.pt").open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    size = (new / "state.pt").stat().st_size
    write_json(new / "complete.json", {"iteration": iteration, "bytes": size})
    shutil.rmtree(old, ignore_errors=True)
    if last.exists():
        last.rename(old)
    new.rename(last)
    shutil.rmtree(old, ignore_errors=True)


def resume_point(stage: Path) -> Path | None:
    """File of the newest complete resume point of a stage, or none."""
    complete: list[tuple[int, Path]] = []
    for folder in (stage / "last", stage / "last.new", stage / "last.old"):
        mark, state = folder / "complete.json", folder / "state.pt"
        if mark.is_file() and state.is_file():
            size, iteration = _completed(mark)
            if size == state.stat().st_size:
                complete.append((iteration, state))
    return max(complete, key=lambda entry: entry[0])[1] if complete else None


def _completed(mark: Path) -> tuple[int, int]:
    """(bytes, iteration) of a mark. It is written in one piece, so a damaged one is not what a kill leaves."""
    damaged = UserError(f"resume point {mark} is damaged: remove the folder {mark.parent} to do without it")
    try:
        facts = read_json(mark)
        size, iteration = facts["bytes"], facts["iteration"]
    except (UserError, LookupError, TypeError):
        raise damaged from None
    if type(size) is not int or type(iteration) is not int:
        raise damaged
    return size, iteration


def load_resume_point(stage: Path) -> dict[str, Any] | None:
    """What the newest complete resume point of a stage holds, or none."""
    path = resume_point(stage)
    if path is None:
        return None
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"resume point {path} is damaged: {' '.join(str(error).split())[:200]}") from None


def _installed() -> bool:
    try:
        importlib.metadata.version("tailfin")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
