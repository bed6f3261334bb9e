"""Sigmoid focal loss (Lin et al., ICCV'17) on C logits; background rows have the all-zero target.

element = alpha_t (1 - p_t)^gamma BCE(z, t), summed and divided by `normalizer`, by default max(1, foreground rows).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailfin.losses.base import PRIOR_BIAS, ClassificationLoss, at_least_float32, own_column, per_object
from tailfin.losses.fused import known_gradient, softplus
from tailfin.stats import ClassStats


class Focal(ClassificationLoss):
    """Focal loss; `focal_alpha` < 0 switches the class balance off, `focal_gamma` >= 0 is the focusing exponent."""

    row_facts = ("normalizer",)
    additive = True

    def __init__(self, stats: ClassStats, *, focal_alpha: float = 0.25, focal_gamma: float = 2.0) -> None:
        super().__init__(stats)
        if focal_alpha > 1:
            raise ValueError(f"focal_alpha must be at most 1 (given: {focal_alpha})")
        if focal_gamma < 0:
            raise ValueError(f"focal_gamma must not be negative (given: {focal_gamma})")
        self.num_logits = self.num_classes
        self.focal_alpha = focal_alpha
        self.focal_gamma = focal_gamma

    def loss(self, logits: Tensor, labels: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        weights = (self.focal_alpha, 1 - self.focal_alpha) if self.focal_alpha >= 0 else (1.0, 1.0)
        with torch.no_grad():
            # every element as if its target were 0, then the one of a row's own label, where z counts as -z
            column, own = own_column(labels, self.num_classes)
            value, slope = _without_target(logits, self.focal_gamma)
            target, target_slope = _without_target(-logits.gather(1, column), self.focal_gamma)
            value, slope = value.mul_(weights[1]), slope.mul_(weights[1])
            value.scatter_(1, column, torch.where(own, weights[0] * target, value.gather(1, column)))
            slope.scatter_(1, column, torch.where(own, -weights[0] * target_slope, slope.gather(1, column)))
        return per_object(known_gradient(logits, value.sum(), slope), labels, self.num_classes, normalizer)

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)


def _without_target(logits: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """p^gamma softplus(z), the loss of an element with target 0, and its derivative in z."""
    probability, entropy = logits.sigmoid(), softplus(logits)
    factor = probability.square() if gamma == 2 else probability.pow(gamma)
    slope = factor * (probability + gamma * entropy * (1 - probability))
    return entropy.mul_(factor), slope
