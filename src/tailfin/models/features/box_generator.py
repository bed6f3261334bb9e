"""Sixteen shifted copies of every ground-truth box, without anything to learn (LOCE, ICCV'21; BACL, TMM'23, eq. 10).

    copy = (x1 + e1 w/6, y1 + e2 h/6, x2 + e3 w/6, y2 + e4 h/6)

The released code of both methods takes e = sign * u: the 16 copies go through all sign patterns of the four
coordinates, and u, uniform in 0..1, is drawn once per image and shared by its boxes. BACL's text draws every e
independently from -1..1; that is `independent=True`. The copies collect features, they are not proposals to regress::

    boxes = perturbed_boxes(target["boxes"], (height, width))
    labels = target["labels"].repeat_interleave(COPIES)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tailfin.models.images import pictures_of, size_limits

COPIES = 16


def perturbed_boxes(
    boxes: Tensor,
    image_size: tuple[int, int] | Tensor,
    *,
    independent: bool = False,
    generator: torch.Generator | None = None,
    draws: Tensor | None = None,
) -> Tensor:
    """[16 n, 4] copies of `boxes` [n, 4] (xyxy, pixels; float), all of the first box, then all of the second one.

    `image_size` is (height, width), or of each box the width, height, width, height of its picture [n, 4]; x is clamped
    to 0..width - 1, y to 0..height - 1. `draws` takes the place of random numbers: [4, 16] in 0..1, coordinate by copy
    (or of each box its own [n, 4, 16]), or [n, 16, 4] in -1..1 for `independent`.
    """
    if independent:
        shape: tuple[int, ...] = (len(boxes), COPIES, 4)
        if draws is None:
            draws = 2 * torch.rand(shape, generator=generator, device=boxes.device, dtype=boxes.dtype) - 1
    else:
        shape = (4, COPIES)
        if draws is None:
            draws = torch.rand(shape, generator=generator, device=boxes.device, dtype=boxes.dtype)
    if draws.shape not in (shape, (len(boxes), *shape)):
        raise ValueError(f"draws must be {list(shape)}, these are {list(draws.shape)}")
    draws = draws.to(boxes)
    offset = draws if independent else (draws * sign_patterns(boxes)).transpose(-1, -2)  # [n or 1, 16, 4]

    sides = (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)  # w, h, w, h
    copies = boxes[:, None] + offset * (sides / 6)[:, None]
    if not isinstance(image_size, Tensor):
        image_size = size_limits([image_size], boxes.device)
    limit = (image_size.to(boxes) - 1)[:, None]
    return torch.minimum(copies.clamp(min=0), limit).reshape(-1, 4)


def shifted_boxes(
    targets: Sequence[dict[str, Tensor]], image_sizes: list[tuple[int, int]], *, independent: bool = False
) -> tuple[list[Tensor], Tensor, Tensor]:
    """16 shifted copies of every object: boxes per image [16 m, 4], labels [N] and the objects' own boxes [N, 4]."""
    objects = torch.cat([target["boxes"] for target in targets])
    counts = [len(target["boxes"]) for target in targets]
    picture = pictures_of(counts, objects.device)
    draws = None
    if not independent:  # one draw for the objects of a picture
        shape = (len(targets), 4, COPIES)
        draws = torch.rand(shape, device=objects.device, dtype=objects.dtype)[picture]
    limits = size_limits(image_sizes, objects.device)[picture]
    copies = perturbed_boxes(objects, limits, independent=independent, draws=draws)
    labels = torch.cat([target["labels"] for target in targets])
    return (
        list(copies.split([COPIES * count for count in counts])),
        labels[:, None].expand(-1, COPIES).flatten(),
        objects[:, None].expand(-1, COPIES, 4).flatten(0, 1),
    )


def sign_patterns(like: Tensor) -> Tensor:
    """[4, 16] of -1 and 1: all patterns of (x1, y1, x2, y2), x1 slowest, -1 first; dtype and device of `like`."""
    number = torch.arange(COPIES, device=like.device)
    bit = 2 ** torch.arange(3, -1, -1, device=like.device)[:, None]
    return torch.where((number & bit) > 0, 1, -1).to(like.dtype)
