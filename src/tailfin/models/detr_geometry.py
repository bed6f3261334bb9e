"""Places of cells and boxes as Deformable DETR encodes them: masks of padded batches, sines, centres, logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

TEMPERATURE = 10000.0  # of the sines that encode positions


def valid_mask(shape: tuple[int, int], full: Sequence[int], sizes: Tensor) -> Tensor:
    """Bool [B, h, w]: the cells of a level whose pixel (the nearest one) lies in the picture; `full` is the batch's."""
    rows = torch.arange(shape[0], device=sizes.device) * full[0] // shape[0] < sizes[:, 1:2]
    columns = torch.arange(shape[1], device=sizes.device) * full[1] // shape[1] < sizes[:, :1]
    return rows[:, :, None] & columns[:, None]


def position_code(mask: Tensor, channels: int) -> Tensor:
    """Sines of every cell's place in its picture: [B, h, w] to [B, h, w, 2 * channels], rows first."""
    code = []
    for axis in (1, 2):
        place = mask.cumsum(axis, dtype=torch.float32)
        place = (place - 0.5) / (place.narrow(axis, place.shape[axis] - 1, 1) + 1e-6)
        code.append(_sines(place, channels))
    return torch.cat(code, dim=-1)


def box_code(boxes: Tensor, channels: int) -> Tensor:
    """Sines of the four numbers of every box: [B, Q, 4] to [B, Q, 4 * channels]."""
    return _sines(boxes, channels).flatten(2)


def _sines(values: Tensor, channels: int) -> Tensor:
    """[...] in 0..1 to [..., channels]: sine and cosine in turns, at `channels / 2` frequencies."""
    exponent = torch.arange(0, channels, 2, device=values.device) / channels
    angle = values[..., None] * (2 * math.pi) / TEMPERATURE**exponent
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def grid(shape: tuple[int, int], ratio: Tensor) -> Tensor:
    """Centres (x, y) of a level's cells in fractions of the picture, [B, h w, 2]; its share of the map is `ratio`."""
    y, x = torch.meshgrid(
        *[(torch.arange(side, device=ratio.device) + 0.5) / side for side in shape],
        indexing="ij",
    )
    return torch.stack([x, y], dim=-1).flatten(0, 1) / ratio[:, None]


def inverse_sigmoid(values: Tensor, eps: float = 1e-5) -> Tensor:
    """log(x / (1 - x)) with both bounded from below, as published."""
    values = values.clamp(0, 1)
    return (values.clamp(min=eps) / (1 - values).clamp(min=eps)).log()
