"""Generalized AP ranking loss: the global term of ROG (Zhang et al., ICCV'23), without an object-level loss.

Every foreground row i should outrank, by its own class's logit P_i, all negatives of the batch: the entries (row,
class) of the C foreground columns that are nobody's label. With H(x) = clamp(x / (2 delta) + 1/2, 0, 1)

    FP_i = sum over negatives v of H(v - P_i),   rank_i = FP_i + sum over rows j of the same class of H(P_j - P_i)
    loss = mean over the classes present of the mean over their rows of FP_i / rank_i

The gradient is the error-driven one of AP ranking losses, not the derivative of that value (as in the official code):
with s_i = lam w_y / (rows of class y * classes present), it is -s_i FP_i / rank_i at P_i and the sum over i of
s_i H(v - P_i) / rank_i at a negative v. w_c ~ max(n_c, 1)^-gamma, scaled to sum C, from the labels seen so far; the
value itself is neither weighted nor scaled by lam.

The official code visits every foreground row and compares it with all negatives: O(F N C). FP is piecewise linear in
P_i, and the gradient piecewise linear in v, both with the 2 F corners P_i -+ delta. So one binary search places each of
the N C negatives between the corners (O(N C log F)); counts and sums per interval give every FP_i, two values per
interval every gradient. Memory: a few arrays of the logits' size, plus F^2 for the positives among themselves. With 256
of 1,024 rows foreground and 1,203 classes on one core it took about 3.5 times as long as the sigmoid cross-entropy, the
row-by-row form some 750 times (`benchmarks/loss_speed.py --only gap --row-by-row`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import PRIOR_BIAS, ClassificationLoss
from tailfin.losses.fused import known_gradient
from tailfin.stats import ClassStats

GRID = 2**15  # cells of the search grid
MAX_STEPS = 8  # comparisons per value beyond which a binary search is no slower


class GAP(ClassificationLoss):
    """The ranking term alone on C + 1 logits (column C takes no part); it defines no scores: train with `rog`.

    State: `num_samples` float64 [C + 1], labels seen in training, background last; counted before the loss and summed
    over ranks (the official code counts on each GPU for itself). The loss ranks the rows of this rank.
    Without foreground rows the loss is 0, attached to the graph.
    """

    alone = False
    num_samples: Tensor

    def __init__(self, stats: ClassStats, *, gamma: float = 1.0, delta: float = 0.5, lam: float = 0.1) -> None:
        super().__init__(stats)
        if gamma < 0:
            raise ValueError(f"gamma must not be negative (given: {gamma})")
        if not delta > 0:
            raise ValueError(f"delta must be positive (given: {delta})")
        if lam < 0:
            raise ValueError(f"lam must not be negative (given: {lam})")
        self.num_logits = self.num_classes + 1
        self.gamma, self.delta, self.lam = gamma, delta, lam
        self.register_exact("num_samples", torch.zeros(self.num_classes + 1))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """As documented for the class; `logits` may have any columns after the C of the classes."""
        if self.training:
            with torch.no_grad():
                seen = torch.bincount(labels, minlength=self.num_classes + 1).to(self.num_samples.dtype)
                self.num_samples += sum_over_ranks(seen)[0]
        foreground = torch.where(labels < self.num_classes)[0]
        if len(foreground) == 0:
            return logits[:0].sum()
        weights = self.num_samples[:-1].clamp(min=1).pow(-self.gamma)
        weights = weights * (self.num_classes / weights.sum())
        value, gradient = ranking_terms(logits.detach(), labels, foreground, weights, self.delta, self.lam)
        return known_gradient(logits, value, gradient)

    def scores(self, logits: Tensor) -> Tensor:
        raise TypeError("gap is a training term without scores: use the loss rog, which adds it to a base with scores")

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)


@torch.no_grad()
def ranking_terms(
    logits: Tensor, labels: Tensor, foreground: Tensor, weights: Tensor, delta: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Value and error-driven gradient, the latter of the logits' shape; `weights` [C] float64 (float32 on MPS)."""
    exact = weights.dtype
    own = labels[foreground]
    positives = logits[foreground, own]
    edges, order = torch.cat([positives - delta, positives + delta]).sort()
    # everything that is no negative sinks to the lowest corner, where H is 0
    negatives = logits.clone(memory_format=torch.contiguous_format)
    negatives[:, len(weights) :] = edges[0]
    negatives[foreground, own] = edges[0]
    values = negatives.view(-1)
    interval = _corners_below(values, edges)
    false_positives = _soft_counts(values, interval, edges, order, delta, exact)
    same = own[:, None] == own[None, :]
    above = ((positives[None, :] - positives[:, None]) / (2 * delta) + 0.5).clamp_(0, 1)
    rank = (above * same).sum(1, dtype=exact) + false_positives
    error = false_positives / rank
    class_rows = same.sum(1)
    share = 1 / (class_rows * (1 / class_rows.to(exact)).sum())  # 1 / (rows of the class * classes present)
    step = lam * weights[own] * share
    gradient = _ramps(values, interval, edges, order, step / rank, delta).view_as(negatives)
    gradient[foreground, own] = (-step * error).to(gradient.dtype)
    return (share * error).sum().to(logits.dtype), gradient


