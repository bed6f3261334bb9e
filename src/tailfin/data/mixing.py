"""Several training pictures in one: mosaic of four (Bochkovskiy et al., 2020) and mixup of two (Zhang et al., ICLR'18).

    image, target = mosaic([(image, target), ...], rng, scale=(0.5, 1.0))      four samples, the first says how large
    image, target = mixup((image, target), (other, other_target), rng, alpha=8.0)

Pictures are uint8 [3, H, W], already augmented; targets are as in `copy_paste`: every tensor with a dimension has one
row per object (`boxes`, `labels`, `masks`, `mask_valid`), and all targets have the same fields. Every random choice
comes from the generator. The inputs are never changed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.data.copy_paste import PADDING
from tailfin.data.transforms import Sample, crop, resize

MIN_VISIBLE = 0.25  # share of a box that must be left in a mosaic, or its object is dropped
CENTRE = (0.3, 0.7)  # where the four meet, in fractions of the canvas


def mosaic(
    samples: Sequence[tuple[Tensor, Sample]], rng: np.random.Generator, scale: tuple[float, float] = (0.5, 1.0)
) -> tuple[Tensor, Sample]:
    """Four pictures around a point on a canvas of the first one's size, in an order that is drawn.

    Each is scaled by a factor in `scale`. One that is larger than its quarter shows a window of it that is drawn, a
    smaller one lies at the point, and what is left is ImageNet's mean colour. Boxes and masks are cut at the quarter;
    an object of whose box less than a quarter is left is dropped.
    """
    if len(samples) != 4:
        raise ValueError(f"a mosaic has 4 pictures, these are {len(samples)}")
    height, width = (int(side) for side in samples[0][0].shape[-2:])
    middle_y, middle_x = (round(side * rng.uniform(*CENTRE)) for side in (height, width))
    canvas = torch.tensor(PADDING, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    parts: list[Sample] = []
    for quarter, place in enumerate(rng.permutation(4).tolist()):
        image, target = samples[place]
        below, right = quarter >= 2, quarter % 2 == 1
        room = (height - middle_y if below else middle_y, width - middle_x if right else middle_x)
        if min(room) < 1:
            continue
        image, target = _scaled(image, target, rng.uniform(*scale))
        image, target = _window(image, target, room, rng)
        rows, columns = image.shape[-2:]
        top, left = middle_y if below else middle_y - rows, middle_x if right else middle_x - columns
        canvas[:, top : top + rows, left : left + columns] = image
        parts.append(_moved(target, left, top, height, width))
    return canvas, _joined(parts, samples[0][1])


def mixup(
    first: tuple[Tensor, Sample], second: tuple[Tensor, Sample], rng: np.random.Generator, alpha: float = 8.0
) -> tuple[Tensor, Sample]:
    """Two pictures, upper left corners together, added with weights m and 1 - m, m from Beta(alpha, alpha); the objects
    of both. The canvas has the larger height and the larger width; what one lacks of it is ImageNet's mean colour."""
    weight = rng.beta(alpha, alpha)
    height, width = (max(first[0].shape[axis], second[0].shape[axis]) for axis in (-2, -1))
    layers = []
    for image, _ in (first, second):
        layer = torch.tensor(PADDING, dtype=torch.float32)[:, None, None].repeat(1, height, width)
        layer[:, : image.shape[-2], : image.shape[-1]] = image
        layers.append(layer)
    mixed = (layers[0] * weight).add_(layers[1], alpha=1 - weight).round_().clamp_(0, 255).to(torch.uint8)
    return mixed, _joined([_moved(target, 0, 0, height, width) for _, target in (first, second)], first[1])


# ---- details ---------------------------------------------------------------------------------------------------------


def _scaled(image: Tensor, target: Sample, factor: float) -> tuple[Tensor, Sample]:
    height, width = (max(1, round(side * factor)) for side in image.shape[-2:])
    return resize(image, target, (height, width))


def _window(image: Tensor, target: Sample, room: tuple[int, int], rng: np.random.Generator) -> tuple[Tensor, Sample]:
    """A window of at most `room` (height, width), without the objects of which too little is left."""
    boxes = target["boxes"]
    target = {**target, "whole": (boxes[:, 2:] - boxes[:, :2]).prod(1)}
    sides = [min(int(side), most) for side, most in zip(image.shape[-2:], room, strict=True)]
    start = [int(rng.integers(int(side) - own + 1)) for side, own in zip(image.shape[-2:], sides, strict=True)]
    image, target = crop(image, _rows_only(target), *start, *sides)
    boxes = target["boxes"]
    keep = (boxes[:, 2:] - boxes[:, :2]).prod(1) >= MIN_VISIBLE * target.pop("whole")
    return image, {key: value[keep] for key, value in target.items()}


def _rows_only(target: Sample) -> Sample:
    return {key: value for key, value in target.items() if value.ndim}


def _moved(target: Sample, left: int, top: int, height: int, width: int) -> Sample:
    """Boxes and masks of a part that lies at (left, top) of a canvas."""
    moved = {**_rows_only(target), "boxes": target["boxes"] + torch.tensor([left, top, left, top], dtype=torch.float32)}
    if "masks" in target:
        rows, columns = target["masks"].shape[-2:]
        moved["masks"] = F.pad(target["masks"], (left, width - left - columns, top, height - top - rows))
    return moved


def _joined(parts: Sequence[Sample], first: Sample) -> Sample:
    """The objects of all parts; scalars are those of the first target."""
    return {
        key: torch.cat([part[key].to(value.dtype) for part in parts]) if value.ndim else value
        for key, value in first.items()
    }
