"""The classifier of a model file: its weights class by class, read tensor by tensor, and what its loss knows."""

from __future__ import annotations

import functools
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import torch

from tailfin import losses
from tailfin.config import parse_yaml, stored_recipe
from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.fcbl import FCBL
from tailfin.report.norms import class_norms
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

_WEIGHT = re.compile(r"(?:.*\.)?(?:cls_score|class_embed(?:\.\d+)?)\.weight$")


@dataclass(frozen=True)
class Classifier:
    """What a model file says about its classifier; classes in label order."""

    recipe: Recipe
    stats: ClassStats
    rows: np.ndarray  # float64 [C, D] weights of each class, as stored
    indicator: np.ndarray | None  # float64 [C] of a run with fcbl, 0..1

    @property
    def order(self) -> np.ndarray:
        """Classes by training instances, the most frequent first."""
        return np.argsort(-self.stats.instance_count, kind="stable")

    @property
    def norms(self) -> np.ndarray:
        """float64 [C], length of each class's weights."""
        return class_norms(self.rows, np.arange(len(self.rows)))


def read_classifier(path: Path) -> Classifier | None:
    """The final classifier of a model file; None where there is no file, or none that is understood."""
    return _read(path, path.stat().st_mtime_ns) if path.is_file() else None


def twins(rows: np.ndarray) -> np.ndarray:
    """int64 [C], for each class the one whose weights point the most alike."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    alike = unit @ unit.T
    np.fill_diagonal(alike, -np.inf)
    return np.asarray(alike.argmax(axis=1))


# ---- details ---------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def _read(path: Path, changed: int) -> Classifier | None:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            recipe = stored_recipe(parse_yaml(metadata["recipe"], str(path)), str(path))
            stats = ClassStats.from_dict(json.loads(metadata["categories"]))
            names = list(file.keys())
            weights = sorted((name for name in names if _WEIGHT.fullmatch(name)), key=_natural)
            layers = getattr(recipe.detector, "decoder_layers", 0)  # of a DETR; the encoder's head comes after theirs
            weights = [name for name in weights if name.endswith(f"class_embed.{layers - 1}.weight")] or weights
            if not weights:
                return None
            loss = losses.build(recipe.loss.name, stats, **recipe.loss.options)
            weight = file.get_tensor(weights[-1])  # of several heads the last one
            if weight.ndim != 2 or len(weight) != loss.num_logits:
                return None
            rows = weight.double()[_columns(loss)].numpy()
            state = {name.rpartition(".loss.")[2]: name for name in names if ".loss." in name}
            indicator = None
            if isinstance(loss, FCBL) and set(loss.state_dict()) <= state.keys():
                loss.load_state_dict({key: file.get_tensor(state[key]) for key in loss.state_dict()})
                indicator = loss.indicator_diagonal().double().numpy()
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, OSError, *_OTHERS):
        return None  # of another version or damaged: the rest of the report is worth reading
    return Classifier(recipe, stats, rows, indicator)


_OTHERS = (safetensors.SafetensorError, UserError)


def _columns(loss: ClassificationLoss) -> torch.Tensor:
    """The logits of the foreground classes: the first ones, unless the loss has an order of its own (BAGS)."""
    column = getattr(loss, "column", None)
    return torch.arange(loss.num_classes) if column is None else column


def _natural(name: str) -> list[int | str]:
    """`head.10` after `head.9`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
