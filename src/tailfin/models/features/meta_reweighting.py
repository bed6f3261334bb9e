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

In a detector (`LearntWeights`) every training picture brings a partner, drawn so that classes come about equally often:
with probability in proportion to 1 / images of its rarest class. The partners' sampled rows are the balanced rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim.adam import adam

from tailfin.collectives import sum_over_ranks
from tailfin.data.dataset import Source, TrainingDataset
from tailfin.losses.balanced_sigmoid import BalancedSigmoid
from tailfin.losses.base import ClassificationLoss, at_least_float32, one_hot
from tailfin.models.features.base import FeatureModule, Seen, StageFacts
from tailfin.samplers.repeat_factor import training_labels
from tailfin.schedule import learning_rate
from tailfin.schema.data import Data
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.features import MetaReweighting
from tailfin.stats import ClassStats

PARTNER = "balanced_"  # what a partner's picture, boxes and labels are called in its training picture's target


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
        self._gathered: list[Tensor] = []  # outer gradients of the optimiser batch so far; empty between two of them
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
        known: Tensor | None = None,
        balanced_known: Tensor | None = None,
        last: bool = True,
        every_row: bool = False,
    ) -> Tensor:
        """One step of the class weights; returns the plain sigmoid loss after the inner step, detached.

        Without `last` the gradient is kept for the call that has it, whose step takes the mean: a step per optimiser
        batch, whatever its accumulation.

        `classifier` maps features [N, D] to logits [N, C]; it gets no gradient and no change. Labels are as for a loss.
        With several processes the outer gradient is the mean over them: call it on all of them. Both sets of rows may
        be empty. `known` and `balanced_known`, bool [N, C], are the checked classes of their pictures as a loss takes
        them. `every_row`: no label is -1, so that nothing need be looked for.
        """
        if not every_row:
            features, labels, known = real_rows(features, labels, known)
            balanced_features, balanced_labels, balanced_known = real_rows(
                balanced_features, balanced_labels, balanced_known
            )
        features, balanced_features = (at_least_float32(rows.detach()) for rows in (features, balanced_features))
        theta = {
            name: value.detach().requires_grad_()
            for name, value in classifier.named_parameters()
            if value.requires_grad
        }
        class_weight = self.class_weight.detach().clone().requires_grad_()
        with torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
            logits = self.checked(functional_call(classifier, theta, features), labels, known)
            inner = self.reweighted(logits, labels, class_weight)
            slopes = torch.autograd.grad(inner, tuple(theta.values()), create_graph=True)
            moved = {name: value - inner_lr * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
            logits = functional_call(classifier, moved, balanced_features)
            rows = bce_rows(self.checked(logits, balanced_labels, balanced_known), balanced_labels)
            outer = rows.sum() / max(len(balanced_labels), 1)
            (gradient,) = torch.autograd.grad(outer, class_weight)
        gradient, ranks = sum_over_ranks(gradient, gradient.new_ones(1))
        self._gathered.append(gradient / ranks)
        if not last:
            return outer.detach()
        mean = torch.stack(self._gathered).mean(0)
        self._gathered.clear()
        adam(
            [self.class_weight],
            [mean],
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


def real_rows(features: Tensor, labels: Tensor, known: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows whose label is not ignored (-1)."""
    keep = torch.where(labels >= 0)[0]
    return features[keep], labels[keep], None if known is None else known[keep]


# ---- in a box head ---------------------------------------------------------------------------------------------------


class LearntWeights(FeatureModule):
    """BALMS's meta reweighter: before the loss, one step of its class weights.

    The first target carries the balanced rows, `balanced_features` [M, D] and `balanced_labels` [M], which the stage's
    step puts there: those of the pictures' partners (`PartneredDataset`). Without balanced rows the weights stay.
    `rate` maps a point in epochs to the stage's learning rate there.
    """

    rate: Callable[[float], float]
    accumulation = 1  # calls per optimiser batch

    def __init__(self, loss: ClassificationLoss, inner_lr: float | None = None) -> None:
        super().__init__()
        assert isinstance(loss, MetaReweighter)
        self.inner_lr = inner_lr
        self.epoch = 0.0
        self._loss = (loss,)

    def at_epoch(self, epoch: float) -> None:
        super().at_epoch(epoch)
        self.epoch = epoch

    def rows(self, seen: Seen) -> None:
        if "balanced_features" in (target := seen.targets[0]):
            rate = self.inner_lr if self.inner_lr is not None else self.rate(self.epoch)
            balanced = target["balanced_features"], target["balanced_labels"]
            rows = seen.shared, seen.rows.labels, *balanced
            checked: dict[str, Any] = {"known": seen.rows.known, "balanced_known": target.get("balanced_known")}
            self.calls += 1
            last = self.calls % self.accumulation == 0
            self._loss[0].learn(seen.classifier, *rows, inner_lr=rate, last=last, every_row=True, **checked)

    def around(self, model: Any, stage: StageFacts) -> dict[str, Any]:
        """Partners for the pictures, and a step that hands their rows on."""
        recipe, accelerator = stage.recipe, stage.accelerator
        dataset = PartneredDataset(stage.source, recipe.data, recipe.seed)
        plan = stage.plan(dataset)
        milestones = [plan.iteration_at(epoch) for epoch in recipe.schedule.milestones]

        def rate(epoch: float) -> float:
            return learning_rate(plan.iteration_at(epoch), plan.iterations, milestones, recipe.schedule)

        def step(model: Any, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            with accelerator.autocast():
                rows = partner_rows(getattr(model, "module", model), targets)
            losses: dict[str, Tensor] = model(images, [{**targets[0], **rows}, *targets[1:]])
            return losses

        self.rate, self.accumulation = rate, recipe.schedule.accumulation
        return {"dataset": dataset, "plan": plan, "step": step}


class PartneredDataset(TrainingDataset):
    """Training samples with a second picture each, from a class-balanced stream, in the target."""

    def __init__(self, source: Source, config: Data, seed: int) -> None:
        super().__init__(source, config, seed)
        image_of, labels = np.unique(np.stack(training_labels(source.index)), axis=1)
        weights = np.zeros(len(source.index))
        np.maximum.at(weights, image_of, 1.0 / np.bincount(labels)[labels])
        self.cumulative = weights.cumsum()

    def sample(self, epoch: int, row: int, copy: int) -> tuple[Tensor, dict[str, Tensor]]:
        """As the plain one, and the partner's picture uint8 [3, h, w], boxes [m, 4] and labels [m]."""
        image, target = super().sample(epoch, row, copy)
        rng = np.random.default_rng([self.seed, 5, epoch, row, copy])
        drawn = np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right")
        partner, own = self._augmented(int(drawn), rng)
        more = {"image": partner.contiguous(), "boxes": own["boxes"], "labels": own["labels"]}
        if self.config.unchecked_classes == "ignore":
            more["known"] = torch.from_numpy(self.source.index.known(int(drawn)))
        return image, {**target, **{PARTNER + key: value for key, value in more.items()}}


@torch.no_grad()
def partner_rows(model: Any, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Shared features [M, D], labels [M] and, where targets have them, checked classes [M, C] of the partners' sampled
    rows; nothing in `model` changes."""
    keys = [key for key in ("boxes", "labels", "known") if PARTNER + key in targets[0]]
    own = [{key: target[PARTNER + key] for key in keys} for target in targets]
    shared, labels, known = model.sampled_rows([target[PARTNER + "image"] for target in targets], own)
    rows = {PARTNER + "features": shared, PARTNER + "labels": labels}
    return rows if known is None else {**rows, PARTNER + "known": known}


def build(
    config: MetaReweighting, detector: FasterRCNNConfig, stats: ClassStats, loss: ClassificationLoss
) -> FeatureModule:
    """The module of a recipe."""
    return LearntWeights(loss, config.inner_lr)


def build_loss(config: MetaReweighting, stats: ClassStats) -> ClassificationLoss:
    """The loss in the place of the recipe's `balanced_sigmoid`: the same with class weights that are learnt."""
    return MetaReweighter(stats, lr=config.lr)
