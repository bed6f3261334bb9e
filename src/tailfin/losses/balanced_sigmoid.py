"""Balanced sigmoid loss of BALMS for detection (Ren et al., NeurIPS'20): the class prior inside the training logits.

Sigmoid on C logits; background rows have the all-zero target. On foreground rows every logit, own class or not, is
moved by its class's prior; background rows and test time use the plain logits::

    z'_j = z_j - log((1 - f_j) / f_j),  f_j = images of the class / images with annotations
    loss = sum over rows and classes of BCE(z', t), divided by all rows

The authors' code leaves out the paper's constant 1 / (k - 1), and so does this. No state. The second half of BALMS,
class weights learned on a balanced stream, is `tailfin.models.features.meta_reweighting`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailfin.losses.base import PRIOR_BIAS, ClassificationLoss, at_least_float32, mean_over_rows
from tailfin.losses.fused import one_hot_bce
from tailfin.stats import ClassStats


class BalancedSigmoid(ClassificationLoss):
    """Balanced sigmoid on C logits; divided by the number of rows."""

    log_odds: Tensor

    def __init__(self, stats: ClassStats) -> None:
        super().__init__(stats)
        self.num_logits = self.num_classes
        counts = torch.from_numpy(stats.image_count).double().clamp(min=1)
        # a class on every image would have infinite odds: like a count of 0, an absence of 0 acts as 1
        absent = (max(stats.num_annotated_images, 1) - counts).clamp(min=1)
        self.register_exact("log_odds", (counts / absent).log(), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return mean_over_rows(one_hot_bce(self.balanced(logits, labels), labels), len(labels))

    def balanced(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[N, C] logits with the prior added on foreground rows."""
        foreground = (labels < self.num_classes).to(logits.dtype)
        return torch.addcmul(logits, foreground[:, None], self.log_odds.to(logits.dtype))

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)
