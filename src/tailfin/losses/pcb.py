"""Pairwise class balance (He et al., CVPR'22): targets are softened towards the classes that are mistaken for a class.

A running confusion matrix M [C, C] (row: ground truth) averages what the classifier predicts for each class:

    M_c <- momentum M_c + (1 - momentum) mean over the batch's rows of class c of softmax(z over the C classes)
    M_c <- M_c / sum M_c                                            for the classes of this step, before the loss

For a foreground row of class y, p_k = M_ky / sum_k M_ky, the column of M, says which classes are predicted as y. With
a = alpha iter_id / (n_iter - 1), the step of the iterative head (`models.heads.pcb`; plain heads: its last), and N rows

    base "softmax"   (CE(background) + (1 - a) CE(foreground) + a KL([p, 0] || softmax(z))) / N
    base "seesaw"    objectness + ((1 - a) CE(z', y) + a CE(z', p)) / N on the foreground, z' Seesaw's reweighted logits
    base "eqlv2"     EQL v2 with the target (1 - a) t + a M_.y on foreground rows; M takes sigmoids and neither its rows
                     nor its columns are normalised

It is active from `start_epoch` on, once every class has been seen; until then the loss is the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tailfin.collectives import several_ranks, sum_over_ranks
from tailfin.errors import nearest
from tailfin.losses.base import ClassificationLoss, counts_of, mean_over_rows, one_hot, places_in
from tailfin.losses.eqlv2 import EQLv2
from tailfin.losses.seesaw import Seesaw
from tailfin.losses.softmax import Softmax
from tailfin.stats import ClassStats

BASES: dict[str, tuple[type[ClassificationLoss], float]] = {  # class and default of alpha
    "softmax": (Softmax, 0.4),
    "seesaw": (Seesaw, 0.05),
    "eqlv2": (EQLv2, 0.1),
}


class PCB(ClassificationLoss):
    """PCB on one of three base losses, whose logits, scores and prior bias it has; divided by the number of rows.

    Args:
        base: "softmax", "seesaw" or "eqlv2".
        alpha: weight of the soft target at the last step, 0..1; none: 0.4, 0.05, 0.1 by base.
        momentum: of the confusion matrix, in [0, 1).
        n_iter: steps of the iterative head, >= 2.
        start_epoch: first epoch, counted from 0, in which the soft targets are used.
        base_options: options of the base loss.

    Keywords of a call: `iter_id`, the step 0..n_iter - 1 that the logits come from (default: the last); `epoch`, the
    epoch the training is in (default: the one told last, here or to `at_epoch`; 0 at first; kept in the state).

    State: `fg_confusion_matrix` float64 [C, C]; `num_inst_cnt` float64 [C], foreground rows seen per class; both over
    all ranks. `_epoch` [1]; the base's own under `base`. Unlike in the released code, a class without training
    instances is not waited for: it would keep the method off for ever.
    """

    row_facts = ("iter_id",)
    fg_confusion_matrix: Tensor
    num_inst_cnt: Tensor
    _epoch: Tensor
    without_training: Tensor

    def __init__(
        self,
        stats: ClassStats,
        *,
        base: str = "softmax",
        alpha: float | None = None,
        momentum: float = 0.99,
        n_iter: int = 3,
        start_epoch: float = 17,
        base_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(stats)
        if base not in BASES:
            raise ValueError(f'there is no base "{base}"{nearest(base, BASES)}')
        kind, default_alpha = BASES[base]
        alpha = default_alpha if alpha is None else alpha
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha must lie in 0..1 (given: {alpha})")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1) (given: {momentum})")
        if n_iter < 2 or n_iter != int(n_iter):
            raise ValueError(f"n_iter must be a whole number of at least 2 (given: {n_iter})")
        base_options = dict(base_options or {})
        known = kind.option_names()
        for option in base_options:
            if option not in known:
                raise ValueError(f'base_options: the loss {base} has no option "{option}"{nearest(option, known)}')
        self.base = kind(stats, **base_options)
        self.base_name = base
        self.num_logits = self.base.num_logits
        self.alpha, self.momentum, self.n_iter, self.start_epoch = alpha, momentum, int(n_iter), start_epoch
        self.register_exact("fg_confusion_matrix", torch.zeros(self.num_classes, self.num_classes))
        self.register_exact("num_inst_cnt", torch.zeros(self.num_classes))
        self.register_exact("_epoch", torch.zeros(1))
        # what the host knows of the state, so that it need not ask in every pass; none: it has to
        self._host_epoch: float | None = None
        self._all_seen = False
        untrained = torch.as_tensor(stats.instance_count) <= 0
        self.register_buffer("without_training", untrained, persistent=False)

    def loss(self, logits: Tensor, labels: Tensor, iter_id: int | None = None, epoch: float | None = None) -> Tensor:
        step = self.n_iter - 1 if iter_id is None else iter_id
        if not 0 <= step < self.n_iter:
            raise ValueError(f"iter_id must lie in 0..{self.n_iter - 1} (given: {iter_id})")
        foreground = torch.where(labels < self.num_classes)[0]
        own = labels[foreground]
        own_logits = logits.index_select(0, foreground)
        if self.training:
            if epoch is not None:
                self.at_epoch(epoch)
            self.observe(own_logits.detach()[:, : self.num_classes], own)
        share = self.alpha * step / (self.n_iter - 1)
        if share == 0 or not self.active(epoch):
            value = self.base(logits, labels, every_row=True)
            self.parts = self.base.parts
            return value
        if isinstance(self.base, Seesaw):
            return self._seesaw(self.base, logits, labels, own_logits, own, share)
        if isinstance(self.base, EQLv2):
            return self._eqlv2(self.base, logits, labels, foreground, own, share)
        return self._softmax(logits, labels, foreground, own, share)

    def scores(self, logits: Tensor) -> Tensor:
        return self.base.scores(logits)

    def prior_bias(self) -> Tensor:
        return self.base.prior_bias()

    # ---- state -----------------------------------------------------------------------------------------------------

    def at_epoch(self, epoch: float) -> None:
        """The epoch, counted from 0, of the calls that do not say theirs."""
        self._epoch.fill_(epoch)
        self._host_epoch = float(epoch)

    def _load_from_state_dict(self, *arguments: Any) -> None:
        self._host_epoch, self._all_seen = None, False
        super()._load_from_state_dict(*arguments)

    def active(self, epoch: float | None = None) -> bool:
        """Whether soft targets are used: late enough, and every class with training instances has been seen."""
        if epoch is None:
            epoch = float(self._epoch) if self._host_epoch is None else self._host_epoch
        if epoch < self.start_epoch:
            return False
        if not (self.training and self._all_seen):  # once true it stays so in training
            self._all_seen = bool(((self.num_inst_cnt > 0) | self.without_training).all())
        return self._all_seen

    @torch.no_grad()
    def observe(self, class_logits: Tensor, labels: Tensor) -> None:
        """Move the rows of M towards what is predicted now; [F, C] logits of the foreground rows, labels [F]."""
        matrix = self.fg_confusion_matrix
        (counts,) = sum_over_ranks(counts_of(labels, self.num_classes, matrix.dtype))
        # the rows of M that change, the same on every rank; one process has them without asking its device, repeated
        seen = counts.nonzero()[:, 0] if several_ranks() else labels
        place = places_in(seen, self.num_classes)
        predicted = class_logits.sigmoid() if self.base_name == "eqlv2" else class_logits.softmax(dim=1)
        sums = matrix.new_zeros((len(seen), self.num_classes))
        (sums,) = sum_over_ranks(sums.index_add_(0, place[labels], predicted.to(matrix.dtype)))
        rows = matrix[seen].lerp(sums[place[seen]] / counts[seen, None], 1 - self.momentum)
        if self.base_name != "eqlv2":
            rows /= rows.sum(dim=1, keepdim=True)
        matrix.index_copy_(0, seen, rows)
        self.num_inst_cnt += counts

    # ---- the three active forms ------------------------------------------------------------------------------------

    def predicted_as(self, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """[F, C] columns of M for the labels, each divided by its sum."""
        sums = self.fg_confusion_matrix.sum(dim=0)[labels].clamp(min=torch.finfo(torch.float32).tiny)
        return (self.fg_confusion_matrix.t()[labels] / sums[:, None]).to(dtype)

    def _softmax(self, logits: Tensor, labels: Tensor, foreground: Tensor, own: Tensor, share: float) -> Tensor:
        target = self.predicted_as(own, logits.dtype)
        log_probability = logits.log_softmax(dim=1)
        cross_entropy = -log_probability.gather(1, labels[:, None])[:, 0]
        hard = torch.where(labels < self.num_classes, (1 - share) * cross_entropy, cross_entropy).sum()
        soft = (target * log_probability.index_select(0, foreground)[:, : self.num_classes]).sum()
        divergence = share * (torch.xlogy(target, target).sum() - soft)
        hard, divergence = mean_over_rows(hard, len(labels)), mean_over_rows(divergence, len(labels))
        self.parts = {"softmax": hard.detach(), "pcb": divergence.detach()}
        return hard + divergence

    def _seesaw(
        self, base: Seesaw, logits: Tensor, labels: Tensor, own_logits: Tensor, own: Tensor, share: float
    ) -> Tensor:
        if self.training:
            base.count(labels)
        reweighted = base.reweighted(own_logits[:, : self.num_classes], own)
        log_probability = reweighted.log_softmax(dim=1)
        hard = (1 - share) * F.nll_loss(log_probability, own, reduction="sum")
        soft = -share * (self.predicted_as(own, logits.dtype) * log_probability).sum()
        is_background = (labels == self.num_classes).long()
        objectness = F.cross_entropy(logits[:, self.num_classes :], is_background, reduction="sum")
        hard, soft, objectness = (mean_over_rows(part, len(labels)) for part in (hard, soft, objectness))
        self.parts = {"classes": hard.detach(), "pcb": soft.detach(), "objectness": objectness.detach()}
        return hard + soft + objectness

    def _eqlv2(
        self, base: EQLv2, logits: Tensor, labels: Tensor, foreground: Tensor, own: Tensor, share: float
    ) -> Tensor:
        targets = one_hot(labels, self.num_logits, logits.dtype)
        columns = self.fg_confusion_matrix.t()[own].to(logits.dtype)
        targets[foreground, : self.num_classes] = targets[foreground, : self.num_classes].lerp(columns, share)
        value = base.loss_of_targets(logits, targets)
        self.parts = base.parts
        return value
