"""Varifocal loss (Zhang et al., CVPR'21, eq. 2) on C logits: the target of a row's own class is how well its box lies.

    own class:  q BCE(z, q)
    others:     varifocal_alpha p^focal_gamma BCE(z, 0)      summed and divided by `normalizer`

q is the row's `quality`, the IoU of its box with its object; the weights before BCE are constants for the gradient.
RT-DETR and D-FINE train with alpha 0.75 and gamma 2, the loss's own detector likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.losses.base import PERCENT_BIAS, ClassificationLoss, at_least_float32
from tailfin.losses.fused import softplus
from tailfin.losses.quality import over_objects, own_logits
from tailfin.stats import ClassStats


class Varifocal(ClassificationLoss):
    """Varifocal loss.

    Args:
        varifocal_alpha: weight of what is not a row's own class, >= 0.
        focal_gamma: exponent of its score, >= 0.
    """

    row_facts = ("quality", "normalizer")
    additive = True

    def __init__(self, stats: ClassStats, *, varifocal_alpha: float = 0.75, focal_gamma: float = 2.0) -> None:
        super().__init__(stats)
        if varifocal_alpha < 0:
            raise ValueError(f"varifocal_alpha must not be negative (given: {varifocal_alpha})")
        if focal_gamma < 0:
            raise ValueError(f"focal_gamma must not be negative (given: {focal_gamma})")
        self.num_logits = self.num_classes
        self.varifocal_alpha, self.focal_gamma = varifocal_alpha, focal_gamma

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        normalizer: float | Tensor | None = None,
        quality: Tensor | None = None,
    ) -> Tensor:
        """`quality` [N] in 0..1, by default 1; `normalizer`: by default the foreground rows, at least 1."""
        # the logarithm keeps the power finite where a score is 0
        weight = self.varifocal_alpha * (self.focal_gamma * F.logsigmoid(logits.detach())).exp()
        z, q = own_logits(logits, labels, quality)
        own = q * (q * softplus(-z) + (1 - q) * softplus(z))
        return over_objects(weight * softplus(logits), own, labels, normalizer)

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PERCENT_BIAS)
