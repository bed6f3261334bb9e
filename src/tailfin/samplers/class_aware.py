"""Class-aware sampling (Shen et al., ECCV'16): first a class, every class equally often, then one of its images.

Both are endless shuffled streams: each class comes once before any comes again, and so does each image of a class. The
order of a class's images is a keyed permutation, of which single places are computed: no list of all pairs of class and
image is shuffled, however often rare classes go round.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

ROUNDS = 5  # of the Feistel network
CHUNK = 1 << 15  # places at a time, which stay in the processor's cache
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def class_aware_order(
    image_of: NDArray[np.int64], labels: NDArray[np.int64], num_draws: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`num_draws` image rows; (`image_of`, `labels`) list every annotation. Classes without an image are left out."""
    return class_aware_draws(*class_pairs(image_of, labels), num_draws, rng)


def class_pairs(
    image_of: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(images, first, sizes): the images of every class that has one, class after class, each once; where a class's
    images begin, and how many there are."""
    if len(labels) == 0:
        raise ValueError("class-aware sampling needs at least one annotation")
    width = int(image_of.max()) + 1
    pairs = np.sort(labels * np.int64(width) + image_of)  # sorted and compared: np.unique takes ten times as long
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    classes, images = np.divmod(pairs, width)
    first = np.flatnonzero(np.append(True, classes[1:] != classes[:-1]))
    return images, first, np.diff(np.append(first, len(images)))


def class_aware_draws(
    images: NDArray[np.int64],
    first: NDArray[np.int64],
    sizes: NDArray[np.int64],
    num_draws: int,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """`class_aware_order` from what `class_pairs` gives, which is the same for every epoch."""
    classes = len(sizes)
    rounds = -(-num_draws // classes)
    # class stream: one permutation of the classes per round; a class comes once a round
    stream = rng.permuted(np.tile(np.arange(classes), (rounds, 1)), axis=1).reshape(-1)[:num_draws]
    round_of = np.repeat(np.arange(rounds), classes)[:num_draws]
    # image stream of a class: a new permutation of its images each time it is used up
    size = sizes[stream]
    seed = rng.integers(2**63, dtype=np.uint64)
    key = _mixed(stream.astype(np.uint64) * _GOLDEN ^ _mixed((round_of // size).astype(np.uint64) + seed))
    return images[first[stream] + keyed_permutation(round_of % size, size, key)]


def keyed_permutation(place: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Where `place` of 0..size-1 goes, in a permutation chosen by `key`, elementwise, int64 [N].

    A Feistel network on the next power of four, walked until it falls below `size` (Black and Rogaway, 2002).
    """
    found = np.empty(len(place), dtype=np.int64)
    for start in range(0, len(place), CHUNK):
        part = slice(start, start + CHUNK)
        _walk(place[part].astype(np.uint64), size[part].astype(np.uint64), key[part], found[part])
    return found


def _walk(
    value: NDArray[np.uint64], size: NDArray[np.uint64], key: NDArray[np.uint64], found: NDArray[np.int64]
) -> None:
    """`keyed_permutation` of some places, written into `found`."""
    _, bits = np.frexp((np.maximum(size, 2) - 1).astype(np.float64))  # of the largest place
    half = ((bits + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    left = np.arange(len(value))
    while len(left):
        high, low = value >> half, value & mask
        for number in range(ROUNDS):
            high, low = low, high ^ (_mixed(low * _GOLDEN + key + np.uint64(number)) & mask)
        value = high << half | low
        done = value < size
        found[left[done]] = value[done]
        rest = ~done
        left, value, size, key = left[rest], value[rest], size[rest], key[rest]
        half, mask = half[rest], mask[rest]


def _mixed(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits of splitmix64's last step, modulo 2^64."""
    value = (value ^ (value >> np.uint64(30))) * _MIX[0]
    value = (value ^ (value >> np.uint64(27))) * _MIX[1]
    return value ^ (value >> np.uint64(31))
