"""Equalization loss v2 (Tan et al., CVPR'21): positive and negative gradients of every class balanced over the run.

Sigmoid classifier with an objectness column C, as in `objectness`. With g_j the ratio of accumulated positive to
negative gradients of class j::

    neg_w_j = sigmoid(gamma (g_j - mu)),  pos_w_j = 1 + alpha (1 - neg_w_j);  both 1 in the background column
    loss = sum over rows and columns of w * BCE(z, t), divided by all rows;  w = pos_w t + neg_w (1 - t)

After the loss |p - t| w of every element, weighted but not divided by the number of rows, is added to `pos_grad`
(t = 1) or `neg_grad` (t = 0) of its class, background rows included, without decay; g = pos_grad / (neg_grad + 1e-10),
100 at the start. As in the authors' code the sums go over all ranks (a later port leaves that out), in train mode only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import PRIOR_BIAS, ClassificationLoss, mean_over_rows
from tailfin.losses.fused import known_gradient, softplus
from tailfin.losses.objectness import objectness_scores
from tailfin.stats import ClassStats


class EQLv2(ClassificationLoss):
    """EQL v2 on C + 1 logits, background last; divided by the number of rows.

    Args:
        gamma, mu: slope and centre of the weight's sigmoid in the gradient ratio.
        alpha: the most that positives gain.

    State: `pos_grad`, `neg_grad`, `pos_neg` [C].
    """

    pos_grad: Tensor
    neg_grad: Tensor
    pos_neg: Tensor

    def __init__(self, stats: ClassStats, *, gamma: float = 12.0, mu: float = 0.8, alpha: float = 4.0) -> None:
        super().__init__(stats)
        if gamma < 0:
            raise ValueError(f"gamma must not be negative (given: {gamma})")
        if alpha < 0:
            raise ValueError(f"alpha must not be negative (given: {alpha})")
        self.num_logits = self.num_classes + 1
        self.gamma = float(gamma)
        self.mu = float(mu)
        self.alpha = float(alpha)
        zeros = torch.zeros(self.num_classes, dtype=torch.float64)
        self.register_exact("pos_grad", zeros)
        self.register_exact("neg_grad", zeros)
        self.register_exact("pos_neg", zeros + 100)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        total, positive, negative = one_hot_terms(logits, labels, *self.weights())
        if self.training:
            self.accumulate(positive, negative)
        return mean_over_rows(total, len(labels))

    def loss_of_targets(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss for soft targets [N, C + 1] in 0..1, constant, in the logits' dtype; accumulates as `loss` does."""
        pos_w, neg_w = self.weights()
        weight = torch.lerp(neg_w.to(logits.dtype), pos_w.to(logits.dtype), targets)
        total = (weight * (softplus(logits) - logits * targets)).sum()
        if self.training:
            distance = (logits.detach().sigmoid() - targets).abs() * weight
            positive = (distance * targets).sum(0, dtype=neg_w.dtype)
            self.accumulate(positive, distance.sum(0, dtype=neg_w.dtype) - positive)
        return mean_over_rows(total, len(targets))

    def scores(self, logits: Tensor) -> Tensor:
        return objectness_scores(logits)

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)

    def weights(self) -> tuple[Tensor, Tensor]:
        """[C + 1] weights of positives and of negatives, float64 as the state."""
        negative = torch.cat([(self.gamma * (self.pos_neg - self.mu)).sigmoid(), self.pos_neg.new_ones(1)])
        return 1 + self.alpha * (1 - negative), negative

    @torch.no_grad()
    def accumulate(self, positive: Tensor, negative: Tensor) -> None:
        """Add this step's sums of weighted gradients [C + 1] of all ranks."""
        positive, negative = sum_over_ranks(positive[:-1], negative[:-1])
        self.pos_grad += positive
        self.neg_grad += negative
        self.pos_neg.copy_(self.pos_grad / (self.neg_grad + 1e-10))


def one_hot_terms(logits: Tensor, labels: Tensor, pos_w: Tensor, neg_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of w BCE, and per column the sums of |p - t| w over positives and over negatives.

    The weights of negatives are constant in a column, so they meet the column sums, not the elements; the positives,
    one per row, are taken out of the columns first.
    """
    with torch.no_grad():
        column = labels[:, None]
        own = -logits.gather(1, column)  # BCE(z, 1) = softplus(-z), |p - 1| = sigmoid(-z)
        own_w = pos_w[labels, None].to(logits.dtype)
        column_w = neg_w.to(logits.dtype)
        value = (own_w * softplus(own)).sum() + softplus(logits).scatter_(1, column, 0).sum(0) @ column_w
        missing = own_w * own.sigmoid()
        probability = logits.sigmoid().scatter_(1, column, 0)
        positive = torch.zeros_like(neg_w).index_add_(0, labels, missing[:, 0].to(neg_w.dtype))
        negative = probability.sum(0, dtype=neg_w.dtype) * neg_w
        if not logits.requires_grad:
            return value, positive, negative
        gradient = probability.mul_(column_w).scatter_(1, column, -missing)
    return known_gradient(logits, value, gradient), positive, negative
