"""Drawing rows for a loss from every picture of a batch at once, and what the host must know of them.

    index, drawn = sample_rows(positive, negative, 512, 0.25)      # int64 and bool [B, S], a fixed size
    chosen = chosen_rows(drawn, pictures, B, levels, 4)            # the one read back to the host

A loop over pictures with `nonzero` and `randperm` makes the host wait for an accelerator several times per picture.
Here every row has a random key and the largest ones win, in tensors whose shape does not depend on the data; what the
shapes of later steps depend on is read in one go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tailfin.models.assigners import pad_boxes


class Proposals(NamedTuple):
    """Boxes of B pictures in tensors of one size."""

    boxes: Tensor  # [B, P, 4], xyxy
    scores: Tensor  # [B, P], best first
    valid: Tensor  # bool [B, P], which of them are boxes; from the network for proposals these stand first

    def split(self) -> tuple[list[Tensor], list[Tensor]]:
        """Boxes [n, 4] and scores [n] per picture; one read back to the host."""
        counts = self.valid.sum(1).tolist()
        return (
            [own[:count] for own, count in zip(self.boxes, counts, strict=True)],
            [own[:count] for own, count in zip(self.scores, counts, strict=True)],
        )


class Chosen(NamedTuple):
    """Rows that a mask chooses, pictures one after another, and what the host knows of them."""

    rows: Tensor  # int64 [N], into the flattened mask
    per_picture: list[int]
    per_level: list[int]


def padded(boxes: Sequence[Tensor]) -> Proposals:
    """Boxes [n, 4] per picture as `Proposals` of the largest number of them; their scores are 0."""
    joined, valid = pad_boxes(boxes, boxes[0].device, boxes[0].dtype)
    return Proposals(joined, joined.new_zeros(joined.shape[:2]), valid)


@torch.no_grad()
def sample_rows(
    positive: Tensor, negative: Tensor, count: int, share: float, keys: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """At most `count` rows of every picture, at random: positive ones up to `share`, negative ones for the rest.

    Args:
        positive, negative: bool [B, N], no row both.
        keys: [B, N] in 0..1, the draw: of each kind the rows with the largest ones are taken. By default from torch's
            generator of the device.

    Returns:
        int64 [B, S] rows in ascending order, and bool [B, S] which of them are drawn, those first; S is the smaller of
        `count` and N.
    """
    rows = positive.shape[1]
    if keys is None:
        keys = torch.rand(positive.shape, device=positive.device)
    size = min(count, rows)
    first, own = torch.where(positive, keys, -1.0).topk(min(int(count * share), rows), dim=1)
    taken = first >= 0
    second, other = torch.where(negative, keys, -1.0).topk(size, dim=1)
    room = count - taken.sum(1, keepdim=True)
    filled = (second >= 0) & (torch.arange(size, device=room.device) < room)
    index = torch.cat([torch.where(taken, own, rows), torch.where(filled, other, rows)], dim=1)
    index = index.sort(dim=1).values[:, :size]
    return index.clamp(max=rows - 1), index < rows


@torch.no_grad()
def chosen_rows(mask: Tensor, pictures: Tensor, batch: int, levels: Tensor, count: int) -> Chosen:
    """Where `mask` is true, in order, with the numbers per picture and per pyramid level: one read back to the host.

    Args:
        mask: bool, any shape of N elements; pictures and levels int64 of the same shape.
        batch, count: how many pictures and levels there are.
    """
    mask, pictures, levels = mask.flatten(), pictures.flatten(), levels.flatten()
    key = torch.cat([pictures, levels + batch])
    found = torch.zeros(batch + count, dtype=torch.int64, device=mask.device)
    numbers: list[int] = found.index_add_(0, key, mask.to(torch.int64).repeat(2)).tolist()
    total = sum(numbers[:batch])
    index = torch.argsort(~mask, stable=True)[:total]
    return Chosen(index, numbers[:batch], numbers[batch:])
