"""Equalized focal loss (Li et al., CVPR'22) on C logits; background rows have the all-zero target.

    gamma_c = focal_gamma + scale_factor (1 - g_c)                          the focusing factor of class c
    element = (gamma_c / focal_gamma) alpha_t (1 - p_t)^gamma_c (-log p_t)  summed and divided by `normalizer`

g_c, kept in `pos_neg` (1 at first), is the ratio of the gradient that class c has received so far on its own rows to
that on all other rows, clamped to 0..1: a class that is mostly pushed down (a rare one) gets a larger focusing factor
and, in exchange, a larger weight. After every training batch |d loss / d logits| is added to `pos_grad` and `neg_grad`
[C], summed over processes. The gradient is that of the loss as returned, normaliser included; it is worked out together
with the loss, so neither a weight on the result nor a loss scale of mixed precision enters.

`normalizer` is max(1, foreground rows) unless given. In training under several processes that default is the number of
all of them divided by the number of processes, so that the gradients, averaged over processes, and the statistics are
those of one process on the joined batch. A given normaliser is used as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import PRIOR_BIAS, ClassificationLoss, at_least_float32
from tailfin.losses.fused import known_gradient, softplus
from tailfin.stats import ClassStats


class EFL(ClassificationLoss):
    """Equalized focal loss.

    Args:
        focal_gamma: focusing exponent of a class in balance, > 0; elements are weighted with gamma_c / focal_gamma.
        scale_factor: by how much the exponent grows for a class that gets no positive gradient, >= 0.
        focal_alpha: weight of targets, 1 - focal_alpha that of the others; < 0: no such weights.
    """

    row_facts: tuple[str, ...] = ("normalizer",)
    additive = True
    pos_grad: Tensor
    neg_grad: Tensor
    pos_neg: Tensor

    def __init__(
        self, stats: ClassStats, *, focal_gamma: float = 2.0, scale_factor: float = 8.0, focal_alpha: float = 0.25
    ) -> None:
        super().__init__(stats)
        if focal_gamma <= 0:
            raise ValueError(f"focal_gamma must be positive (given: {focal_gamma})")
        if scale_factor < 0:
            raise ValueError(f"scale_factor must not be negative (given: {scale_factor})")
        if focal_alpha > 1:
            raise ValueError(f"focal_alpha must be at most 1 (given: {focal_alpha})")
        self.num_logits = self.num_classes
        self.focal_gamma = focal_gamma
        self.scale_factor = scale_factor
        self.alphas = (focal_alpha, 1 - focal_alpha) if focal_alpha >= 0 else (1.0, 1.0)
        self.register_exact("pos_grad", torch.zeros(self.num_classes))
        self.register_exact("neg_grad", torch.zeros(self.num_classes))
        self.register_exact("pos_neg", torch.ones(self.num_classes))

    def loss(self, logits: Tensor, labels: Tensor, normalizer: float | Tensor | None = None) -> Tensor:
        return self.equalized(logits, labels, torch.ones_like(logits[:, 0]), normalizer)

    def equalized(
        self, logits: Tensor, labels: Tensor, quality: Tensor, normalizer: float | Tensor | None = None
    ) -> Tensor:
        """The loss with target `quality` [N] instead of 1 on the foreground rows; updates the statistics."""
        gamma = self.focal_gamma + self.scale_factor * (1 - self.pos_neg)
        total, grad, pos, neg = _focal_sum(
            logits, labels, gamma.to(logits.dtype), (gamma / self.focal_gamma).to(logits.dtype), quality, self.alphas
        )
        total = known_gradient(logits, total, grad)
        count = (labels < self.num_classes).sum().to(self.pos_grad.dtype)
        given = normalizer.detach() if isinstance(normalizer, Tensor) else normalizer
        if not self.training:
            return total / (count.clamp(min=1).to(logits.dtype) if given is None else given)

        pos, neg = pos.to(count.dtype), neg.to(count.dtype)
        if given is not None:
            pos, neg = pos / given, neg / given
        pos, neg, count, ranks = sum_over_ranks(pos, neg, count, torch.ones_like(count))
        if given is None:
            count = count.clamp(min=1)
            pos, neg, given = pos / count, neg / count, (count / ranks).to(logits.dtype)
        self.pos_grad += pos
        self.neg_grad += neg
        ratio = (self.pos_grad / (self.neg_grad + 1e-10)).clamp(0, 1)
        # a class without any gradient so far (nothing but empty batches) stays as it is
        self.pos_neg.copy_(torch.where(self.pos_grad + self.neg_grad > 0, ratio, self.pos_neg))
        return total / given

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)


@torch.no_grad()
def _focal_sum(
    logits: Tensor, labels: Tensor, gamma: Tensor, weight: Tensor, quality: Tensor, alphas: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sum of the elements, its gradient [N, C], and the sums of |gradient| on targets and on all others, [C] each."""
    # every element as if its target were 0: softplus(z) p^gamma; derivative p^gamma (p + gamma softplus(z) (1 - p))
    entropy = softplus(logits)
    factor = F.logsigmoid(logits).mul_(gamma).exp_()
    elements = entropy * factor
    grad = entropy.neg_().exp_().mul_(elements).mul_(gamma)  # softplus(z) is -log(1 - p)
    grad.addcmul_(logits.sigmoid(), factor).mul_(alphas[1] * weight)

    # the element with a target of its own, where a row has one; picked without asking which rows these are
    column = labels.clamp(max=len(gamma) - 1)
    place, own = column[:, None], labels < len(gamma)
    value, slope = _target_terms(logits.gather(1, place)[:, 0], gamma[column], quality.to(logits.dtype))
    slope = torch.where(own, slope * (alphas[0] * weight[column]), 0)
    elements.scatter_(1, place, torch.where(own[:, None], 0, elements.gather(1, place)))
    grad.scatter_(1, place, torch.where(own[:, None], 0, grad.gather(1, place)))
    neg = grad.sum(dim=0)  # none is negative
    grad.scatter_add_(1, place, slope[:, None])
    pos = torch.zeros_like(gamma).index_add_(0, column, slope.abs())
    total = (elements.sum(dim=0) * weight).sum() * alphas[1]
    total = total + torch.where(own, value * weight[column], 0).sum() * alphas[0]
    return total, grad, pos, neg


def _target_terms(logits: Tensor, gamma: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
    """BCE(z, q) |p - q|^gamma and its derivative, without cancellation at q = 0 and q = 1; all arguments [P]."""
    prob, rest = logits.sigmoid(), (-logits).sigmoid()
    entropy = quality * softplus(-logits) + (1 - quality) * softplus(logits)
    miss = torch.where(quality > 0.5, (1 - quality) - rest, prob - quality)  # p - q
    size = miss.abs().clamp(min=torch.finfo(logits.dtype).tiny)
    factor = size.pow(gamma)
    slope = factor * miss + entropy * gamma * size.pow(gamma - 1) * miss.sign() * prob * rest
    return entropy * factor, slope
