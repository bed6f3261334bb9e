"""Permutations and random numbers of which single places are computed: nothing of an epoch has to be stored for them.

keyed_permutation(place, size, key)   where a place of 0..size-1 goes
uniform(number, key)                  the number-th random number
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 5  # of the Feistel network
LARGEST = 2**32  # places: halves and their products fit 32 bits
CHUNK = 1 << 14  # places at a time, which stay in the processor's cache
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX32 = (np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35))  # of MurmurHash3
_GOLDEN32 = np.uint32(0x9E3779B1)
_HALF = np.uint32(16)


def keyed_permutation(
    place: NDArray[np.int64], size: NDArray[np.int64] | int, key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """Where `place` of 0..size-1 goes, in a permutation chosen by `key`, int64 [N].

    A Feistel network on the least grid of nearly equal sides that holds `size` places, walked until it falls on one of
    these (Black and Rogaway, 2002, generalised Feistel and cycle walking).

    Args:
        place: [N].
        size: of all or of each, at most 2^32.
        key: [1] or [N].
    """
    size = np.broadcast_to(np.asarray(size, dtype=np.int64), place.shape)
    key = np.broadcast_to(key, place.shape)
    if len(size) and size.max() > LARGEST:
        raise ValueError(f"a permutation of more than {LARGEST} places")
    found = np.empty(len(place), dtype=np.int64)
    for start in range(0, len(place), CHUNK):
        part = slice(start, start + CHUNK)
        _walk(place[part], size[part], key[part], found[part])
    return found


def mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits of splitmix64's last step, modulo 2^64."""
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return value ^ (value >> np.uint64(31))


def keys(number: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A key for each number, uint64 [N], from a `key` [1] or [N]."""
    return mixed(number.astype(np.uint64) * _GOLDEN + mixed(key))


def uniform(number: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The random numbers in 0..1 that a `key` [1] has at the places `number`, float64 [N]."""
    return (keys(number, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _walk(place: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64], found: NDArray[np.int64]) -> None:
    """`keyed_permutation` of some places, written into `found`."""
    rows = np.ceil(np.sqrt(size)).astype(np.int64)
    columns = -(-size // np.maximum(rows, 1))
    high, low = np.divmod(place, columns)
    down, across = high.astype(np.uint32), low.astype(np.uint32)
    sides = rows.astype(np.uint32), columns.astype(np.uint32)
    first, second = (key >> np.uint64(32)).astype(np.uint32), key.astype(np.uint32)
    left = np.arange(len(place))
    while len(left):
        for number in range(ROUNDS):
            own = first + second * np.uint32(2 * number + 1)
            if number % 2:
                across = _shifted(across, down, own, sides[1])
            else:
                down = _shifted(down, across, own, sides[0])
        value = down.astype(np.int64) * columns + across
        done = value < size
        found[left[done]] = value[done]
        if done.all():
            return
        rest = ~done
        left, size, columns, first, second = left[rest], size[rest], columns[rest], first[rest], second[rest]
        down, across, sides = down[rest], across[rest], (sides[0][rest], sides[1][rest])


def _shifted(
    moved: NDArray[np.uint32], by: NDArray[np.uint32], key: NDArray[np.uint32], side: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """`moved` on by a random number of `by` and `key` below `side`, modulo `side`."""
    bits = by * _GOLDEN32 + key
    bits ^= bits >> _HALF
    bits *= _MIX32[0]
    bits ^= bits >> np.uint32(13)
    bits *= _MIX32[1]
    bits >>= _HALF
    bits *= side
    bits >>= _HALF
    bits += moved  # below twice the side, 2^17
    return np.minimum(bits, bits - side)  # where it is below the side, the difference is beyond 2^32
