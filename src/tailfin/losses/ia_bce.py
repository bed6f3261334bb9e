"""IoU-aware binary cross-entropy (Cai et al., Align-DETR, 2023) on C logits, as LW-DETR and RF-DETR train with.

    t = max(p^quality_alpha q^(1 - quality_alpha), 0.01)
    own class:  t BCE(z, 1) + (1 - t) BCE(z, 0)
    others:     p^focal_gamma BCE(z, 0)                       summed and divided by `normalizer`

q is the row's `quality`, the IoU of its box with its object; t is a constant for the gradient, p^gamma is not.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.losses.base import PERCENT_BIAS, ClassificationLoss, at_least_float32
from tailfin.losses.fused import softplus
from tailfin.losses.quality import over_objects, own_logits
from tailfin.stats import ClassStats

LEAST = 0.01  # of a target


class IABCE(ClassificationLoss):
    """IoU-aware BCE.

    Args:
        quality_alpha: share of the score in the target, the rest is that of the IoU, in 0..1.
        focal_gamma: exponent of the score of what is not a row's own class, >= 0.
    """

    row_facts = ("quality", "normalizer")
    additive = True

    def __init__(self, stats: ClassStats, *, quality_alpha: float = 0.25, focal_gamma: float = 2.0) -> None:
        super().__init__(stats)
        if not 0 <= quality_alpha <= 1:
            raise ValueError(f"quality_alpha must be in 0..1 (given: {quality_alpha})")
        if focal_gamma < 0:
            raise ValueError(f"focal_gamma must not be negative (given: {focal_gamma})")
        self.num_logits = self.num_classes
        self.quality_alpha, self.focal_gamma = quality_alpha, focal_gamma

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        normalizer: float | Tensor | None = None,
        quality: Tensor | None = None,
    ) -> Tensor:
        """`quality` [N] in 0..1, by default 1; `normalizer`: by default the foreground rows, at least 1."""
        others = (self.focal_gamma * F.logsigmoid(logits)).exp() * softplus(logits)
        z, q = own_logits(logits, labels, quality)
        t = z.detach().sigmoid().pow(self.quality_alpha) * q.pow(1 - self.quality_alpha)
        t = t.clamp(min=LEAST)
        return over_objects(others, t * softplus(-z) + (1 - t) * softplus(z), labels, normalizer)

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PERCENT_BIAS)
