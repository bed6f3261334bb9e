"""Places of cells and boxes as Deformable DETR encodes them: masks of padded batches, sines, centres, logits."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tailfin.models.constants import constant

Shapes = list[tuple[int, int]]  # (height, width) of every level

TEMPERATURE = 10000.0  # of the sines that encode positions
KEPT_LEVELS = 32  # batches' shapes; half a megabyte each at 800 x 1333


def exporting() -> bool:
    """Whether a graph is being made whose sizes must not become constants."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def valid_mask(shape: tuple[int, int], full: Sequence[int], sizes: Tensor) -> Tensor:
    """Bool [B, h, w]: the cells of a level whose pixel (the nearest one) lies in the picture; `full` is the batch's."""
    rows = torch.arange(shape[0], device=sizes.device) * full[0] // shape[0] < sizes[:, 1:2]
    columns = torch.arange(shape[1], device=sizes.device) * full[1] // shape[1] < sizes[:, :1]
    return rows[:, :, None] & columns[:, None]


class Levels(NamedTuple):
    """The cells of all levels one behind the other, S in all; (x, y) everywhere."""

    sides: Tensor  # [1 + L, 2]: cells of the batch's canvas in pixels, then of every level
    level: Tensor  # int64 [S], which level a cell is of
    place: Tensor  # [S, 2], column and row on its level
    centre: Tensor  # [S, 2], in fractions of the level's map


class Cells(NamedTuple):
    """Where the cells of a batch's levels lie in its pictures."""

    valid: Tensor  # bool [B, S, 2], whether a column, a row is within the picture
    within: Tensor  # [B, S, 2], how many of its level are
    ratios: Tensor  # [B, L, 2], the picture's share of every level's map
    centres: Tensor  # [B, S, 2], in fractions of the picture


def levels_of(shapes: Shapes, full: Sequence[int], device: torch.device) -> Levels:
    """All levels of a padded batch of `full` (height, width) pixels: constants, made once for a device."""
    if exporting():
        return _levels_of((tuple(full), *shapes), device)
    return _kept_levels(tuple((int(height), int(width)) for height, width in (full, *shapes)), device)


def _levels_of(shapes: Sequence[Sequence[int]], device: torch.device) -> Levels:
    every, place, centre = [], [], []
    for number, (height, width) in enumerate(shapes[1:]):
        y, x = (torch.arange(side, device=device, dtype=torch.float32) for side in (height, width))
        last = torch.cat([x[-1:], y[-1:]]) + 1  # in an exported graph computed, whatever the picture's size
        rows, columns = torch.meshgrid(y, x, indexing="ij")
        own = torch.stack([columns, rows], dim=-1).flatten(0, 1)
        every.append(torch.full_like(own[:, 0], number, dtype=torch.int64))
        place.append(own)
        centre.append((own + 0.5) / last)
    return Levels(sides_of(shapes, device), torch.cat(every), torch.cat(place), torch.cat(centre))


@functools.lru_cache(KEPT_LEVELS)
def _kept_levels(shapes: tuple[tuple[int, int], ...], device: torch.device) -> Levels:
    with torch.inference_mode(False):  # what evaluation has made serves training too
        return Levels(*(value.to(device) for value in _levels_of(shapes, torch.device("cpu"))))


def sides_of(shapes: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """[L, 2] width and height of the levels; in an exported graph they are computed, whatever the picture's size."""
    if not exporting():
        return constant([(width, height) for height, width in shapes], device)
    last = [torch.arange(side, device=device)[-1:] for height, width in shapes for side in (width, height)]
    return (torch.cat(last) + 1).float().view(-1, 2)


def cells_of(levels: Levels, sizes: Tensor) -> Cells:
    """The cells of pictures of `sizes` [B, 2 or more] (width, height): one is within whose pixel (the nearest) is."""
    full, sides = levels.sides[0], levels.sides[1:]
    within = (sizes[:, None, :2] * sides / full).ceil()
    ratios = within / sides
    within = within[:, levels.level]
    return Cells(levels.place < within, within, ratios, levels.centre / ratios[:, levels.level])


def position_code(levels: Levels, cells: Cells, channels: int) -> Tensor:
    """Sines of every cell's place in its picture, [B, S, 2 * channels], rows first; columns and rows that are not
    within it have those of a place far outside, as published."""
    other = cells.valid.flip(2)
    place = (torch.minimum(levels.place + 1, cells.within) * other - 0.5) / (cells.within * other + 1e-6)
    return _sines(place.flip(2), channels).flatten(2)


def box_code(boxes: Tensor, channels: int) -> Tensor:
    """Sines of the four numbers of every box: [B, Q, 4] to [B, Q, 4 * channels]."""
    return _sines(boxes, channels).flatten(2)


def _sines(values: Tensor, channels: int) -> Tensor:
    """[...] in 0..1 to [..., channels]: sine and cosine in turns, at `channels / 2` frequencies."""
    angle = values[..., None] * (2 * math.pi) / constant(_wavelengths(channels), values.device)
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


@functools.lru_cache
def _wavelengths(channels: int) -> tuple[float, ...]:
    return tuple((TEMPERATURE ** (torch.arange(0, channels, 2) / channels)).tolist())


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
