"""Feature augmentation and sampling adaptation: FASA (Zang et al., ICCV'21).

Training: running class statistics as in `models/features/hallucination.py`, but of the positives of the normal RoI
batch; class c then yields one made-up feature, mean + sqrt(variance) * noise, with probability `prob` c, at first
proportional to 1 / instances. Their mean cross-entropy is added with weight 0.1 (from the second epoch on)::

    module.update(features, labels)                     # positives only are taken
    extra, extra_labels = module.sample()
    loss = loss + module.augmentation_loss(classifier(extra), extra_labels)

After each epoch, over a held-out part of the data (released) or the epoch's own batches (`AugmentedFeatures`)::

    module.observe(row_losses, labels)                  # per-row losses of every batch
    module.adapt()                                      # prob x 0.9 where a cluster's loss rose, x 1.1 where it fell

Classes are clustered by affinity propagation on their means, and a cluster's loss is compared with that of the same
classes after the epoch before. The released code hands squared distances to the clustering as if they were
similarities; that is the default, `clustering="negated"` hands over their negatives.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.nn import functional as F

from tailfin.collectives import sum_over_ranks
from tailfin.losses.base import PICTURES, ClassificationLoss, ExactBuffers
from tailfin.models.features.base import FeatureModule, Seen
from tailfin.models.features.hallucination import FeatureStatistics
from tailfin.models.precision import in_float32
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.features import FASA as FASAConfig
from tailfin.stats import ClassStats

CLUSTERINGS = ("released", "negated")


class FASA(ExactBuffers):
    """Adaptive feature augmentation.

    Args:
        instance_count: [C] training instances of each class; 0 acts as 1.
        channels: D, length of a feature.
        decay_ratio: by how much a batch moves the running statistics.
        loss_aug_weight: weight of the made-up features' loss.
        instance_prob_power, instance_prob_scale: prob = scale * n^-power / sum(n^-power) at first, clamped to 0..1.
        dynamic_up, dynamic_down: factor of prob where a cluster's loss fell and where it rose.
        clustering: "released" or "negated", see above.
        across_ranks: statistics over the features of all processes, so that all have the same; without it, as
            released, each keeps its own and clusters its own means. The losses of `observe` are always summed.
    """

    prob: Tensor
    val_losses: Tensor
    val_counts: Tensor
    last_losses: Tensor
    adapted: Tensor

    def __init__(
        self,
        instance_count: ArrayLike,
        channels: int,
        *,
        decay_ratio: float = 0.1,
        loss_aug_weight: float = 0.1,
        instance_prob_power: float = 1.0,
        instance_prob_scale: float = 1.0,
        dynamic_up: float = 1.1,
        dynamic_down: float = 0.9,
        clustering: str = "released",
        across_ranks: bool = True,
    ) -> None:
        super().__init__()
        if clustering not in CLUSTERINGS:
            raise ValueError(f'clustering must be "released" or "negated" (given: "{clustering}")')
        if loss_aug_weight < 0 or instance_prob_scale < 0 or dynamic_up <= 0 or dynamic_down <= 0:
            raise ValueError("weights and scales must not be negative, dynamic_up and dynamic_down must be positive")
        counts = np.maximum(np.asarray(instance_count, dtype=np.float64), 1)
        share = counts**-instance_prob_power
        prob = np.clip(instance_prob_scale * share / share.sum(), 0, 1)
        self.loss_aug_weight = loss_aug_weight
        self.dynamic_up = dynamic_up
        self.dynamic_down = dynamic_down
        self.clustering = clustering
        self.statistics = FeatureStatistics(len(counts), channels, momentum=1 - decay_ratio, across_ranks=across_ranks)
        self.register_exact("prob", torch.from_numpy(prob))
        # of the running phase, background last
        self.register_exact("val_losses", torch.zeros(len(counts) + 1))
        self.register_exact("val_counts", torch.zeros(len(counts) + 1))
        self.register_exact("last_losses", torch.zeros(len(counts)))  # of the phase before
        self.register_buffer("adapted", torch.zeros((), dtype=torch.int64))  # phases so far

    def update(self, features: Tensor, labels: Tensor, *, again: bool = False) -> None:
        """Take the foreground rows of `features` [n, D] into the statistics; only in train mode. `again` as for
        `FeatureStatistics.update`."""
        self.statistics.update(features, labels, again=again)

    @torch.no_grad()
    def sample(
        self, *, generator: torch.Generator | None = None, draws: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """At most one feature per class that has statistics: [R, D], labels [R] ascending.

        `draws` takes the place of random numbers: uniforms [C] and normals [R, D].
        """
        features, labels, _ = self.sample_often(1, generator=generator, draws=draws)
        return features, labels

    @torch.no_grad()
    def sample_often(
        self, times: int, *, generator: torch.Generator | None = None, draws: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`sample`, `times` times: features [R, D], labels [R] and the number of each row's draw, int64 [R] ascending.

        `draws`: uniforms [C] or [times, C], and normals [R, D].
        """
        shape = (times, len(self.prob))
        if draws is None:
            uniform = torch.rand(shape, generator=generator, device=self.prob.device)
        else:
            uniform = draws[0].to(self.prob.device).view(shape)
        draw, labels = torch.where((uniform < self.prob) & self.statistics.used)
        noise = self.statistics.noise(len(labels), generator) if draws is None else draws[1]
        return self.statistics.draw(labels, noise), labels, draw

    def augmentation_loss(
        self, logits: Tensor, labels: Tensor, draw: Tensor | None = None, draws: float = 1.0
    ) -> Tensor:
        """`loss_aug_weight` times the mean softmax cross-entropy; 0, attached to the graph, without rows.

        With `draw` int64 [R], the draw of each row: the sum over the draws of their means, divided by `draws`. A draw
        without rows counts 0, as the published run has it on a process without any.
        """
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if draw is None:
            return self.loss_aug_weight * F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)
        each = F.cross_entropy(logits, labels, reduction="none")
        return self.loss_aug_weight * (each / torch.bincount(draw)[draw]).sum() / draws

    @torch.no_grad()
    def observe(self, losses: Tensor, labels: Tensor) -> None:
        """Add per-row losses [N] of all processes to the running phase; labels 0..C, C background, -1 left out.

        Call it on every process, in training or evaluation mode.
        """
        losses, labels = losses[labels >= 0].to(self.val_losses), labels[labels >= 0]
        sums, counts = torch.zeros_like(self.val_losses), torch.zeros_like(self.val_counts)
        sums.index_put_((labels,), losses, accumulate=True)
        counts.index_put_((labels,), torch.ones_like(losses), accumulate=True)
        sums, counts = sum_over_ranks(sums, counts)
        self.val_losses += sums
        self.val_counts += counts

    @torch.no_grad()
    def adapt(self, clusters: Tensor | None = None) -> None:
        """End the phase: move `prob` by how the loss of each class's cluster changed; the first phase changes nothing.

        A class's loss is its sum divided by the number of all rows. `clusters` int64 [C], 0, 1, ..., takes the place of
        the clustering.
        """
        losses = (self.val_losses / self.val_counts.sum().clamp(min=1))[:-1]
        if self.adapted > 0:
            groups = self._clusters() if clusters is None else clusters
            change = torch.zeros_like(losses).index_put_((groups,), losses - self.last_losses, accumulate=True)[groups]
            factor = torch.ones_like(self.prob).masked_fill_(change > 0, self.dynamic_down)
            self.prob.mul_(factor.masked_fill_(change < 0, self.dynamic_up)).clamp_(0, 1)
        self.last_losses.copy_(losses)
        self.adapted += 1
        self.val_losses.zero_()
        self.val_counts.zero_()

    def _clusters(self) -> Tensor:
        means = self.statistics.mean.cpu().double()
        distance = torch.cdist(means, means).square()
        groups = affinity_propagation(distance if self.clustering == "released" else -distance)
        return groups.to(self.prob.device)


