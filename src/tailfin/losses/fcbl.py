"""Foreground classification balance loss of BACL (Qi et al., IEEE TMM 2023, section III-C and III-D).

Sigmoid classifier with an objectness column C, as in `objectness`; background rows have plain BCE. A foreground row of
class y has, beside its own column and the background column, for every other class j a margin and a weight:

    loss = sum over rows and columns of w * BCE(z + margin, t), divided by all rows                          (eq. 6)
    margin[y, j] = alpha * log(l_j / l_i), l_j / l_i = M[y, j] / M[j, y] or l[j] / l[y]                      (eq. 7, 8)
    w_j = 1 where q_j >= q_y or q_j >= prob_thr, else 0;  q_j = p_j (1 - p_background) from the raw logits   (eq. 9)

l is the long-term indicator of Table II: a statistic of how strong the classifier or the data makes each class.

    indicator     l                                                     smallest value in the margin
    confusion     M[i, j]: mean over rows of class i of softmax_j(z)    1e-3 (the released code's)
    image         images of the class / images                          counts of 0 act as 1
    instance      instances of the class / instances                    counts of 0 act as 1
    cumulative    rows of the class so far                              1
    score         running mean of sigmoid(z_y) over rows of the class   1e-3
    tpr           fraction of its rows with the largest logit there     1e-3

`matrix="hard"` counts the largest logit instead of the softmax in M (eq. 14). Softmax and largest logit are taken over
the C foreground columns. M and the rate run over the whole training without decay; the score moves once per iteration
in which its class occurs, by 1 - score_momentum towards the iteration's mean, and starts at 0.01 (LOCE, which the paper
follows there).

As in the released code the statistics are updated after the loss, so that the margin knows only earlier iterations;
the paper's Algorithm 1 has the other order (`update="before"`). They change in train mode only and are summed over
ranks in every iteration (the released code skips a rank without foreground, and then waits for it).
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from tailfin.collectives import sum_over_ranks
from tailfin.errors import nearest
from tailfin.losses.base import DROP, PRIOR_BIAS, ClassificationLoss, counts_of, mean_over_rows, places_in
from tailfin.losses.fused import one_hot_bce
from tailfin.losses.objectness import objectness_scores
from tailfin.stats import ClassStats

Indicator = Literal["confusion", "image", "instance", "cumulative", "score", "tpr"]
Conditions = Literal["both", "misclassified", "overconfident"]
Matrix = Literal["soft", "hard"]
Update = Literal["after", "before"]

FLOOR = 1e-3  # smallest value of a rate in the margin
FIRST_SCORE = 0.01
SATURATED = 53 * math.log(2)  # from here on sigmoid(z) is 1 in double precision


class FCBL(ClassificationLoss):
    """FCBL on C + 1 logits, background last; divided by the number of rows (hallucinated ones count).

    Args:
        alpha: strength of the margin; 0 switches it off (the indicator goes on, see `indicator_diagonal`).
        prob_thr: probability from which another class counts as overconfident.
        reweight: the weight of eq. 9; without it every weight is 1.
        conditions: which of eq. 9's two conditions give the weight 1 (Table IX).
        indicator, matrix: the long-term indicator (Fig. 4), and the formula of the confusion matrix (Table VIII).
        score_momentum: gamma of the score.
        update: the released code's order or Algorithm 1's.

    State: `cm_numerator` [C, C] (rows are the truth) and `num_gt` [C], M = cm_numerator / max(num_gt, 1); `num_hit`,
    `mean_score` [C] for the other indicators. Only those that the indicator needs exist.
    """

    num_gt: Tensor
    cm_numerator: Tensor
    num_hit: Tensor
    mean_score: Tensor
    frequency: Tensor

    def __init__(
        self,
        stats: ClassStats,
        *,
        alpha: float = 0.85,
        prob_thr: float = 0.7,
        reweight: bool = True,
        conditions: Conditions = "both",
        indicator: Indicator = "confusion",
        matrix: Matrix = "soft",
        score_momentum: float = 0.9,
        update: Update = "after",
    ) -> None:
        super().__init__(stats)
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha must not be negative (given: {alpha})")
        if not 0 <= prob_thr <= 1:
            raise ValueError(f"prob_thr must be between 0 and 1 (given: {prob_thr})")
        if reweight not in (False, True):
            raise ValueError(f"reweight must be true or false (given: {reweight!r})")
        if not 0 <= score_momentum < 1:
            raise ValueError(f"score_momentum must be at least 0 and below 1 (given: {score_momentum})")
        for name, value, choices in (
            ("conditions", conditions, get_args(Conditions)),
            ("indicator", indicator, get_args(Indicator)),
            ("matrix", matrix, get_args(Matrix)),
            ("update", update, get_args(Update)),
        ):
            if value not in choices:
                raise ValueError(f'there is no {name} "{value}"{nearest(value, choices)}')
        self.num_logits = self.num_classes + 1
        self.alpha = float(alpha)
        self.prob_thr = float(prob_thr)
        self.reweight = bool(reweight)
        self.conditions = conditions
        self.indicator = indicator
        self.matrix = matrix
        self.score_momentum = float(score_momentum)
        self.update = update
        zeros = torch.zeros(self.num_classes, dtype=torch.float64)
        if indicator in ("confusion", "cumulative", "tpr"):
            self.register_exact("num_gt", zeros)
        if indicator == "confusion":
            self.register_exact("cm_numerator", torch.zeros(2 * (self.num_classes,), dtype=torch.float64))
        elif indicator == "tpr":
            self.register_exact("num_hit", zeros)
        elif indicator == "score":
            self.register_exact("mean_score", zeros + FIRST_SCORE)
        elif indicator in ("image", "instance"):
            images = indicator == "image"
            counts = torch.from_numpy(stats.image_count if images else stats.instance_count).double().clamp(min=1)
            total = max(stats.num_images, 1) if images else counts.sum()
            self.register_exact("frequency", counts / total, persistent=False)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        raw = logits.detach()
        if self.training and self.update == "before":
            self.update_indicator(raw, labels)
        moved = raw.clone()
        if self.reweight:
            moved.sub_(self.dropped(raw, labels), alpha=DROP)
        if self.alpha:
            moved[:, :-1] += self.margins(labels, raw.dtype)
        total = one_hot_bce(logits, labels, moved)
        if self.training and self.update == "after":
            self.update_indicator(raw, labels)
        return mean_over_rows(total, len(labels))

    def scores(self, logits: Tensor) -> Tensor:
        return objectness_scores(logits)

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PRIOR_BIAS)

    def indicator_diagonal(self) -> Tensor:
        """[C] l_i of eq. 12 in 0..1, float64: M[i, i], or the one-dimensional indicator; counts enter as shares."""
        if self.indicator == "confusion":
            return self.cm_numerator.diagonal() / self.num_gt.clamp(min=1)
        if self.indicator == "cumulative":
            return self.num_gt / self.num_gt.sum().clamp(min=1)
        return self.level().clone()

    # ---- eq. 7 to 9 ------------------------------------------------------------------------------------------------

    def margins(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """[N, C] margins of the foreground columns; 0 on the own class and on background rows."""
        seen, place = classes_of(labels, self.num_classes)
        margin = torch.zeros((len(seen) + 1, self.num_classes), dtype=dtype, device=labels.device)  # last: background
        if self.indicator == "confusion":
            count = self.num_gt.clamp(min=1).to(dtype)
            rate = self.cm_numerator.index_select(0, seen).to(dtype).div_(count[seen, None]).clamp_(min=FLOOR)
            reverse = self.cm_numerator.gather(1, seen.expand(self.num_classes, -1)).to(dtype)
            reverse = reverse.t().contiguous().div_(count).clamp_(min=FLOOR)
            torch.div(rate, reverse, out=margin[:-1]).log_().mul_(self.alpha)
        else:
            level = self.level()
            if self.indicator in ("score", "tpr"):
                level = level.clamp(min=FLOOR)
            elif self.indicator == "cumulative":
                level = level.clamp(min=1)
            strength = (self.alpha * level.log()).to(dtype)
            torch.sub(strength, strength[seen, None], out=margin[:-1])
        return margin.index_select(0, place)

    def level(self) -> Tensor:
        """[C] the one-dimensional indicators of Table II."""
        if self.indicator == "cumulative":
            return self.num_gt
        if self.indicator == "tpr":
            return self.num_hit / self.num_gt.clamp(min=1)
        return self.mean_score if self.indicator == "score" else self.frequency

    def dropped(self, logits: Tensor, labels: Tensor) -> Tensor:
        """[N, C + 1] in the logits' dtype: 1 where eq. 9 gives the weight 0, else 0.

        Background rows and the background column are never dropped; the own class, which eq. 9 leaves alone, is kept by
        `one_hot_bce`. q_j >= q_y and q_j >= prob_thr are one comparison with the row's smaller bound in logits. Two
        probabilities that are 1 in double precision, and two q that are 0 because 1 - p_background is 0 there, count as
        equal: the released code compares so, and float32 logits here give the same answer.
        """
        background = logits[:, -1]
        bound = torch.full_like(background, math.inf)
        if self.conditions != "overconfident":
            own = logits.gather(1, labels[:, None])[:, 0]
            bound = own.clamp(max=SATURATED).masked_fill(background >= SATURATED, -math.inf)
        if self.conditions != "misclassified":
            objectness = (-background).sigmoid().clamp(min=torch.finfo(logits.dtype).tiny)
            needed = (self.prob_thr / objectness).clamp(max=1)
            bound = torch.minimum(bound, needed.logit())  # logit(1) = inf: out of reach
        bound = bound.masked_fill(labels == self.num_classes, -math.inf)
        dropped = torch.lt(logits, bound[:, None], out=torch.empty_like(logits))
        dropped[:, -1] = 0
        return dropped

    # ---- statistics ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def update_indicator(self, logits: Tensor, labels: Tensor) -> None:
        """Add the foreground rows of all ranks; raw logits [N, C + 1]."""
        if self.indicator in ("image", "instance"):
            return
        exact = next(self.buffers()).dtype
        rows = torch.where(labels < self.num_classes)[0]
        classes = labels[rows]
        count = counts_of(classes, self.num_classes, exact)
        if self.indicator == "confusion":
            (count,) = sum_over_ranks(count)
            self.num_gt += count
            seen = count.nonzero()[:, 0]  # the same on every rank: the rows of M that change
            place = places_in(seen, self.num_classes)
            added = self.cm_numerator.new_zeros((len(seen), self.num_classes))
            foreground = logits[:, :-1].index_select(0, rows)
            if self.matrix == "soft":
                added.index_add_(0, place[classes], foreground.softmax(dim=1).to(exact))
            else:
                added.index_put_((place[classes], foreground.argmax(dim=1)), added.new_ones(()), accumulate=True)
            (added,) = sum_over_ranks(added)
            self.cm_numerator.index_add_(0, seen, added)
        elif self.indicator == "cumulative":
            (count,) = sum_over_ranks(count)
            self.num_gt += count
        elif self.indicator == "score":
            total = torch.zeros_like(count).index_add_(0, classes, logits[rows, classes].sigmoid().to(exact))
            total, count = sum_over_ranks(total, count)
            moved = self.mean_score.lerp(total / count.clamp(min=1), 1 - self.score_momentum)
            self.mean_score.copy_(torch.where(count > 0, moved, self.mean_score))
        else:
            hit = classes[logits[:, :-1].index_select(0, rows).argmax(dim=1) == classes]
            hits, count = sum_over_ranks(counts_of(hit, self.num_classes, exact), count)
            self.num_hit += hits
            self.num_gt += count


def classes_of(labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Foreground classes among the labels, ascending [S], and each label's place among them [N] (background: S)."""
    present = torch.zeros(num_classes + 1, dtype=torch.bool, device=labels.device).index_fill_(0, labels, True)
    seen = present[:-1].nonzero()[:, 0]
    place = torch.full((num_classes + 1,), len(seen), dtype=torch.int64, device=labels.device)
    place[seen] = torch.arange(len(seen), device=labels.device)
    return seen, place[labels]
