"""Balanced group softmax, BAGS (Li et al., CVPR'20): softmax among classes of similar instance count.

Classes fall into B bins by their training instances: with `bin_edges` (10, 100, 1000), below 10, 10-99, 100-999, from
1000 on. Each bin has its own softmax over its classes and an "others" class. The C + 2 + B logits lie as

    [background, foreground | others, classes of bin 1 | others, classes of bin 2 | ...]     classes in label order

    loss = sum over bin 0 (background or foreground) and the B bins of  sum_i w_i CE_i / max(sum_i w_i, 1)

w is 1 for all rows of bin 0. In another bin it is 1 for the rows of its classes and for a random choice of the rows
that are "others" there (other bins' classes and background): floor(others_sample_ratio x own rows) of them, or all if
there are fewer. A bin without own rows adds 0. Score of class j = its probability in its bin's softmax, "others"
included, times P(foreground). Layout, bins and divisors are those of the authors' code. Stateless.

A rare bin has rows in few of the means over two pictures that the released code takes, one on each of 8 processes. So
the loss is the mean of the losses of every two pictures, where the detector says which rows are whose; with
`per="process"` it is that of all rows of a call together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.losses.base import PICTURES, ClassificationLoss, at_least_float32, counts_of
from tailfin.stats import ClassStats


class BAGS(ClassificationLoss):
    """Balanced group softmax on C + 2 + B logits; each bin divided by its number of chosen rows.

    Args:
        others_sample_ratio: "others" rows per own row of a bin, >= 0.
        bin_edges: B - 1 ascending instance counts; a class with exactly an edge's count belongs to the upper bin.
        per: "batch", two pictures at a time, or "process".

    Keywords of the call:
        draws: [B + 1, N] weights w of the bins' rows instead of random ones; rows are counted without the ignored ones.
        generator: where the random choice comes from otherwise; torch's own by default.
        picture: int64 [N], the picture of each row; without it all are of one.
        pictures: how many there are; read from `picture` where it is not given.

    `slices` are (start, length) of the bins' logits, bin 0 first.
    """

    row_facts = ("picture", "pictures")
    classes_first = False  # a class has its logit in its bin
    bin_label: Tensor
    column: Tensor

    def __init__(
        self,
        stats: ClassStats,
        *,
        others_sample_ratio: float = 8.0,
        bin_edges: Sequence[float] = (10, 100, 1000),
        per: str = "batch",
    ) -> None:
        super().__init__(stats)
        if per not in ("batch", "process"):
            raise ValueError(f'per must be "batch" or "process" (given: "{per}")')
        self.per = per
        if not (others_sample_ratio >= 0 and math.isfinite(others_sample_ratio)):
            raise ValueError(f"others_sample_ratio must not be negative (given: {others_sample_ratio})")
        edges = np.asarray(bin_edges, dtype=np.float64)
        if edges.ndim != 1 or not (np.diff(edges, prepend=0) > 0).all() or not np.isfinite(edges).all():
            raise ValueError(f"bin_edges must be ascending counts above 0 (given: {list(bin_edges)})")
        self.others_sample_ratio = others_sample_ratio
        self.bin_edges = tuple(edges.tolist())
        self.num_logits = self.num_classes + 2 + len(edges) + 1
        bin_label, column, self.slices = _layout(np.maximum(stats.instance_count, 1), edges)
        self.register_buffer("bin_label", torch.from_numpy(bin_label), persistent=False)
        self.register_buffer("column", torch.from_numpy(column), persistent=False)

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        draws: Any = None,
        generator: torch.Generator | None = None,
        picture: Tensor | None = None,
        pictures: int | None = None,
    ) -> Tensor:
        targets = self.bin_label[:, labels]  # [B + 1, N] label inside each bin
        group, groups = torch.zeros_like(labels), 1
        if picture is not None and self.per == "batch" and len(labels):
            group = picture // PICTURES
            groups = int(group.max()) + 1 if pictures is None else -(-pictures // PICTURES)
        if draws is None:
            chosen = self.choose_rows(targets, generator, group, groups)
        else:
            chosen = torch.as_tensor(draws, device=logits.device)
            if chosen.shape != targets.shape:
                raise ValueError(f"draws must be {list(targets.shape)}, these are {list(chosen.shape)}")
        weight = chosen.to(logits.dtype)
        rows = torch.stack(
            [
                F.cross_entropy(logits[:, start : start + length], target, reduction="none")
                for (start, length), target in zip(self.slices, targets, strict=True)
            ]
        )
        sums = logits.new_zeros((2, len(rows), groups)).index_add(2, group, torch.stack([rows * weight, weight]))
        losses = (sums[0] / sums[1].clamp(min=1)).mean(dim=1)
        self.parts = {f"bin{number}": value for number, value in enumerate(losses.detach())}
        return losses.sum()

    @torch.no_grad()
    def choose_rows(
        self,
        targets: Tensor,
        generator: torch.Generator | None = None,
        group: Tensor | None = None,
        groups: int = 1,
    ) -> Tensor:
        """bool [B + 1, N], rows that count in each bin, from the labels [B + 1, N] inside the bins; `group` int64 [N]
        are the rows among which they are chosen, by default all."""
        own = targets > 0
        own[0] = True
        device = targets.device if generator is None else generator.device
        keys = torch.rand(targets.shape, generator=generator, device=device).to(targets.device)
        keys = keys.masked_fill(own, 2.0)  # "others" rows come first
        if group is None:
            group = targets.new_zeros(targets.shape[1])
        counts = counts_of(group, groups, torch.int64)
        ranks = (keys + 4 * group).argsort(dim=1).argsort(dim=1) - (counts.cumsum(0) - counts)[group]
        number = torch.zeros((len(own), len(counts)), device=keys.device).index_add_(1, group, own.to(keys.dtype))
        return own | (ranks + 1 <= self.others_sample_ratio * number[:, group])

    def scores(self, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        inside = torch.cat([logits[:, start : start + length].softmax(dim=1) for start, length in self.slices], dim=1)
        return inside[:, self.column] * inside[:, 1:2]


def _layout(count: np.ndarray, edges: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int]]]:
    """Label in each bin [B + 1, C + 1] (0: background in bin 0, others elsewhere), logit column [C], bins' slices."""
    classes = np.arange(len(count))
    bin_of = np.searchsorted(edges, count, side="right")
    bins = len(edges) + 1
    size = np.bincount(bin_of, minlength=bins) + 1
    start = 2 + np.cumsum(size) - size
    order = np.argsort(bin_of, kind="stable")
    inside = np.empty(len(count), dtype=np.int64)
    inside[order] = classes - (start - 2 - np.arange(bins))[bin_of[order]] + 1
    labels = np.zeros((bins + 1, len(count) + 1), dtype=np.int64)
    labels[0, :-1] = 1
    labels[bin_of + 1, classes] = inside
    slices = [(0, 2), *zip(start.tolist(), size.tolist(), strict=True)]
    return labels, start[bin_of] + inside, slices