class AugmentedFeatures(FeatureModule):
    """FASA: the statistics of the sampled foreground rows give made-up features, whose loss is a term of its own.

    The probabilities adapt at the end of each epoch, to the losses of the epoch's own rows (the released code measures
    them on the validation set). From epoch `start` on there are made-up features: a draw and its loss for every two
    pictures, or with `per` "process" one on every process (`FeatureModule.share`).
    """

    epoch: Tensor

    def __init__(self, fasa: FASA, start: int = 1, *, per: str = "batch") -> None:
        super().__init__()
        self.fasa = fasa
        self.per = per
        self.start = start
        self.register_buffer("epoch", torch.zeros((), dtype=torch.int64))  # the one that runs

    def at_epoch(self, epoch: float) -> None:
        """Close the epoch before where a new one begins."""
        super().at_epoch(epoch)
        if math.floor(epoch) > int(self.epoch):
            self.fasa.adapt()
            self.epoch.fill_(math.floor(epoch))

    def losses(self, seen: Seen, logits: Tensor) -> dict[str, Tensor]:
        labels = seen.rows.labels
        self.fasa.update(seen.shared.detach().float(), labels, again=self.calls > 0)
        self.fasa.observe(F.cross_entropy(logits.detach(), labels, reduction="none"), labels)
        pictures = len(seen.targets)
        times = self.share(1, pictures, self.per)
        if int(self.epoch) < self.start:
            return {}
        features, labels, draw = self.fasa.sample_often(times)
        logits = in_float32(seen.classifier, features)
        draws = 1.0 if self.per == "process" else pictures / PICTURES
        return {"loss_augmented": self.fasa.augmentation_loss(logits, labels, draw, draws)}


