"""Features made up from running class statistics: the feature hallucination module of BACL (TMM'23, section III-E).

    mu_c <- beta mu_c + (1 - beta) mean,  sigma_c <- beta sigma_c + (1 - beta) variance         (eq. 11)
    probability of class c = (1 - l_c) / sum(1 - l)        l: a long-term indicator in 0..1     (eq. 12)
    feature = mu_c + noise * spread of the class           m features of each of the drawn classes (eq. 13)

Statistics come from the features of the boxes that `models/features/box_generator.py` makes around the ground truth, in
the order: collect, hallucinate, loss::

    module.update(features, labels)                                   # features [n, D], labels int64 [n]
    extra, extra_labels = module.sample(loss.indicator_diagonal())
    value = loss(classifier(torch.cat([rows, extra])), torch.cat([row_labels, extra_labels]))

All state is in buffers, so a checkpoint has it. `HallucinatedRows` is what a box head trains with.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tailfin.collectives import sum_over_ranks
from tailfin.errors import UserError
from tailfin.losses.base import ClassificationLoss
from tailfin.losses.fcbl import FCBL
from tailfin.models.features.base import ExtraRows, FeatureModule, Seen
from tailfin.models.features.box_generator import shifted_boxes
from tailfin.schema.detectors import FasterRCNNConfig
from tailfin.schema.features import Hallucination
from tailfin.stats import ClassStats

SPREADS = ("deviation", "variance")


class FeatureHallucination(nn.Module):
    """Draws classes by a long-term indicator and features from their running distribution.

    Args:
        num_classes: C foreground classes.
        channels: D, length of a feature.
        beta: momentum of the running statistics.
        sampled_num_classes: classes drawn per call (c); one can be drawn several times.
        sampled_num_features: features per drawn class (m).
        spread: what the noise is multiplied with: "deviation", the root of the running variance (released code), or
            "variance" (the text, which calls sigma the variance).
        across_ranks: statistics over the features of all processes, so that all have the same; without it, as in the
            released code, each process keeps its own, and a checkpoint has those of the first.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        *,
        beta: float = 0.9,
        sampled_num_classes: int = 8,
        sampled_num_features: int = 12,
        spread: str = "deviation",
        across_ranks: bool = True,
    ) -> None:
        super().__init__()
        if spread not in SPREADS:
            raise ValueError(f'spread must be "deviation" or "variance" (given: "{spread}")')
        if sampled_num_classes < 1 or sampled_num_features < 1:
            raise ValueError("sampled_num_classes and sampled_num_features must be at least 1")
        self.sampled_num_classes = sampled_num_classes
        self.sampled_num_features = sampled_num_features
        self.spread = spread
        self.statistics = FeatureStatistics(num_classes, channels, momentum=beta, across_ranks=across_ranks)

    def update(self, features: Tensor, labels: Tensor, *, again: bool = False) -> None:
        """Move the statistics of the classes in `labels` [n] towards `features` [n, D]; only in train mode. `again` as
        for `FeatureStatistics.update`."""
        self.statistics.update(features, labels, again=again)

    @torch.no_grad()
    def sample(
        self,
        indicator: Tensor,
        classes: int | None = None,
        *,
        generator: torch.Generator | None = None,
        draws: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Features [R, D] and their labels [R], R <= c m: classes without statistics give none. `classes` takes the
        place of c.

        `indicator` [C] in 0..1 is 1 for a class that needs nothing. `draws` takes the place of random numbers: c
        uniforms and [R, D] normals.
        """
        statistics = self.statistics
        if draws is None:
            number = self.sampled_num_classes if classes is None else classes
            uniform = torch.rand(number, generator=generator, device=indicator.device)
            uniform = uniform.sort().values
        else:
            uniform = draws[0]
        chosen = inverse_cdf(1 - indicator, uniform).to(statistics.used.device)
        labels = chosen[statistics.used[chosen]].repeat_interleave(self.sampled_num_features)
        noise = statistics.noise(len(labels), generator) if draws is None else draws[1]
        return statistics.draw(labels, noise, self.spread), labels


class FeatureStatistics(nn.Module):
    """Running mean and unbiased variance of the features of each class.

    Buffers: `mean` and `variance` [C, D], `used` bool [C]. A class's first features set its statistics, later ones move
    them by 1 - momentum; a single feature has variance 0.
    """

    mean: Tensor
    variance: Tensor
    used: Tensor

    def __init__(self, num_classes: int, channels: int, *, momentum: float = 0.9, across_ranks: bool = True) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"the momentum must lie in 0..1, without 1 (given: {momentum})")
        self.momentum = momentum
        self.across_ranks = across_ranks
        self.register_buffer("mean", torch.zeros(num_classes, channels))
        self.register_buffer("variance", torch.zeros(num_classes, channels))
        self.register_buffer("used", torch.zeros(num_classes, dtype=torch.bool))
        self._batch: Gathered | None = None  # of the newest optimiser batch; of no use between two of them

    @torch.no_grad()
    def update(self, features: Tensor, labels: Tensor, *, again: bool = False) -> None:
        """Take in `features` [n, D] of any float dtype; rows whose label is no foreground class are left out.

        `again`: they belong to the batch of the call before, as another accumulation step of it. The statistics then
        move from where that batch found them to the mean and variance of all its rows so far: after the last step they
        are those of one call with all rows.

        Nothing changes in evaluation mode. With `across_ranks` every process has to call it, also with no rows.
        """
        if not self.training:
            return
        classes = len(self.used)
        if features.ndim != 2 or features.shape[1] != self.mean.shape[1] or labels.shape != features.shape[:1]:
            raise ValueError(
                f"features must be [n, {self.mean.shape[1]}] with labels [n], these are {list(features.shape)} and "
                f"{list(labels.shape)}"
            )
        # every class has a place, and rows of no class the one behind them: nothing is looked up on the device
        group = torch.where((labels >= 0) & (labels < classes), labels, classes)
        features = features.to(self.mean.dtype)
        count, total = self._summed(torch.ones_like(features[:, :1]), features, group=group, length=classes + 1)
        mean = total / count.clamp(min=1)
        (squares,) = self._summed((features - mean[group]).square(), group=group, length=classes + 1)
        count, mean, squares = count[:-1], mean[:-1], squares[:-1]
        if again and self._batch is not None:
            count, mean, squares = self._batch.joined(count, mean, squares)
            self._batch.restore(self)
        old = self.mean.clone(), self.variance.clone(), self.used.clone()
        self._batch = Gathered(count, mean, squares, *old)

        seen = count > 0
        variance = squares / (count - 1).clamp(min=1)
        keep = torch.where(seen, self.momentum * self.used.to(mean.dtype)[:, None], 1.0)
        self.mean.copy_(torch.where(seen, keep * self.mean + (1 - keep) * mean, self.mean))
        self.variance.copy_(torch.where(seen, keep * self.variance + (1 - keep) * variance, self.variance))
        self.used |= seen[:, 0]

    def noise(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """[rows, D] standard normals in the statistics' dtype and on their device."""
        shape = (rows, self.mean.shape[1])
        return torch.randn(shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)

    def draw(self, labels: Tensor, noise: Tensor, spread: str = "deviation") -> Tensor:
        """[n, D] features of the classes `labels` [n], one per row of `noise` [n, D]."""
        width = self.variance[labels]
        if spread == "deviation":
            width = width.sqrt()
        return self.mean[labels] + width * noise.to(width)

    def _summed(self, *values: Tensor, group: Tensor, length: int) -> tuple[Tensor, ...]:
        """Per group sums of the rows of each of `values`, over all processes if the statistics are; reproducible."""
        sums = tuple(
            value.new_zeros(length, value.shape[1]).index_put_((group,), value, accumulate=True) for value in values
        )
        return sum_over_ranks(*sums) if self.across_ranks else sums


class Gathered(NamedTuple):
    """What an optimiser batch has brought so far, of every class."""

    number: Tensor  # [C, 1] rows, their mean [C, D] and the sum of squared distances from it
    mean: Tensor
    squares: Tensor
    old_mean: Tensor  # [C, D] the statistics before the batch
    old_variance: Tensor
    old_used: Tensor

    def joined(self, count: Tensor, mean: Tensor, squares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, mean and squares of these rows and more, [C, 1], [C, D] and [C, D]."""
        total, shift = self.number + count, mean - self.mean
        share = count / total.clamp(min=1)
        return total, self.mean + shift * share, self.squares + squares + shift.square() * self.number * share

    def restore(self, statistics: FeatureStatistics) -> None:
        """The statistics as they were before the batch."""
        statistics.mean.copy_(self.old_mean)
        statistics.variance.copy_(self.old_variance)
        statistics.used.copy_(self.old_used)


def inverse_cdf(weights: Tensor, uniform: Tensor) -> Tensor:
    """int64 indices drawn in proportion to `weights` [C] >= 0: the first whose cumulative share reaches `uniform`.

    All are as likely where no weight is positive.
    """
    # sums in float64, on the CPU where the device has none: shares of a thousand classes
    weights = weights.detach().clamp(min=0)
    weights = weights.cpu().double() if weights.device.type == "mps" else weights.double()
    weights = torch.where(weights.sum() > 0, weights, torch.ones_like(weights))
    share = weights.cumsum(0) / weights.sum()
    return torch.searchsorted(share, uniform.to(share)).clamp(max=len(share) - 1)


class HallucinatedRows(FeatureModule):
    """BACL's feature hallucination (III-E).

    Every iteration: collect the features of 16 shifted boxes around each object, move the class statistics, and draw
    made-up features of classes that the loss's long-term indicator finds weak. `per` as for `FeatureModule.share`.
    """

    def __init__(
        self,
        hallucination: FeatureHallucination,
        loss: ClassificationLoss,
        *,
        independent_boxes: bool = False,
        per: str = "batch",
    ) -> None:
        super().__init__()
        if not isinstance(loss, FCBL):
            raise UserError("hallucination draws classes by the indicator of fcbl: set loss=fcbl")
        self.hallucination = hallucination
        self.independent_boxes = independent_boxes
        self.per = per
        self._loss = (loss,)  # in a tuple: the box head owns it, its state is not stored twice

    @torch.no_grad()
    def rows(self, seen: Seen) -> ExtraRows:
        boxes, labels, _ = shifted_boxes(seen.targets, seen.image_sizes, independent=self.independent_boxes)
        self.hallucination.update(seen.head(seen.pool(boxes)).float(), labels, again=self.calls > 0)
        classes = self.share(self.hallucination.sampled_num_classes, len(seen.targets), self.per)
        return ExtraRows(*self.hallucination.sample(self._loss[0].indicator_diagonal(), classes))


def build(
    config: Hallucination, detector: FasterRCNNConfig, stats: ClassStats, loss: ClassificationLoss
) -> FeatureModule:
    """The module of a recipe."""
    options = config.model_dump(exclude={"name"})
    own = {key: options.pop(key) for key in ("independent_boxes", "per")}
    made_up = FeatureHallucination(stats.num_classes, detector.head_channels, **options)
    return HallucinatedRows(made_up, loss, **own)
