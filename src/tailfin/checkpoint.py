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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from tailfin.config import check_recipe, dump_recipe, parse_yaml
from tailfin.errors import UserError
from tailfin.files import existing_file, ordinary_mode, read_json, write_json
from tailfin.joins import join_classes, listed
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

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


def memories(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of what serves one stage's training alone and can be large: stored rows of a feature
    module (`stage_memory`). Resume points have them, model files do not, and no stage takes over those of another.
    """
    return tuple(f"{name}." for name, module in model.named_modules() if getattr(module, "stage_memory", False))


def load_model_file(path: str | Path) -> ModelFile:
    """Read a model file of tailfin; anything else is a `UserError`."""
    path = existing_file(path, "model")
    if path.suffix in (".pt", ".pth", ".pkl", ".bin"):
        raise UserError(f"model {path}: a pickle is not loaded as a model, tailfin's models are .safetensors files")
    weights, metadata = read_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise UserError(f"model {path} was not written by tailfin (no recipe in its metadata)")
    try:
        recipe = check_recipe(parse_yaml(metadata["recipe"], f"the recipe in {path}"), f"the recipe in {path}")
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


def load_weights(
    model: nn.Module, weights: dict[str, Tensor], source: str, names: Sequence[str] | None = None
) -> list[str]:
    """Copy the weights that fit by name and shape; returns lines that say what was loaded, left out and new.

    With the model's class `names`, and where `source` is a model file of other classes, or of the same in another
    order, rows of classes are joined by name (`join_class_rows`).
    """
    own = model.state_dict()
    old = None if names is None else class_names(source)
    said: list[str] = []
    if names is not None and old is not None and tuple(old) != tuple(names):
        weights, said = join_class_rows(own, weights, old, names)
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    if not fitting:
        raise UserError(f"{source}: none of its {len(weights)} weights fits this detector")
    model.load_state_dict(fitting, strict=False)
    reshaped = sorted(key for key in weights if key in own and own[key].shape != weights[key].shape)
    unknown = sorted(key for key in weights if key not in own)
    new = sorted(key for key in own if key not in weights)
    lines = [f"{source}: {len(fitting)} of {len(own)} weights loaded"]
    for what, keys in (("another shape", reshaped), ("not in this detector", unknown), ("start anew", new)):
        if keys:
            lines.append(f"  {what}: {len(keys)} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})")
    return lines + said


def class_names(source: str | Path) -> list[str] | None:
    """Class names, in label order, of a model file of tailfin; None for any other file."""
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return [str(name) for name in json.loads(metadata["categories"])["names"]]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


CLASS_LAYERS = ("cls_score", "class_embed", "bbox_pred")  # modules with a row, or four, per class
CLASS_ROWS = ("weight", "bias", "weight_v", "weight_g")  # their tensors that have them, one after another
CLASS_STATE = ("loss", "extra_rows", "refinement")  # modules whose state is of the old classes in their old order


def join_class_rows(
    own: dict[str, Tensor], weights: dict[str, Tensor], old: Sequence[str], new: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """`weights` of a model of the classes `old` for one of the classes `new`, and lines that say what became of them.

    Rows of the classifier and of class-specific boxes go to the class of the same name; what lies behind them (columns
    of the background) stays behind them; a class that `old` lacks keeps its rows of `own`, the new model's state.
    Class-agnostic boxes are copied. What is ordered by class in another way, the classifiers of Forest R-CNN and of
    BAGS, and what a loss or feature module counted of the old classes, starts anew.
    """
    join = join_classes(new, old)
    kept = np.flatnonzero(join.rows >= 0)
    to, of = torch.from_numpy(kept), torch.from_numpy(join.rows[kept])
    joined: dict[str, Tensor] = {}
    anew = []
    classified = False
    for key, value in weights.items():
        parts, start = key.split("."), own.get(key)
        if start is None or not (set(parts[:-1]) & {*CLASS_LAYERS, *CLASS_STATE}):
            joined[key] = value
            continue
        if "bbox_pred" in parts and (value.shape[0] == 4 != 4 * len(old) or start.shape[0] == 4 != 4 * len(new)):
            joined[key] = value  # boxes of all classes in one: they fit, or have another shape
            continue
        per_class = 4 if "bbox_pred" in parts else 1
        behind = value.shape[0] - per_class * len(old) if value.ndim else -1
        same = start.ndim == value.ndim > 0 and start.shape[1:] == value.shape[1:]
        same = same and start.shape[0] - per_class * len(new) == behind and 0 <= behind <= (2 if per_class == 1 else 0)
        simple = parts[-1] in CLASS_ROWS and not (set(parts) & {*CLASS_STATE, "classifiers"})
        if not (same and simple):
            anew.append(key)
            continue
        rows = start.detach().clone()
        rows[per_class * len(new) :] = value[per_class * len(old) :].to(rows)
        classes = rows[: per_class * len(new)].view(len(new), per_class, *rows.shape[1:])
        from_file = value[: per_class * len(old)].reshape(len(old), per_class, *value.shape[1:])
        classes[to.to(rows.device)] = from_file[of].to(rows)
        joined[key] = rows
        classified |= "bbox_pred" not in parts
    lines = [
        f"  classes joined by name: {len(kept)} kept, {len(join.missing)} new{_named(join.missing)}, "
        f"{len(join.unknown)} of the file left out{_named(join.unknown)}"
        if classified
        else f"  classes: 0 kept, {len(new)} new, {len(old)} of the file left out: its classifier is of another kind"
    ]
    if anew:
        more = ", ..." if len(anew) > 3 else ""
        lines.append(f"  ordered by the file's classes, start anew: {len(anew)} ({', '.join(anew[:3])}{more})")
    return joined, lines


def _named(names: list[str]) -> str:
    return f" ({listed(names)})" if names else ""


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
            facts = read_json(mark)
            if facts.get("bytes") == state.stat().st_size:
                complete.append((int(facts["iteration"]), state))
    return max(complete, key=lambda entry: entry[0])[1] if complete else None


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
