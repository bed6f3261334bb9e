"""Pictures that show nearly the same: duplicates within a set, leaks between training and validation.

    hashes = picture_hashes(paths)
    for first, second, distance in near_pairs(hashes): ...

A picture's hash has 64 bits, whether each of 8 x 8 cells is brighter than its right neighbour, of the picture at 9 x 8
pixels of grey; a flat picture has no hash. Pairs whose hashes differ in few bits are looked at again at 16 x 16 pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tailfin.errors import UserError

BITS = 3  # that the hashes of a pair may differ in
DIFFERENCE = 10.0  # mean, of grey values 0..255 at 16 x 16 pixels, brightness aside
_FLAT = 4.0  # spread of grey values, below which a picture has nothing to compare
_BUCKET = 400  # pictures with one part of the hash in common that are compared with each other


class Hashes(NamedTuple):
    """Of N pictures."""

    codes: NDArray[np.uint64]  # [N]
    small: NDArray[np.uint8]  # [N, 16, 16]
    usable: NDArray[np.bool_]  # [N] read, and not flat


def picture_hashes(paths: Iterable[Path]) -> Hashes:
    """Hashes of pictures; one that cannot be read is not usable."""
    small: list[NDArray[np.uint8]] = []
    cells: list[NDArray[np.uint8]] = []
    read: list[bool] = []
    for path in paths:
        try:
            with Image.open(path) as picture:
                picture.draft("L", (32, 32))  # JPEG decodes no more than it needs
                grey = picture.convert("L")
                cells.append(np.asarray(grey.resize((9, 8), Image.Resampling.BILINEAR)))
                small.append(np.asarray(grey.resize((16, 16), Image.Resampling.BILINEAR)))
                read.append(True)
        except (OSError, ValueError, UserError, Image.DecompressionBombError):
            cells.append(np.zeros((8, 9), np.uint8))
            small.append(np.zeros((16, 16), np.uint8))
            read.append(False)
    if not read:
        return Hashes(np.empty(0, np.uint64), np.empty((0, 16, 16), np.uint8), np.empty(0, bool))
    table = np.stack(cells).astype(np.int16)
    bits = (table[:, :, 1:] < table[:, :, :-1]).reshape(len(table), 64)
    codes = np.packbits(bits, axis=1).view(np.uint64)[:, 0]
    thumbnails = np.stack(small)
    spread = thumbnails.reshape(len(thumbnails), -1).std(axis=1)
    return Hashes(codes, thumbnails, np.array(read) & (spread >= _FLAT))


def near_pairs(found: Hashes, other: Hashes | None = None) -> list[tuple[int, int, float]]:
    """(place, place, difference of grey values) of near duplicates, the most alike first: within one set, or of one
    with another."""
    both = found if other is None else Hashes(*(np.concatenate([a, b]) for a, b in zip(found, other, strict=True)))
    number = len(found.codes)
    pairs: set[tuple[int, int]] = set()
    for first, second in _candidates(both):
        keep = np.bitwise_count(both.codes[first] ^ both.codes[second]) <= BITS
        if other is not None:
            keep &= (first < number) & (second >= number)
        pairs.update(zip(first[keep].tolist(), second[keep].tolist(), strict=True))
    if not pairs:
        return []
    places = np.array(sorted(pairs), dtype=np.int64)
    one, two = (both.small[places[:, side]].astype(np.float64).reshape(len(places), -1) for side in (0, 1))
    one, two = (values - values.mean(axis=1, keepdims=True) for values in (one, two))
    difference = np.abs(one - two).mean(axis=1)
    order = np.argsort(difference, kind="stable")
    order = order[difference[order] <= DIFFERENCE]
    shift = number if other is not None else 0
    return [(int(places[row, 0]), int(places[row, 1]) - shift, float(difference[row])) for row in order]


# ---- details ---------------------------------------------------------------------------------------------------------


def _candidates(found: Hashes) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs (lower place first) that have a quarter of the hash in common, as all within 3 bits do."""
    usable = np.flatnonzero(found.usable)
    for part in range(4):
        block = (found.codes[usable] >> np.uint64(16 * part)) & np.uint64(0xFFFF)
        order = np.argsort(block, kind="stable")
        starts = np.flatnonzero(np.diff(block[order].astype(np.int64), prepend=-1))
        sizes = np.diff(starts, append=len(order))
        for start, size in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
            members = np.sort(usable[order[start : start + min(size, _BUCKET)]])
            first, second = np.triu_indices(len(members), 1)
            yield members[first], members[second]
