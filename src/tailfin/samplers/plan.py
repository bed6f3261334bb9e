"""Which images make up which batch: a pure function of (seed, epoch), so that training goes on where it stopped.

`BatchPlan.order(e)` is an epoch's batches, the same on every process. A rank reads its columns, a resumed run starts at
its row; nothing has to be stored but the iteration. Batches hold only upright or only wide pictures where asked (less
padding).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailfin.data.index import AnnotationIndex
from tailfin.errors import UserError
from tailfin.samplers.class_aware import class_aware_draws, class_pairs
from tailfin.samplers.epoch_order import Batches, EpochOrder
from tailfin.samplers.permutation import CHUNK, keyed_permutation, uniform
from tailfin.samplers.repeat_factor import (
    WITH_REPLACEMENT,
    category_factors,
    factors_of_images,
    round_factors,
)
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

# (epoch, image row, which of its repeats in this epoch), and what another kind of plan adds; draws have their number as
# the third, which differs between repeats likewise
Key = tuple[int, ...]
AHEAD = 4096  # entries of a process that are computed together


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
        lengths = np.array([-(-self.length(epoch) // self.batch) for epoch in range(whole)], dtype=np.int64)
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

    def order(self, epoch: int) -> Batches:
        """The batches of an epoch, to be read piece by piece; the last one is filled up with some pictures more."""
        keys = np.random.default_rng([self.seed, 2, epoch]).integers(2**63, size=5, dtype=np.uint64)
        if self._repeats or self.sampler.name == "plain":
            times = self._filled(epoch, keys[:1])
            return self._batches(len(self.rows), self.rows.__getitem__, times, keys[2:])
        draws = -(-len(self.rows) // self.batch) * self.batch
        if self.sampler.name == "class_aware":
            pairs = self._pairs
            return self._batches(draws, lambda number: class_aware_draws(*pairs, number, keys[1:2]), None, keys[2:])
        chances = np.cumsum(self.image_factors(epoch))
        chances /= chances[-1]

        def rows_of(number: NDArray[np.int64]) -> NDArray[np.int64]:
            return self.rows[np.searchsorted(chances, uniform(number, keys[1:2]), side="right")]

        return self._batches(draws, rows_of, None, keys[2:])

    def _batches(
        self,
        count: int,
        rows_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        times: NDArray[np.unsignedinteger] | None,
        keys: NDArray[np.uint64],
    ) -> EpochOrder:
        """Pictures that come some times are shuffled; draws are in random order already."""
        wide = self._wide if self.group_by_aspect else None
        return EpochOrder(count, rows_of, times, batch=self.batch, wide=wide, keys=keys, shuffled=times is not None)

    def _wide(self, rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.asarray(self.index.widths[rows] > self.index.heights[rows])

    def length(self, epoch: int) -> int:
        """Images of an epoch, with repeats, without those that fill its last batch."""
        if not self._repeats:
            return len(self.rows)
        return sum(int(times.sum()) for times in self._times(epoch))

    @property
    def _repeats(self) -> bool:
        """Whether an epoch has every picture a number of times, its repeat factor rounded."""
        return self.factors is not None or self.sampler.name not in ("plain", "class_aware", *WITH_REPLACEMENT)

    def _times(self, epoch: int) -> Iterator[NDArray[np.int64]]:
        """How often each of `rows` comes in an epoch, in pieces."""
        rng = np.random.default_rng([self.seed, 1, epoch])
        factors = self.image_factors(epoch) if self.factors is None else self.factors
        for start in range(0, len(self.rows), CHUNK):
            rows = self.rows[start : start + CHUNK]
            own = factors[start : start + CHUNK] if self.factors is None else factors[rows]
            yield round_factors(own, self.sampler.rounding, rng.random(len(rows)))

    def _filled(self, epoch: int, key: NDArray[np.uint64]) -> NDArray[np.unsignedinteger]:
        """How often each of `rows` comes, [len(rows)] in as few bytes as it takes; the sum is a multiple of `batch`."""
        images = len(self.rows)
        times = np.ones(images, dtype=np.uint8)
        if self._repeats:
            for start, own in zip(range(0, images, CHUNK), self._times(epoch), strict=True):
                times = times.astype(np.promote_types(times.dtype, np.min_scalar_type(int(own.max()))), copy=False)
                times[start : start + CHUNK] = own
        missing = np.arange(-int(times.sum()) % self.batch)
        highest = int(times.max()) + len(missing) // images + 1
        times = times.astype(np.promote_types(times.dtype, np.min_scalar_type(highest)), copy=False)
        np.add.at(times, keyed_permutation(missing % images, images, key), 1)
        return times

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
        every = factors_of_images(self.index, factors)
        return every if len(self.rows) == len(every) else every[self.rows]

    def epoch(self, epoch: int) -> NDArray[np.int64]:
        """All batches of an epoch: int64 [batches, batch, 2] of (image row, which of its repeats)."""
        return self.order(epoch).all()

    def keys(self, start: int, part: slice, parts: int) -> Iterator[list[Key]]:
        """Micro-batches of one process from iteration `start` on.

        An iteration's batch is cut into `parts` equal pieces (processes x accumulation steps); `part` selects those of
        this process, in order.
        """
        columns = np.arange(self.batch).reshape(parts, -1)[part]
        step = max(1, AHEAD // columns.size)  # batches that are looked up together
        iteration = start
        while iteration < self.iterations:
            epoch = int(np.searchsorted(self.boundaries, iteration, side="right")) - 1
            order = self.order(epoch)
            first, end = int(self.boundaries[epoch]), int(self.boundaries[epoch + 1])
            for batch in range(iteration - first, end - first, step):
                batches = np.arange(batch, min(batch + step, end - first))
                entries = order.read(batches, columns.ravel())
                for piece in entries.reshape(-1, columns.shape[1], entries.shape[-1]).tolist():
                    yield [(epoch, *entry) for entry in piece]
            iteration = end

    @functools.cached_property
    def _labels(self) -> tuple[NDArray[np.integer], NDArray[np.integer]]:
        """(image row, class) of every annotation that trains, of images that take part."""
        trained = self.index.clean().rows
        image_of, labels = self.index.image_of[trained], self.index.labels[trained]
        if len(self.rows) == len(self.index):
            return image_of, labels
        taking_part = np.zeros(len(self.index), dtype=bool)
        taking_part[self.rows] = True
        keep = taking_part[image_of]
        return image_of[keep], labels[keep]

    @functools.cached_property
    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        return class_pairs(*self._labels)
