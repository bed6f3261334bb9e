"""Rows of a classifier that goes from one set of classes to another: joined by class name, never by position.

    weights, lines = join_class_rows(model.state_dict(), weights, old=["cat", "dog"], new=["dog", "mouse"])

The row of "dog" is kept, that of "mouse" stays as the new model starts it, that of "cat" is left out; the lines say so.
Class-specific boxes and masks go with them. Names that differ are joined by aliases, a file of `new name: old name`
(`read_aliases`, a recipe's `classes.map`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import safetensors
import torch
from torch import Tensor

from tailfin.errors import UserError, nearest
from tailfin.files import read_text
from tailfin.joins import ClassJoin, join_classes, listed
from tailfin.recipe_values import parse_yaml

# modules with a row, or four, per class
CLASS_LAYERS = (
    *("cls_score", "class_embed", "bbox_pred"),
    *("enc_score_head", "enc_out_class_embed", "denoising_class_embed"),  # of query-based detectors
)
CLASS_ROWS = ("weight", "bias", "weight_v", "weight_g")  # their tensors that have them, one after another
CLASS_STATE = ("loss", "class_loss", "extra_rows", "refinement")  # whose state is of the old classes in their order
DENSE = "head.classifier."  # of a dense detector: rows of every anchor, one anchor after another
DENSE_BOX = "head.box.bias"  # four rows per anchor
Aliases = Mapping[str, Sequence[str]]


class _Rows(NamedTuple):
    """How the rows of a weight are laid out: [groups, classes and what lies behind them, per class]."""

    groups: int
    per_class: int
    behind: int  # columns of background and the like, behind the classes of every group


def class_names(source: str | Path) -> list[str] | None:
    """Class names, in label order, of a model file of tailfin; None for any other file."""
    try:
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        return [str(name) for name in json.loads(metadata["categories"])["names"]]
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def read_aliases(path: str | Path) -> dict[str, list[str]]:
    """A YAML or JSON file of aliases: names of this data set's classes to the name, or a list of names, that the class
    has elsewhere."""
    value = parse_yaml(read_text(path, "classes.map"), f"classes.map {path}")
    if not isinstance(value, dict):
        raise UserError(f"classes.map {path}: a mapping of class names is needed, `new name: name in the weights`")
    found = {}
    for name, given in value.items():
        others = given if isinstance(given, list) else [given]
        if not others or not all(isinstance(other, str | int | float) for other in others):
            raise UserError(f'classes.map {path}: "{name}" needs the name, or a list of names, of the class elsewhere')
        found[str(name)] = [str(other) for other in others]
    return found


def check_aliases(aliases: Aliases, old: Sequence[str], new: Sequence[str]) -> None:
    """Refuse an alias that cannot join anything: of no class of `new`, or with no name that is one of `old`."""
    for name, others in aliases.items():
        if name not in new:
            raise UserError(f'classes.map: "{name}" is no class of the data{nearest(name, new)}')
        if name not in old and not set(others) & set(old):
            raise UserError(f'classes.map: "{name}" is "{others[0]}", no class of the weights{nearest(others[0], old)}')


def join_class_rows(
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    old: Sequence[str],
    new: Sequence[str],
    aliases: Aliases | None = None,
) -> tuple[dict[str, Tensor], list[str]]:
    """`weights` of a model of the classes `old` for one of the classes `new`, and lines that say what became of them.

    Rows of the classifier, of class-specific boxes and of class-specific masks go to the class of the same name, or
    alias; what lies behind them (columns of the background) stays behind them; a class that `old` lacks keeps its rows
    of `own`, the new model's state, which its loss has started. What is the same for all classes is copied. What is
    ordered by class in another way, the classifiers of Forest R-CNN and of BAGS, and what a loss or feature module
    counted of the old classes, starts anew.
    """
    check_aliases(aliases or {}, old, new)
    join = join_classes(new, old, aliases)
    kept = np.flatnonzero(join.rows >= 0)
    to, of = torch.from_numpy(kept), torch.from_numpy(join.rows[kept])
    same = list(old) == list(new) and not join.missing
    joined: dict[str, Tensor] = {}
    proposals = _proposal_head(own)
    anew = []
    classified = False
    for key, value in weights.items():
        parts, start = key.split("."), own.get(key)
        if start is None or not _knows_classes(key):
            joined[key] = value
            continue
        classifier = "bbox_pred" not in parts and not _of_masks(parts)
        if proposals and key.startswith(proposals) and 1 in (len(value), len(start)):
            rows = start.detach().clone()  # the logit that ranks proposals is the last; one side has no others
            rows[-1] = value[-1].to(rows)
            joined[key] = rows
            continue
        if same or _shared(key, value, start, len(old), len(new)):
            joined[key] = value
            classified |= same and classifier and start.shape == value.shape and not set(parts) & {*CLASS_STATE}
            continue
        layout = _layout(key, value, start, own, weights, len(old), len(new))
        if layout is None:
            anew.append(key)
            continue
        groups, per_class, behind = layout
        rows = start.detach().clone()
        grouped = rows.view(groups, -1, *rows.shape[1:])
        from_file = value.reshape(groups, -1, *value.shape[1:]).to(rows)
        if behind:
            grouped[:, -behind:] = from_file[:, -behind:]
        classes = grouped[:, : per_class * len(new)].unflatten(1, (len(new), per_class))
        theirs = from_file[:, : per_class * len(old)].unflatten(1, (len(old), per_class))
        classes[:, to.to(rows.device)] = theirs[:, of.to(rows.device)]
        joined[key] = rows
        classified |= classifier
    return joined, _told(join, len(kept), classified, anew)


def same_for_all_classes(key: str, state: Mapping[str, Tensor], classes: int) -> bool:
    """Whether a weight of a model of `classes` classes is of none of them: body, pyramid, boxes of all in one, ..."""
    return not _knows_classes(key) or _shared(key, state[key], state[key], classes, classes)


def rows_behind(key: str, state: Mapping[str, Tensor], classes: int) -> Tensor | None:
    """Which rows of a weight lie behind the classes (background), bool; none for a weight without rows of classes."""
    if same_for_all_classes(key, state, classes):
        return None
    layout = _layout(key, state[key], state[key], state, state, classes, classes)
    if layout is None:
        return None
    place = torch.arange(len(state[key])) % (len(state[key]) // layout.groups)
    return place >= layout.per_class * classes


def _knows_classes(key: str) -> bool:
    parts = key.split(".")
    if parts[0] == "rpn":  # its boxes are those of anchors
        return False
    named = set(parts[:-1]) & {*CLASS_LAYERS, *CLASS_STATE}
    return bool(named) or key.startswith(DENSE) or _of_masks(parts)


def _of_masks(parts: Sequence[str]) -> bool:
    """Of the layer of a mask branch that has a filter per class: `mask.predictor.conv.*`, `masks.0.predictor...`."""
    return parts[0] in ("mask", "masks") and "predictor" in parts


def _shared(key: str, value: Tensor, start: Tensor, old: int, new: int) -> bool:
    """Whether a weight is the same for all classes, or of none of them."""
    parts = key.split(".")
    if set(parts) & {*CLASS_STATE, "classifiers"}:
        return False
    if "bbox_pred" in parts:  # boxes of all classes in one: they fit, or have another shape
        return value.shape[0] == 4 != 4 * old or start.shape[0] == 4 != 4 * new
    if _of_masks(parts):
        return value.ndim == 0 or value.shape[0] == 1 != old or start.shape[0] == 1 != new
    # the head that ranks a two-stage transformer's proposals has one logit
    return "class_embed" in parts and value.ndim > 0 and value.shape[0] == 1 == start.shape[0] and 1 not in (old, new)


def _layout(
    key: str,
    value: Tensor,
    start: Tensor,
    own: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
    old: int,
    new: int,
) -> _Rows | None:
    """The layout that a weight has in both models; none where it is ordered by class in another way."""
    parts = key.split(".")
    if parts[-1] not in CLASS_ROWS or set(parts) & {*CLASS_STATE, "classifiers"}:
        return None
    if value.ndim == 0 or start.ndim != value.ndim or start.shape[1:] != value.shape[1:]:
        return None
    groups, per_class, most = 1, 1, 2
    if "bbox_pred" in parts:
        per_class, most = 4, 0
    elif _of_masks(parts):
        most = 0
    elif key.startswith(DENSE):
        box, theirs = own.get(DENSE_BOX), weights.get(DENSE_BOX)
        if box is None or theirs is None or len(box) != len(theirs):
            return None
        groups = len(box) // 4
    rows, wanted = value.shape[0] // groups, start.shape[0] // groups
    behind = rows - per_class * old
    if value.shape[0] % groups or start.shape[0] % groups or wanted - per_class * new != behind:
        return None
    return _Rows(groups, per_class, behind) if 0 <= behind <= most else None


def _told(join: ClassJoin, kept: int, classified: bool, anew: list[str]) -> list[str]:
    if not classified:
        left = len(join.others)
        lines = [
            f"  classes: 0 kept, {len(join.names)} new, {left} of the file left out: its classifier is of another kind"
        ]
    else:
        lines = [
            f"  classes joined by name: {kept} kept, {len(join.missing)} new{_named(join.missing)}, "
            f"{len(join.unknown)} of the file left out{_named(join.unknown)}"
        ]
    if anew:
        more = ", ..." if len(anew) > 3 else ""
        lines.append(f"  ordered by the file's classes, start anew: {len(anew)} ({', '.join(anew[:3])}{more})")
    return lines


def _proposal_head(own: Mapping[str, Tensor]) -> str:
    """Beginning of the names of a two-stage query detector's head of proposals, its last; empty where there is none."""
    heads = [int(key.split(".")[1]) for key in own if key.startswith("class_embed.")]
    return f"class_embed.{max(heads)}." if heads and "enc_output.weight" in own else ""


def _named(names: list[str]) -> str:
    return f" ({listed(names)})" if names else ""
