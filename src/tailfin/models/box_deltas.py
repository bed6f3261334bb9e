"""Boxes as four numbers relative to a reference box, R-CNN's parametrisation with mmdetection's clamp.

    dx, dy = (centre - reference's centre) / reference's sides / std     dw, dh = log(sides / reference's sides) / std

Decoding clamps dw and dh on both sides, at +-log(1000 / 16); torchvision's `BoxCoder` clamps the upper side alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tailfin.losses.base import at_least_float32
from tailfin.models.mask_ops import clip_boxes

LARGEST = math.log(1000 / 16)  # of |dw| and |dh| after the stds
Stds = Sequence[float] | Tensor


def encode_deltas(references: Tensor, boxes: Tensor, stds: Stds = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """[N, 4] references and [N, 4] boxes (xyxy, sides above 0) to [N, 4] deltas."""
    centre, sides = _centred(references)
    other, other_sides = _centred(boxes)
    deltas = torch.cat([(other - centre) / sides, (other_sides / sides).log()], dim=1)
    return _times(deltas, stds, inverse=True)


def decode_deltas(
    references: Tensor,
    deltas: Tensor,
    stds: Stds = (1.0, 1.0, 1.0, 1.0),
    image_size: tuple[int, int] | None = None,
) -> Tensor:
    """[N, 4] references and [N, 4] deltas to [N, 4] boxes xyxy, clipped to `image_size` (H, W) where it is given."""
    centre, sides = _centred(references)
    deltas = _times(at_least_float32(deltas), stds)
    centre = centre + deltas[:, :2] * sides
    half = sides * deltas[:, 2:].clamp(-LARGEST, LARGEST).exp() * 0.5
    boxes = torch.cat([centre - half, centre + half], dim=1)
    return boxes if image_size is None else clip_boxes(boxes, image_size)


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor]:
    boxes = at_least_float32(boxes)
    return (boxes[:, :2] + boxes[:, 2:]) * 0.5, boxes[:, 2:] - boxes[:, :2]


def _times(deltas: Tensor, stds: Stds, *, inverse: bool = False) -> Tensor:
    """Deltas times (divided by) their stds; numbers of the host stay there, a device would wait for their upload."""
    if len(stds) != 4:
        raise ValueError(f"stds must be four numbers, these are {list(stds)}")
    if isinstance(stds, Tensor):
        values = stds.to(deltas)
        return deltas / values if inverse else deltas * values
    if set(stds) == {1.0}:
        return deltas
    columns = [own / std if inverse else own * std for own, std in zip(deltas.unbind(1), stds, strict=True)]
    return torch.stack(columns, dim=1)
