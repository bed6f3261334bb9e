"""The momentum network: a copy that follows the trained one as an exponential moving average (MoCo, BYOL).

    theta' <- m theta' + (1 - m) theta,   m constant, or rising to 1 by a cosine

Its parameters take no gradients and are in no optimiser. Buffers (batch norm's running statistics) are copied.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping

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
        torch._foreach_lerp_([mine for mine, _ in trained], [theirs for _, theirs in trained], 1 - momentum)
    buffers: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}  # lists of one type are copied in one launch
    for mine, theirs in zip(average.buffers(), module.buffers(), strict=True):
        own = buffers.setdefault(mine.dtype, ([], []))
        own[0].append(mine)
        own[1].append(theirs)
    for to, source in buffers.values():
        torch._foreach_copy_(to, source)


def cosine_momentum(start: float, progress: float) -> float:
    """`start` at progress 0, 1 at progress 1, along half a cosine (BYOL)."""
    return 1 - (1 - start) * (math.cos(math.pi * min(max(progress, 0.0), 1.0)) + 1) / 2


class MomentumNetwork(nn.Module):
    """Momentum copies of modules by name; `network[name]` is the copy.

    In `train` every copy takes the modes of what it follows, so the modules come first among those that are asked.
    """

    def __init__(self, followed: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.copies = nn.ModuleDict({name: momentum_copy(module) for name, module in followed.items()})
        self.followed = dict(followed)  # plain: they belong to others

    def __getitem__(self, name: str) -> nn.Module:
        return self.copies[name]

    def get(self, name: str, default: nn.Module) -> nn.Module:
        """The copy, or `default` where there is none."""
        return self.copies[name] if name in self.copies else default  # noqa: SIM401 - a ModuleDict has no `get`

    def __contains__(self, name: str) -> bool:
        return name in self.copies

    def __len__(self) -> int:
        return len(self.copies)

    def follow(self, momentum: float) -> None:
        """Move every copy, see `follow`."""
        for name, module in self.followed.items():
            follow(self.copies[name], module, momentum)

    def train(self, mode: bool = True) -> MomentumNetwork:
        super().train(mode)
        for name, module in self.followed.items():
            for mine, theirs in zip(self.copies[name].modules(), module.modules(), strict=True):
                mine.training = theirs.training
        return self
