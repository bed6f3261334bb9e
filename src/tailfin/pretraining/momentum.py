"""The momentum network: a copy that follows the trained one as an exponential moving average (MoCo, BYOL).

    theta' <- m theta' + (1 - m) theta,   m constant, or rising to 1 by a cosine

Its parameters take no gradients and are in no optimiser. Buffers (batch norm's running statistics) are copied.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn


def momentum_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` that takes no gradients."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, module: nn.Module, momentum: float) -> None:
    """Move `average` towards `module` by a share of 1 - momentum: 1 leaves it, 0 makes it equal; copy the buffers."""
    trained: list[tuple[Tensor, Tensor]] = list(zip(average.parameters(), module.parameters(), strict=True))
    trained = [(mine, theirs) for mine, theirs in trained if theirs.requires_grad]  # the others never change
    if trained:
        torch._foreach_lerp_([mine for mine, _ in trained], [theirs.detach() for _, theirs in trained], 1 - momentum)
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        mine.copy_(theirs)


def cosine_momentum(start: float, progress: float) -> float:
    """`start` at progress 0, 1 at progress 1, along half a cosine (BYOL)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(max(progress, 0.0), 1.0)) + 1) / 2
