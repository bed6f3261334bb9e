"""BALMS's meta reweighter (Ren et al., NeurIPS'20): class weights learned for a balanced stream through an inner step.

Each class has a learned number v_c and the weight s(v_c), s the logistic function. The loss is the balanced sigmoid
loss whose foreground rows are weighted so that their mean weight is 1::

    loss = (sum over foreground rows of s(v_y) F / S * row loss + sum over background rows of row loss) / N
    F = number of foreground rows, S = sum of s(v_y) over them, row loss = sum over classes of BCE(z', t)

In every iteration, before that loss, `learn` asks how v should change::

    inner step      theta' = theta - inner_lr * d loss(theta, v; training rows) / d theta
    outer gradient  d (plain sigmoid loss of theta' on class-balanced rows) / d v, one Adam step (lr 0.01) on v

theta are the classifier's own parameters, which stay as they are. Use::

    loss = MetaReweighter(stats)                       # a ClassificationLoss, as any other
    loss.learn(classifier, features, labels, balanced_features, balanced_labels, inner_lr=0.02)
    value = loss(classifier(features), labels)         # v is constant here
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.adam import adam

from tailfin.collectives import sum_over_ranks
from tailfin.losses.balanced_sigmoid import BalancedSigmoid
from tailfin.losses.base import at_least_float32, one_hot
from tailfin.stats import ClassStats


class MetaReweighter(BalancedSigmoid):
    """Balanced sigmoid with learned class weights, on C logits; divided by the number of rows.

    Args:
        lr: learning rate of Adam on the class weights; its other settings are torch's defaults.

    State: `class_weight` [C], v before the logistic function, 0 at the start, and Adam's `exp_avg`, `exp_avg_sq` [C]
    and `step`. They are buffers, out of reach of the detector's optimiser and its weight decay.
    """

    class_weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    def __init__(self, stats: ClassStats, *, lr: float = 0.01) -> None:
        super().__init__(stats)
        if not 0 < lr < math.inf:
            raise ValueError(f"lr must be positive (given: {lr})")
        self.lr = float(lr)
        for name in ("class_weight", "exp_avg", "exp_avg_sq"):
            self.register_exact(name, torch.zeros(self.num_classes))
        self.register_exact("step", 0.0)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.reweighted(logits, labels, self.class_weight)

    def reweighted(self, logits: Tensor, labels: Tensor, class_weight: Tensor) -> Tensor:
        """The loss for v = `class_weight` [C]; differentiable in both, twice in the logits."""
        rows = bce_rows(self.balanced(logits, labels), labels)
        foreground = (labels < self.num_classes).to(logits.dtype)
        weight = class_weight.to(logits.dtype).sigmoid()[labels.clamp(max=self.num_classes - 1)] * foreground
        smallest = torch.finfo(logits.dtype).tiny  # of the sum where there is no foreground
        scaled = weight * (foreground.sum() / weight.sum().clamp(min=smallest))
        return (scaled + 1 - foreground) @ rows / max(len(labels), 1)

    def learn(
        self,
        classifier: nn.Module,
        features: Tensor,
        labels: Tensor,
        balanced_features: Tensor,
        balanced_labels: Tensor,
        *,
        inner_lr: float,
    ) -> Tensor:
        """One step of the class weights; returns the plain sigmoid loss after the inner step, detached.

        `classifier` maps features [N, D] to logits [N, C]; it gets no gradient and no change. Labels are as for a loss.
        With several processes the outer gradient is the mean over them: call it on all of them. Both sets of rows may
        be empty.
        """
        features, labels = known_rows(features, labels)
        balanced_features, balanced_labels = known_rows(balanced_features, balanced_labels)
        theta = {
            name: value.detach().requires_grad_()
            for name, value in classifier.named_parameters()
            if value.requires_grad
        }
        class_weight = self.class_weight.detach().clone().requires_grad_()
        with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
            inner = self.reweighted(functional_call(classifier, theta, features), labels, class_weight)
            slopes = torch.autograd.grad(inner, tuple(theta.values()), create_graph=True)
            moved = {name: value - inner_lr * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
            rows = bce_rows(functional_call(classifier, moved, balanced_features), balanced_labels)
            outer = rows.sum() / max(len(balanced_labels), 1)
            (gradient,) = torch.autograd.grad(outer, class_weight)
        gradient, ranks = sum_over_ranks(gradient, gradient.new_ones(1))
        adam(
            [self.class_weight],
            [gradient / ranks],
            [self.exp_avg],
            [self.exp_avg_sq],
            [],
            [self.step],
            foreach=False,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.lr,
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )
        return outer.detach()


def bce_rows(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] sums over the classes of BCE(z, t)."""
    targets = one_hot(labels, logits.shape[1], logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(1)


def known_rows(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose label is not ignored (-1), detached and in float32 at least."""
    keep = labels >= 0
    return at_least_float32(features.detach()[keep]), labels[keep]
