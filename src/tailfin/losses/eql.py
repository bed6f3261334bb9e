"""Equalization loss (Tan et al., CVPR'20): rare classes receive no negatives from other foreground classes.

Sigmoid on C logits; background rows have the all-zero target::

    loss = sum over rows and classes of w * BCE(z, t), divided by all rows
    w = 1 - E T (1 - t),  E = 1 on foreground rows,  T_c = 1 where f_c < lambda_

f_c = images of the class / images with annotations, compared strictly. Rare classes learn negatives from background
rows alone. No state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailfin.losses.base import DROP, PRIOR_BIAS, ClassificationLoss, at_least_float32, mean_over_rows
from tailfin.losses.fused import one_hot_bce
from tailfin.stats import ClassStats


class EQL(ClassificationLoss):
    """EQL on C logits; divided by the number of rows. `lambda_` is the image frequency below which a class is rare."""

    tail: Tensor

    def __init__(self, stats: ClassStats, *, lambda_: float = 1.77e-3) -> None:
        super().__init__(stats)
        self.num_logits = self.num_classes
        self.register_buffer("tail", below_frequency(stats, lambda_), persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        foreground = (labels < self.num_classes).to(logits.dtype)
        moved = torch.addcmul(logits.detach(), foreground[:, None], self.tail.to(logits.dtype), value=-DROP)
        return mean_over_rows(one_hot_bce(logits, labels, moved), len(labels))

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)


def below_frequency(stats: ClassStats, lambda_: float) -> Tensor:
    """[C] bool: classes on fewer than the fraction `lambda_` of the annotated images (a count of 0 acts as 1)."""
    if not 0 <= lambda_ <= 1:
        raise ValueError(f"lambda_ must be between 0 and 1 (given: {lambda_})")
    return image_frequency(stats) < lambda_


def image_frequency(stats: ClassStats) -> Tensor:
    """[C] float64: images of the class / images with annotations; a count of 0 acts as 1."""
    counts = torch.from_numpy(stats.image_count).double().clamp(min=1)
    return counts / max(stats.num_annotated_images, 1)
