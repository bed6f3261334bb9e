"""Seesaw loss (Wang et al., CVPR'21): softmax whose negative gradients on rare classes are turned down.

Logits are C classes, then [foreground, background]. For a foreground row of class y, with n_j the rows of class j seen
so far and s = softmax over the C classes (detached):

    M_j = (n_j / n_y)^p where n_j < n_y, else 1                 mitigation: less punishment of rarer classes
    R_j = (s_j / max(s_y, eps))^q where that is > 1, else 1     compensation: more of it where j is mistaken for y
    classes    = sum over foreground rows of CE(z + log(M R), y) / N
    objectness = sum over all rows of CE([z_fg, z_bg], 0 foreground | 1 background) / N
    loss       = classes + objectness

N is the number of all rows, not of the foreground (as in the released code). Score of class j = s_j P(foreground).
The released detectors put it on a cosine classifier (temperature 20) for all C + 2 logits: `modules.cosine`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import ClassificationLoss, at_least_float32, mean_over_rows
from tailfin.stats import ClassStats


class Seesaw(ClassificationLoss):
    """Seesaw on C + 2 logits; divided by the number of rows.

    Args:
        p: exponent of the mitigation factor, >= 0 (0 switches it off).
        q: exponent of the compensation factor, >= 0 (0 switches it off).
        eps: smallest own probability that the compensation divides by, > 0.

    State: `cum_samples` [C + 1], rows per label since the start of the training (background last, unused). A training
    step counts its rows before it uses the counts. They are summed over ranks (the released code lets each rank count
    for itself), so that ranks share one mitigation factor.
    """

    cum_samples: Tensor

    def __init__(self, stats: ClassStats, *, p: float = 0.8, q: float = 2.0, eps: float = 1e-2) -> None:
        super().__init__(stats)
        for name, value in (("p", p), ("q", q)):
            if not (value >= 0 and math.isfinite(value)):
                raise ValueError(f"{name} must not be negative (given: {value})")
        if not 0 < eps <= 1:
            raise ValueError(f"eps must be above 0 and at most 1 (given: {eps})")
        self.num_logits = self.num_classes + 2
        self.p = p
        self.q = q
        self.eps = eps
        self.register_exact("cum_samples", torch.zeros(self.num_classes + 1))

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.training:
            self.count(labels)
        foreground = torch.where(labels < self.num_classes)[0]
        own = labels[foreground]
        reweighted = self.reweighted(logits[foreground, : self.num_classes], own)
        classes = mean_over_rows(F.cross_entropy(reweighted, own, reduction="sum"), len(labels))
        is_background = (labels == self.num_classes).long()
        objectness = F.cross_entropy(logits[:, self.num_classes :], is_background, reduction="sum")
        objectness = mean_over_rows(objectness, len(labels))
        self.parts = {"classes": classes.detach(), "objectness": objectness.detach()}
        return classes + objectness

    @torch.no_grad()
    def count(self, labels: Tensor) -> None:
        """Add the label histogram of this step, of all ranks, to `cum_samples`."""
        rows = torch.zeros_like(self.cum_samples)
        rows.scatter_add_(0, labels, torch.ones_like(labels, dtype=rows.dtype))
        (rows,) = sum_over_ranks(rows)
        self.cum_samples += rows

    def reweighted(self, class_logits: Tensor, labels: Tensor) -> Tensor:
        """[F, C] class logits of foreground rows with labels [F] to z + log(M R); no gradient through M and R."""
        with torch.no_grad():
            factor = class_logits.log_softmax(dim=1)
            own = factor.gather(1, labels[:, None]).clamp(min=math.log(self.eps))
            # 0 on the own class by itself: its log ratio is never positive
            factor.sub_(own).clamp_(min=0).mul_(self.q)
            seen = self.cum_samples[: self.num_classes].clamp(min=1).log().to(class_logits.dtype)
            factor.add_((seen - seen[labels][:, None]).clamp_(max=0), alpha=self.p)
        return class_logits + factor

    def scores(self, logits: Tensor) -> Tensor:
        logits = at_least_float32(logits)
        foreground = logits[:, self.num_classes :].softmax(dim=1)[:, :1]
        return logits[:, : self.num_classes].softmax(dim=1) * foreground
