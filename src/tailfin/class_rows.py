"""Rows of a classifier that goes from one set of classes to another: joined by class name, never by position.

    weights, lines = join_class_rows(model.state_dict(), weights, old=["cat", "dog"], new=["dog", "mouse"])

The row of "dog" is kept, that of "mouse" stays as the new model starts it, that of "cat" is left out; the lines say so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors
import torch
from torch import Tensor

from tailfin.joins import join_classes, listed

CLASS_LAYERS = ("cls_score", "class_embed", "bbox_pred")  # modules with a row, or four, per class
CLASS_ROWS = ("weight", "bias", "weight_v", "weight_g")  # their tensors that have them, one after another
CLASS_STATE = ("loss", "extra_rows", "refinement")  # modules whose state is of the old classes in their old order


def class_names(source: str | Path) -> list[str] | None:
    """Class names, in label order, of a model file of tailfin; None for any other file."""
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return [str(name) for name in json.loads(metadata["categories"])["names"]]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def join_class_rows(
    own: Mapping[str, Tensor], weights: Mapping[str, Tensor], old: Sequence[str], new: Sequence[str]
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
    proposals = _proposal_head(own)
    anew = []
    classified = False
    for key, value in weights.items():
        parts, start = key.split("."), own.get(key)
        if start is None or not (set(parts[:-1]) & {*CLASS_LAYERS, *CLASS_STATE}):
            joined[key] = value
            continue
        if proposals and key.startswith(proposals) and 1 in (len(value), len(start)):
            rows = start.detach().clone()  # the logit that ranks proposals is the last; one side has no others
            rows[-1] = value[-1].to(rows)
            joined[key] = rows
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


def _proposal_head(own: Mapping[str, Tensor]) -> str:
    """Beginning of the names of a two-stage query detector's head of proposals, its last; empty where there is none."""
    heads = [int(key.split(".")[1]) for key in own if key.startswith("class_embed.")]
    return f"class_embed.{max(heads)}." if heads and "enc_output.weight" in own else ""


def _named(names: list[str]) -> str:
    return f" ({listed(names)})" if names else ""
