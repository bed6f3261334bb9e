"""Adaptive Class Suppression Loss, ACSL (Wang et al., CVPR'21): binary terms only where the classifier is confused.

C + 1 sigmoid columns, background last; p = sigmoid(z). The weight w of an element is 0 or 1:

    foreground row   1 on the own class and on every column (background too) with p >= score_thr
    background row   1 on the background column, on frequent classes, and on common and rare classes in a random tenth
                     and hundredth of the background rows: floor(n / 10) and floor(n / 100) of n
    loss = sum of w BCE(z, t) / N, N the number of rows

The shares are those that the released code uses (its comments speak of two thirds and one third), and p >= score_thr
plays no part in background rows there. Groups are the statistics' `frequency`; a class without training images counts
as rare. Stateless. Scores are sigmoids of the class columns; the background column is not used at test time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailfin.losses.base import DROP, PERCENT_BIAS, ClassificationLoss, at_least_float32, mean_over_rows
from tailfin.losses.fused import one_hot_bce
from tailfin.stats import ClassStats

RARE_SHARE, COMMON_SHARE = 100, 10  # one in so many background rows
RARE, COMMON = 1, 2  # bits of a background row's pattern: the groups that are active in it
FOREGROUND = 4  # the pattern of foreground rows


class ACSL(ClassificationLoss):
    """ACSL on C + 1 logits, background last; divided by the number of rows.

    Args:
        score_thr: probability from which another class's column counts as confused, in 0..1.

    Keywords of the call:
        draws: the background rows for rare and for common classes instead of random ones: a sequence (rare, common) or
            a mapping with these keys (`bg_rows_for_rare`, ... too), each row numbers or bool [N]. Further entries are
            not used. Rows are counted without the ignored ones.
        generator: where the random rows come from otherwise; torch's own by default.
    """

    pattern_inactive: Tensor

    def __init__(self, stats: ClassStats, *, score_thr: float = 0.7) -> None:
        super().__init__(stats)
        if not 0 <= score_thr <= 1:
            raise ValueError(f"score_thr must be in 0..1 (given: {score_thr})")
        self.num_logits = self.num_classes + 1
        self.score_thr = score_thr
        self.logit_thr = torch.tensor(score_thr, dtype=torch.float64).logit().item()
        frequency = np.array([*stats.frequency, "background"])
        rare, common = np.isin(frequency, ("r", "")), frequency == "c"
        no, yes = np.zeros_like(rare), np.ones_like(rare)
        inactive = np.stack((rare | common, common, rare, no, yes))  # without the own column, which always counts
        self.register_buffer("pattern_inactive", torch.from_numpy(inactive), persistent=False)  # bool [5, C + 1]

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        draws: Sequence[Any] | Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        with torch.no_grad():
            background = labels == self.num_classes
            patterns = torch.where(background, _random_patterns(background, draws, generator), FOREGROUND)
            inactive = self.pattern_inactive.to(logits.dtype)[patterns]
            # p >= score_thr asked of the logits; nothing reaches the threshold of a background row
            threshold = torch.where(background, math.inf, self.logit_thr).to(logits.dtype)
            inactive -= (logits >= threshold[:, None]).to(logits.dtype)
            moved = inactive.mul_(-DROP).add_(logits)
        return mean_over_rows(one_hot_bce(logits, labels, moved), len(labels))

    def scores(self, logits: Tensor) -> Tensor:
        return at_least_float32(logits[:, :-1]).sigmoid()

    def prior_bias(self) -> Tensor:
        return torch.full((self.num_logits,), PERCENT_BIAS)


def _random_patterns(
    background: Tensor, draws: Sequence[Any] | Mapping[str, Any] | None, generator: torch.Generator | None
) -> Tensor:
    """int64 [N]: RARE and COMMON bits of the rows in which these groups are active."""
    if draws is None:
        rare, common = _random_rows(background, generator)
    else:
        if isinstance(draws, Mapping):
            by_group = {key.removeprefix("bg_rows_for_"): rows for key, rows in draws.items()}
            draws = [by_group["rare"], by_group["common"]]
        rare, common = _row_mask(draws[0], background), _row_mask(draws[1], background)
    return RARE * rare + COMMON * common


def _row_mask(rows: Any, background: Tensor) -> Tensor:
    """bool [N] from row numbers or a bool mask."""
    rows = torch.as_tensor(rows, device=background.device)
    mask = torch.zeros_like(background)
    mask[rows if rows.dtype == torch.bool else rows.long()] = True
    return mask


def _random_rows(background: Tensor, generator: torch.Generator | None) -> Tensor:
    """bool [2, N]: two independent choices, a hundredth and a tenth of the background rows."""
    device = background.device if generator is None else generator.device
    keys = torch.rand((2, len(background)), generator=generator, device=device).to(background.device)
    ranks = keys.masked_fill(~background, 2.0).argsort(dim=1).argsort(dim=1)  # background rows come first
    rows = background.sum()
    return ranks < torch.stack((rows // RARE_SHARE, rows // COMMON_SHARE))[:, None]
