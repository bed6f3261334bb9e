"""Which images make up which batch: a pure function of (seed, epoch), so that training goes on where it stopped.

`BatchPlan.epoch(e)` is the whole epoch's table of batches, the same on every process. A rank reads its columns, a
resumed run starts at its row; nothing has to be stored but the iteration. Batches hold only upright or only wide
pictures where asked (less padding).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailfin.data.index import AnnotationIndex
from tailfin.errors import UserError
from tailfin.samplers.class_aware import class_aware_draws, class_pairs
from tailfin.samplers.repeat_factor import (
    WITH_REPLACEMENT,
    category_factors,
    image_factors,
    round_factors,
    training_labels,
)
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

# (epoch, image row, how often the image came before in this epoch), and what another kind of plan adds
Key = tuple[int, ...]


@dataclass(frozen=True)
class BatchPlan:
    """The order of a whole training run.

    Args:
        index: the training file's index.
        rows: image rows that take part (for example those with annotations).
        stats: class counts that the repeat factors come from.
        sampler: policy and its options.
        batch: images per optimiser step, over all processes.
        epochs: length of the run; the last epoch may be a fraction.
        group_by_aspect: keep upright and wide pictures in different batches.
        factors: repeat factor of every image, float64 [I]; given, they take the place of the sampler's policy.
    """

    index: AnnotationIndex
    rows: NDArray[np.int64]
    stats: ClassStats
    sampler: Sampler
    batch: int
    epochs: float
    seed: int
    group_by_aspect: bool = True
    factors: NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        if len(self.rows) == 0:
            raise UserError(f"{self.index.path} has no image to train on (none has a usable annotation)")

    @functools.cached_property
    def boundaries(self) -> NDArray[np.int64]:
        """First iteration of every epoch, and the number of iterations at the end, int64 [ceil(epochs) + 1]."""
        whole = int(np.ceil(self.epochs))
        lengths = np.array([-(-self._length(epoch) // self.batch) for epoch in range(whole)], dtype=np.int64)
        lengths[-1] = max(1, round(int(lengths[-1]) * (self.epochs - (whole - 1))))
        return np.concatenate([[0], np.cumsum(lengths)])

    @property
    def iterations(self) -> int:
        """Optimiser steps of the whole run."""
        return int(self.boundaries[-1])

    def iteration_at(self, epoch: float) -> int:
        """The iteration that a point in epochs (8, 11.5, ...) falls on; beyond the last epoch it grows on evenly."""
        if epoch > self.epochs:
            return round(self.iterations * epoch / self.epochs)
        return round(float(np.interp(epoch, self._epoch_ends, self.boundaries)))

    def epoch_at(self, iteration: int) -> float:
        """The point in epochs of an iteration."""
        return float(np.interp(iteration, self.boundaries, self._epoch_ends))

    @functools.cached_property
    def _epoch_ends(self) -> NDArray[np.float64]:
        """The points in epochs of `boundaries`: 0, 1, 2, ..., and the (perhaps fractional) end."""
        return np.minimum(np.arange(len(self.boundaries)), self.epochs)

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Shuffled image rows of an epoch, with repeats."""
        rng = np.random.default_rng([self.seed, 1, epoch])
        if self._repeats:
            return rng.permutation(np.repeat(self.rows, self._times(epoch, rng)))
        if self.sampler.name == "class_aware":
            return class_aware_draws(*self._pairs, len(self.rows), rng)
        if self.sampler.name == "plain":
            return rng.permutation(self.rows)
        per_image = self.image_factors(epoch)
        return rng.choice(self.rows, len(self.rows), p=per_image / per_image.sum())

    def _length(self, epoch: int) -> int:
        """`len(self.order(epoch))` without the order."""
        if not self._repeats:
            return len(self.rows)
        return int(self._times(epoch, np.random.default_rng([self.seed, 1, epoch])).sum())

    @property
    def _repeats(self) -> bool:
        """Whether an epoch has every picture a number of times, its repeat factor rounded."""
        return self.factors is not None or self.sampler.name not in ("plain", "class_aware", *WITH_REPLACEMENT)

    def _times(self, epoch: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """How often each of `rows` comes in an epoch; the first draw of its generator."""
        factors = self.image_factors(epoch) if self.factors is None else self.factors[self.rows]
        return round_factors(factors, self.sampler.rounding, rng.random(len(self.rows)))

    def image_factors(self, epoch: int) -> NDArray[np.float64]:
        """Repeat factor of every image that takes part, float64 [len(rows)], by the sampler's policy."""
        if self.sampler.name != "dynamic":
            return self._steady_factors
        return self._factors_at(epoch)

    @functools.cached_property
    def _steady_factors(self) -> NDArray[np.float64]:
        """Of every epoch, where the sampler's policy does not change."""
        return self._factors_at(0)

    def _factors_at(self, epoch: int) -> NDArray[np.float64]:
        sampler = self.sampler
        progress = min(1.0, (epoch + sampler.first_epoch) / self.epochs)
        factors = category_factors(
            self.stats, sampler.name, sampler.threshold, progress, exponent=sampler.exponent, alpha=sampler.alpha
        )
        return image_factors(factors, *self._labels, len(self.index))[self.rows]

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """Batches of an epoch: int64 [batches, batch, 2] of (image row, how often it came before in this epoch).

        The last batch is filled up from the epoch's first images.
        """
        order = self.order(epoch)
        missing = -len(order) % self.batch
        order = np.concatenate([order, np.resize(order, missing)])
        if self.group_by_aspect:
            order = self._grouped(order, np.random.default_rng([self.seed, 2, epoch]))
        return np.stack([order, _occurrence(order)], axis=1).reshape(-1, self.batch, 2)

    def keys(self, start: int, part: slice, parts: int) -> Iterator[list[Key]]:
        """Micro-batches of one process from iteration `start` on.

        An iteration's batch is cut into `parts` equal pieces (processes x accumulation steps); `part` selects those of
        this process, in order.
        """
        iteration = start
        while iteration < self.iterations:
            epoch = int(np.searchsorted(self.boundaries, iteration, side="right")) - 1
            table = self.epoch(epoch)
            for row in range(iteration - int(self.boundaries[epoch]), int(np.diff(self.boundaries)[epoch])):
                for piece in table[row].reshape(parts, -1, table.shape[-1])[part]:
                    yield [(epoch, *map(int, entry)) for entry in piece]
                iteration += 1

    @functools.cached_property
    def _labels(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        image_of, labels = training_labels(self.index)
        taking_part = np.zeros(len(self.index), dtype=bool)
        taking_part[self.rows] = True
        keep = taking_part[image_of]
        return image_of[keep], labels[keep]

    @functools.cached_property
    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        return class_pairs(*self._labels)

    def _grouped(self, order: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
        """Whole batches of each orientation; what is left over of both makes the mixed ones. Then shuffled."""
        wide = self.index.widths[order] > self.index.heights[order]
        groups = [order[wide], order[~wide]]
        whole = [group[: len(group) // self.batch * self.batch] for group in groups]
        rest = [group[len(group) // self.batch * self.batch :] for group in groups]
        return rng.permutation(np.concatenate([*whole, *rest]).reshape(-1, self.batch)).reshape(-1)


def _occurrence(values: NDArray[np.int64]) -> NDArray[np.int64]:
    """How often each entry's value came before it; only values that come again are sorted."""
    result = np.zeros(len(values), dtype=np.int64)
    if len(values) == 0:
        return result
    again = np.flatnonzero(np.bincount(values)[values] > 1)
    # value and place in one number: sorting it is a stable sort by value, in a fourth of the time
    joint = np.sort(values[again] * np.int64(len(again)) + np.arange(len(again)))
    ordered, order = np.divmod(joint, len(again))
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(again) else again
    result[again[order]] = np.arange(len(again)) - np.repeat(first, np.diff(np.append(first, len(again))))
    return result