def build(config: FASAConfig, detector: FasterRCNNConfig, stats: ClassStats, loss: ClassificationLoss) -> FeatureModule:
    """The module of a recipe."""
    options = config.model_dump(exclude={"name"})
    start, per = options.pop("start_epoch"), options.pop("per")
    return AugmentedFeatures(FASA(stats.instance_count, detector.head_channels, **options), start, per=per)


def affinity_propagation(
    similarity: Tensor, *, damping: float = 0.5, max_iterations: int = 200, patience: int = 15
) -> Tensor:
    """Cluster labels int64 [n], 0, 1, ..., by affinity propagation (Frey and Dueck, Science 2007).

    `similarity` [n, n]; every element's preference is the median similarity. Ends when the exemplars have not changed
    for `patience` iterations. Where no exemplar is found, and where all similarities are equal, everything is one
    cluster.
    """
    size = len(similarity)
    similarity = similarity.detach().cpu().double()
    single = torch.zeros(size, dtype=torch.int64)
    if size < 2 or similarity.min() == similarity.max():
        return single
    # the mean of the two middle values
    ordered = similarity.flatten().sort().values
    preference = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
    similarity = similarity.clone().fill_diagonal_(float(preference))
    # a tiny fixed disturbance, without which equal elements swap their roles forever
    generator = torch.Generator().manual_seed(0)
    scale = torch.finfo(torch.float64).eps * similarity.abs() + 100 * torch.finfo(torch.float64).tiny
    similarity += scale * torch.randn(similarity.shape, generator=generator, dtype=torch.float64)

    element = torch.arange(size)
    responsibility, availability = torch.zeros_like(similarity), torch.zeros_like(similarity)
    exemplar, unchanged = torch.zeros(size, dtype=torch.bool), 0
    for _ in range(max_iterations):
        top, which = (availability + similarity).topk(2, dim=1)
        rival = top[:, :1].expand(size, size).scatter(1, which[:, :1], top[:, 1:])  # best of the other candidates
        responsibility.lerp_(similarity - rival, 1 - damping)

        support = responsibility.clamp(min=0)
        support[element, element] = responsibility.diagonal()
        received = support.sum(dim=0) - support
        own = received.diagonal().clone()
        received.clamp_(max=0)
        received[element, element] = own
        availability.lerp_(received, 1 - damping)

        found = responsibility.diagonal() + availability.diagonal() > 0
        unchanged = unchanged + 1 if torch.equal(found, exemplar) else 0
        exemplar = found
        if unchanged >= patience and bool(exemplar.any()):
            break
    centres = torch.where(exemplar)[0]
    if not len(centres):
        return single
    groups = _nearest(similarity, centres)
    # the best centre of each group, then the groups of these centres
    within = similarity * (groups[:, None] == groups[None, :])
    total = within.sum(dim=0)
    centres = torch.stack([torch.where(groups == k, total, -torch.inf).argmax() for k in range(len(centres))])
    return _nearest(similarity, centres)


def _nearest(similarity: Tensor, centres: Tensor) -> Tensor:
    groups = similarity[:, centres].argmax(dim=1)
    groups[centres] = torch.arange(len(centres))
    return groups
