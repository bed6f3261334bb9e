"""Sums and rows over all processes of a training: what keeps statistics the same on every one of them.

    (counts,) = sum_over_ranks(counts)              # one collective for any number of tensors
    rows, labels = gather_over_ranks(rows, labels)  # processes may have different numbers of rows

Neither carries gradients; `sum_with_gradients` and `gather_with_gradients` do, so that the mean of the processes'
losses has the gradient that one process has on the joined batch. All are the values themselves where there is one
process. Every process has to call them, in the same order, and use what comes out, or the backward passes do not meet.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed
from torch import Tensor


def several_ranks() -> bool:
    """Whether this process is one of several."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return distributed and torch.distributed.get_world_size() > 1


def this_rank() -> tuple[int, int]:
    """(number of this process, how many there are)."""
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several_ranks() else (0, 1)


def sum_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """Sums of float tensors over all processes, in one collective; the values themselves where there is one process.

    Call it on every rank in every training step, also where a rank has nothing to add: a rank that skips it leaves the
    others waiting.
    """
    if not several_ranks():
        return values
    flat = torch.cat([value.detach().reshape(-1).to(values[0].dtype) for value in values])
    torch.distributed.all_reduce(flat)
    return tuple(
        part.view_as(value) for part, value in zip(flat.split([value.numel() for value in values]), values, strict=True)
    )


def gather_over_ranks(*values: Tensor) -> tuple[Tensor, ...]:
    """Rows of all processes, those of the first one first, in one exchange; the values themselves in one process.

    All `values` have one entry per row along the first dimension, any dtype; processes may have different numbers of
    rows, also none. Call it on every rank, as `sum_over_ranks`.
    """
    if not several_ranks():
        return values
    rows = len(values[0])
    packed = [
        value.detach().reshape(rows, math.prod(value.shape[1:])).contiguous().view(torch.uint8) for value in values
    ]
    flat = torch.cat(packed, dim=1)
    counts = [torch.zeros(1, dtype=torch.int64, device=flat.device) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(counts, torch.tensor([rows], device=flat.device))
    numbers = torch.cat(counts).tolist()
    mine = flat.new_zeros(max(numbers), flat.shape[1])
    mine[:rows] = flat
    everyone = [torch.empty_like(mine) for _ in numbers]
    torch.distributed.all_gather(everyone, mine)
    joined = torch.cat([part[:number] for part, number in zip(everyone, numbers, strict=True)])
    return tuple(
        part.contiguous().view(value.dtype).view(len(joined), *value.shape[1:])
        for part, value in zip(joined.split([part.shape[1] for part in packed], dim=1), values, strict=True)
    )


def sum_with_gradients(value: Tensor) -> Tensor:
    """Sum of a float tensor over all processes, with gradients: the sum of what all processes make of it flows back."""
    return _Sum.apply(value) if several_ranks() else value


def gather_with_gradients(rows: Tensor) -> Tensor:
    """`gather_over_ranks` of float rows [n, ...] with gradients to where they came from, as `sum_with_gradients`."""
    return _Gather.apply(rows) if several_ranks() else rows


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        rank = this_rank()[0]
        joined, owner = gather_over_ranks(rows, torch.full((len(rows),), rank, device=rows.device))
        ctx.mine = owner == rank
        return joined

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)[ctx.mine]


def _summed(value: Tensor) -> Tensor:
    total = value.detach().clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total)
    return total
