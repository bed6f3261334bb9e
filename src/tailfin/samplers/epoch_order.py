"""The batches of one epoch, any of which is read without the others: a process computes what it shows, no list.

An epoch consists of units, pictures that come some `times` or draws that come once. Its entries are numbered unit by
unit, those of wide and of upright pictures apart, and a keyed permutation says which entry stands at a place. Stored
are `times` and, per block of units, how many entries stand before it: about two bytes a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tailfin.samplers.permutation import CHUNK, keyed_permutation

BLOCK = 16  # units; of the block that an entry is in, all are looked at
SIDES = 2  # upright or wide


class Batches(Protocol):
    """What a plan's epochs are."""

    def read(self, batches: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Entries int64 [batches, columns, 2 or more] of some batches, and of these the given columns."""
        ...

    def all(self) -> NDArray[np.int64]:
        """Every batch, int64 [batches, batch, 2 or more]."""
        ...


class EpochOrder:
    """Whole batches of `batch` entries; (image row, a number that differs between entries of the same image).

    Args:
        count: units.
        rows_of: image rows int64 [N] of units int64 [N].
        times: [count] how often each unit comes, or none: once.
        batch: entries of a batch; the sum of `times` is a multiple of it.
        wide: whether image rows [N] are wide, bool [N]; where given, batches hold wide or upright pictures alone, but
            for one of what is left over of both.
        keys: uint64 [3], of upright entries, wide entries and batches.
        shuffled: whether entries are permuted; without, they come unit by unit.
    """

    def __init__(
        self,
        count: int,
        rows_of: Callable[[NDArray[np.int64]], NDArray[np.int64]],
        times: NDArray[np.unsignedinteger] | None,
        *,
        batch: int,
        wide: Callable[[NDArray[np.int64]], NDArray[np.bool_]] | None,
        keys: NDArray[np.uint64],
        shuffled: bool,
    ) -> None:
        self.count, self.rows_of, self.times, self.batch = count, rows_of, times, batch
        self.wide, self.keys, self.shuffled = wide, keys, shuffled
        self.before = self._counted()
        self.sizes = self.before[:, -1]

    def __len__(self) -> int:
        """Batches."""
        return int(self.sizes.sum()) // self.batch

    def read(self, batches: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Entries int64 [batches, columns, 2] of some batches, and of these the given columns."""
        if self.wide is not None:
            batches = keyed_permutation(batches, len(self), self.keys[2:])
        place = (batches[:, None] * self.batch + columns).ravel()
        # whole batches of upright pictures, whole batches of wide ones, what is left of both
        whole = self.sizes // self.batch * self.batch
        rest = place - whole.sum()
        leftover = self.sizes[0] - whole[0]
        side = np.where(rest < 0, place >= whole[0], rest >= leftover).astype(np.int64)
        beyond = np.where(side == 0, rest + whole[0], rest - leftover + whole[1])
        place = np.where(rest < 0, place - side * whole[0], beyond)
        found = np.empty((len(place), 2), dtype=np.int64)
        for own in range(len(self.sizes)):
            mine = np.flatnonzero(side == own)
            if len(mine):
                found[mine] = self._found(own, place[mine])
        return found.reshape(len(batches), len(columns), 2)

    def all(self) -> NDArray[np.int64]:
        """Every batch, int64 [batches, batch, 2]."""
        columns, step = np.arange(self.batch), max(1, CHUNK // self.batch)
        parts = [np.arange(start, min(start + step, len(self))) for start in range(0, len(self), step)]
        return np.concatenate([self.read(part, columns) for part in parts])

    def _counted(self) -> NDArray[np.int64]:
        """Entries of each side before each block, and all at the end, int64 [2, blocks + 1]."""
        before = np.zeros((SIDES, -(-self.count // BLOCK) + 1), dtype=np.int64)
        for start in range(0, self.count, CHUNK):
            units = np.arange(start, min(start + CHUNK, self.count))
            blocks = np.arange(0, len(units), BLOCK)
            into = slice(start // BLOCK + 1, start // BLOCK + 1 + len(blocks))
            for side, times in enumerate(self._by_side(units)):
                before[side, into] = np.add.reduceat(times, blocks)
        return np.cumsum(before, axis=1, out=before)

    def _by_side(self, units: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """How often the units [N] come as upright pictures (and all without sides), and as wide ones, int64 [N]."""
        times = np.ones(len(units), dtype=np.int64) if self.times is None else self.times[units].astype(np.int64)
        wide = np.zeros(len(units), dtype=bool) if self.wide is None else self.wide(self.rows_of(units))
        yield np.where(wide, 0, times)
        yield np.where(wide, times, 0)

    def _found(self, side: int, place: NDArray[np.int64]) -> NDArray[np.int64]:
        """(image row, number) of the entries of a side at some places, int64 [N, 2]."""
        before = self.before[side]
        entry = keyed_permutation(place, int(self.sizes[side]), self.keys[side : side + 1]) if self.shuffled else place
        blocks, own = np.unique(np.searchsorted(before, entry, side="right") - 1, return_inverse=True)
        units = (blocks[:, None] * BLOCK + np.arange(BLOCK)).ravel()
        inside = units < self.count
        units = np.where(inside, units, self.count - 1)
        times = (list(self._by_side(units))[side] * inside).reshape(-1, BLOCK)
        ends = times.cumsum(axis=1)
        within = entry - before[blocks[own]]
        number = (ends[own] <= within[:, None]).sum(axis=1)  # of the unit in its block
        unit = units.reshape(-1, BLOCK)[own, number]
        turn = unit if self.times is None else within - (ends - times)[own, number]
        return np.stack([self.rows_of(unit), turn], axis=1)