def _corners_below(values: Tensor, edges: Tensor) -> Tensor:
    """How many of the sorted `edges` lie below each value, int32, the shape of `values`.

    A binary search per value is slow on a CPU: its branches cannot be predicted. There an even grid over the edges,
    fine enough to have few of them in a cell, gives all but the last steps. Cell numbers ascend with the values, so an
    edge in a lower cell is below the value for certain; those of the value's own cell are compared one after another.
    """
    if values.device.type != "cpu":
        return torch.bucketize(values, edges, out_int32=True)
    low, high = edges[0], edges[-1]

    def cell_of(x: Tensor) -> Tensor:
        cell = ((x - low) * ((GRID - 1) / (high - low))).clamp_(0, GRID - 1).to(torch.int32)
        return cell.clamp_(min=0)  # NaN has no cell

    in_cell = torch.bincount(cell_of(edges), minlength=GRID)
    steps = int(in_cell.max())
    if steps > MAX_STEPS:  # edges crowd together
        return torch.bucketize(values, edges, out_int32=True)
    below = (in_cell.cumsum(0) - in_cell).to(torch.int32).index_select(0, cell_of(values))
    bounded = torch.cat([edges, edges.new_full((1,), torch.inf)])
    for _ in range(steps):
        below += bounded.index_select(0, below) < values
    return below


def _soft_counts(
    values: Tensor, interval: Tensor, edges: Tensor, order: Tensor, delta: float, exact: torch.dtype
) -> Tensor:
    """sum over `values` of H(value - t) for each of the F thresholds t, dtype `exact` [F].

    `edges` are the sorted corners t - delta and t + delta, `order` their places before sorting, `interval` how many
    corners lie below each value. With R(u) = sum of max(0, value - u), the sum is (R(t - delta) - R(t + delta)) /
    (2 delta).
    """
    corners = len(edges)
    number = torch.bincount(interval, minlength=corners + 1).to(exact)
    total = torch.bincount(interval, weights=values.to(exact), minlength=corners + 1)
    number_above, total_above = (part.flip(0).cumsum(0).flip(0)[1:] for part in (number, total))
    excess = torch.empty_like(total_above)
    excess[order] = total_above - edges * number_above
    lower, upper = excess.chunk(2)
    counts = (lower - upper).clamp(min=0) / (2 * delta)
    return counts + 0 * total.sum()  # a value that is not finite lies in no interval, but must not go unnoticed


def _ramps(values: Tensor, interval: Tensor, edges: Tensor, order: Tensor, weight: Tensor, delta: float) -> Tensor:
    """sum over the F thresholds t of weight_t H(value - t) for each value; arguments as for `_soft_counts`."""
    slope = torch.cat([weight, -weight])[order].cumsum(0) / (2 * delta)
    height = torch.zeros_like(slope)
    torch.cumsum(slope[:-1] * edges.diff(), 0, out=height[1:])
    # of the corner below each value; none below: 0
    corner, slope, height = (
        torch.cat([part.new_zeros(1), part]).to(values.dtype).index_select(0, interval)
        for part in (edges, slope, height)
    )
    return torch.sub(values, corner, out=corner).mul_(slope).add_(height)
