"""What converters of released checkpoints hand on, and what they share.

`Released` is a state dict by tailfin's names with the names of its classes; `Zoo` one of another project's model zoo,
with what the recipe has to say for the same outputs. A state has its classes first and the background, where it has
one, behind them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailfin.errors import UserError
from tailfin.models.images import STD
from tailfin.schema.backbones import CAFFE

EPS = 1e-5  # of batch norms here and in the zoos
STYLES = ("caffe", "pytorch")  # BGR with deviation 1, stride in 1x1; RGB with ImageNet's deviation, stride in 3x3


class Released(NamedTuple):
    """Weights of a whole detector by tailfin's names."""

    state: dict[str, Tensor]
    names: Sequence[str] | None = None  # of the classes of its rows; none: they are those of the data, as they fit
    notes: tuple[str, ...] = ()  # what the user should know


class Zoo(NamedTuple):
    """Weights of a detector of another project."""

    state: dict[str, Tensor]
    detector: str  # a name of tailfin's
    rows: int  # of the classifier, per anchor
    changes: dict[str, Any]  # keys of the recipe -> what gives the project's own outputs


def renamed(
    state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], left_out: str, source: str
) -> dict[str, Tensor]:
    """Every weight under the name that the first rule with its pattern gives it; none without a rule, a `UserError`."""
    compiled = [(re.compile(pattern), ours) for pattern, ours in rules]
    without = re.compile(left_out)
    found: dict[str, Tensor] = {}
    unknown = []
    for key, value in state.items():
        if without.search(key):
            continue
        rule = next(((pattern, ours) for pattern, ours in compiled if pattern.match(key)), None)
        if rule is None:
            unknown.append(key)
        else:
            found[rule[0].sub(rule[1], key, count=1)] = value
    if unknown:
        more = ", ..." if len(unknown) > 3 else ""
        raise UserError(
            f"{source}: {len(unknown)} of its weights belong to no detector that can be converted "
            f"({', '.join(unknown[:3])}{more})"
        )
    return found


def rgb_conv(weight: Tensor) -> Tensor:
    """The first convolution [O, 3, k, k] for pictures RGB in 0..1 with ImageNet's mean and deviation, of one for BGR in
    0..255 with the same mean and deviation 1. Exact, at the padded border too, since the means are the same."""
    scale = 255 * torch.tensor(STD, dtype=torch.float64)
    return (weight.double().flip(1) * scale[:, None, None]).to(weight.dtype)


def with_statistics(state: Mapping[str, Tensor], norms: Iterable[str]) -> dict[str, Tensor]:
    """The state with mean 0 and deviation 1 for those of `norms` (beginnings of names) that only scale and shift."""
    found = dict(state)
    for norm in norms:
        if f"{norm}running_mean" not in found:
            weight = found[f"{norm}weight"]
            found[f"{norm}running_mean"] = torch.zeros_like(weight)
            found[f"{norm}running_var"] = torch.full_like(weight, 1 - EPS)
    return found


def without_eps(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state for norms that add `EPS` to the variance, of one for norms that add nothing."""
    return {key: value - EPS if key.endswith("running_var") else value for key, value in state.items()}


def body_changes(backbone: str, style: str) -> dict[str, Any]:
    """What the recipe says of the backbone, for a style of `STYLES`."""
    plain = CAFFE.get(backbone, backbone)
    caffe = {theirs: name for name, theirs in CAFFE.items()}
    return {"backbone": caffe.get(plain, plain) if style == "caffe" else plain, "detector.norm": "frozen_bn"}


def class_changes(name: str, box_rows: int | None, mask_rows: int | None) -> dict[str, Any]:
    """Whether boxes and masks of a two-stage detector are class-specific."""
    changes: dict[str, Any] = {}
    if box_rows is not None:
        changes["detector.box_regression"] = "class_agnostic" if box_rows == 4 else "class_specific"
    if mask_rows is not None:
        changes["detector.masks_by_class"] = "class_agnostic" if mask_rows == 1 else "class_specific"
    if name == "cascade_rcnn":
        changes["detector.masks"] = mask_rows is not None
    return changes
