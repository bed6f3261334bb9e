"""Optimiser and learning rate from a recipe; the rate is a pure function of the iteration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tailfin.schema.training import Schedule


def build_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    """SGD or AdamW over the parameters that train; `norm_decay: false` spares norm layers from weight decay.

    A group's `lr_scale` multiplies the rate of the iteration: `schedule.lr_scales` maps a part of a parameter's name
    (the first one that it holds) to its factor.
    """
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    spared: set[int] = set()
    if not schedule.norm_decay:
        spared = {id(p) for module in model.modules() if isinstance(module, norms) for p in module.parameters()}
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    by_kind: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable:
        scale = next((factor for part, factor in schedule.lr_scales.items() if part in name), 1.0)
        by_kind.setdefault((scale, id(parameter) in spared), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scale, **({"weight_decay": 0.0} if without_decay else {})}
        for (scale, without_decay), parameters in by_kind.items()
    ]
    if schedule.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=schedule.rate, weight_decay=schedule.weight_decay)
    return torch.optim.SGD(groups, lr=schedule.rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay)


def learning_rate(iteration: int, total: int, milestones: Sequence[int], schedule: Schedule) -> float:
    """Rate of an iteration (from 0): that of the batch (`Schedule.rate`), with a linear warm-up from `warmup_ratio`,
    times the decay.

    `milestones` are iterations; "cosine" goes to 0 at `total`.
    """
    rate = schedule.rate
    if iteration < schedule.warmup:
        rate *= schedule.warmup_ratio + (1 - schedule.warmup_ratio) * iteration / schedule.warmup
    if schedule.decay == "multistep":
        rate *= schedule.gamma ** sum(iteration >= milestone for milestone in milestones)
    elif schedule.decay == "cosine":
        rate *= 0.5 * (1 + math.cos(math.pi * min(iteration / max(total, 1), 1.0)))
    return rate


@dataclass(frozen=True)
class Curve:
    """One curve of the rate over several stages: `schedule`'s, counted in epochs from the start of the first of them.

    Args:
        before: epochs of the stages before this one; only where there are none is there a warm-up.
        total: epochs of all of them.
    """

    schedule: Schedule
    before: float
    total: float

    def rate(self, epoch: float, iteration: int) -> float:
        """Rate at an epoch and iteration of this stage."""
        schedule, done = self.schedule, self.before + epoch
        rate = schedule.lr
        if not self.before and iteration < schedule.warmup:
            rate *= schedule.warmup_ratio + (1 - schedule.warmup_ratio) * iteration / schedule.warmup
        if schedule.decay == "multistep":
            rate *= schedule.gamma ** sum(done >= milestone for milestone in schedule.milestones)
        elif schedule.decay == "cosine":
            rate *= 0.5 * (1 + math.cos(math.pi * min(done / self.total, 1.0)))
        return rate
