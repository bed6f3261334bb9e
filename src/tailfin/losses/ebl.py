"""Equilibrium loss of LOCE (Feng et al., ICCV'21) on C + 1 softmax logits, background last.

    loss = mean over rows of CE(z + log m, label)

m [C + 1], kept in `mean_score`, is the mean classification score: a class that the detector scores low gets a smaller
margin against the others. It starts at `init_mean_score`. A training batch updates it before the loss: with k values of
a class (softmax of the raw logits at the class), m = alpha^k m + (1 - alpha^k) mean(values); the background's entry is
set to `bg_score`. One ground-truth box gives one value, the mean over its rows; the rows drawn from a feature memory
give one value per class. Values are collected over all processes; memory rows of a class count as one value over all of
them, so that many processes give what one gives on the joined batch (the released code takes one per process). A batch
without any value changes nothing (the released code stops there).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import ClassificationLoss, at_least_float32, mean_over_rows
from tailfin.stats import ClassStats


class EBL(ClassificationLoss):
    """Equilibrium loss, divided by the number of rows; scores are the plain softmax.

    Args:
        alpha: momentum of the mean score per value, in 0..1.
        bg_score: mean score of the background from the first update on, > 0.
        init_mean_score: mean score of every class at first, > 0.

    Call keywords: `gt_index` int64 [N], the ground-truth box that a row is matched to, counted over the whole batch
    (-1: none, the row gives no value); without it every foreground row counts as a box of its own. `memory` bool [N]:
    rows that come from a feature memory.
    """

    row_facts = ("gt_index", "memory")

    mean_score: Tensor

    def __init__(
        self, stats: ClassStats, *, alpha: float = 0.9, bg_score: float = 0.01, init_mean_score: float = 0.01
    ) -> None:
        super().__init__(stats)
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1 (given: {alpha})")
        for name, value in (("bg_score", bg_score), ("init_mean_score", init_mean_score)):
            if value <= 0:
                raise ValueError(f"{name} must be positive (given: {value})")
        self.num_logits = self.num_classes + 1
        self.alpha = alpha
        self.bg_score = bg_score
        self.register_exact("mean_score", torch.full((self.num_logits,), init_mean_score, dtype=torch.float64))

    def loss(
        self, logits: Tensor, labels: Tensor, gt_index: Tensor | None = None, memory: Tensor | None = None
    ) -> Tensor:
        if self.training:
            self._update(logits.detach(), labels, gt_index, memory)
        # a score may underflow to 0, where the logarithm would end the training
        margin = self.mean_score.clamp(min=torch.finfo(self.mean_score.dtype).tiny).log()
        total = F.cross_entropy(logits + margin.to(logits.dtype), labels, reduction="sum")
        return mean_over_rows(total, len(labels))

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits).softmax(dim=1)[:, :-1]

    @torch.no_grad()
    def _update(self, logits: Tensor, labels: Tensor, gt_index: Tensor | None, memory: Tensor | None) -> None:
        classes = self.num_classes
        row = torch.where(labels < classes)[0]
        own = labels[row]
        logits = logits[row]
        score = (logits.gather(1, own[:, None])[:, 0] - logits.logsumexp(dim=1)).exp().to(self.mean_score.dtype)
        box = row if gt_index is None else gt_index[row]
        stored = torch.zeros_like(own, dtype=torch.bool) if memory is None else memory[row].bool()
        matched = ~stored & (box >= 0)

        # rows of one box and class are one value: their mean; all rows without a box are a group that counts nothing
        key, group, rows_of_box = torch.unique(
            torch.where(matched, box * classes + own, -1), return_inverse=True, return_counts=True
        )
        known = (key >= 0).to(score.dtype)
        value = known * _sums(score, group, len(key)) / rows_of_box
        box_class = key.clamp(min=0) % classes
        remembered = stored.to(score.dtype)
        sums, counts, stored_sums, stored_rows = sum_over_ranks(
            _sums(value, box_class, classes),
            _sums(known, box_class, classes),
            _sums(remembered * score, own, classes),
            _sums(remembered, own, classes),
        )
        sums = sums + stored_sums / stored_rows.clamp(min=1)
        counts = counts + (stored_rows > 0)
        keep = self.alpha**counts
        foreground = keep * self.mean_score[:-1] + (1 - keep) * sums / counts.clamp(min=1)
        background = torch.where(counts.sum() > 0, self.bg_score, self.mean_score[-1:])
        self.mean_score.copy_(torch.cat([foreground, background]))


def _sums(values: Tensor, index: Tensor, length: int) -> Tensor:
    """[length] sums of `values` by `index`, in the same order on every run."""
    return values.new_zeros(length).index_put_((index,), values, accumulate=True)
