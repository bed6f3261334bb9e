"""Class-aware sampling (Shen et al., ECCV'16): first a class, every class equally often, then one of its images.

Both are endless shuffled streams: each class comes once before any comes again, and so does each image of a class. The
orders are keyed permutations, of which single places are computed: a draw is a function of its number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tailfin.samplers.permutation import CHUNK, keyed_permutation, keys


def class_aware_order(
    image_of: NDArray[np.int64], labels: NDArray[np.int64], num_draws: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """`num_draws` image rows; (`image_of`, `labels`) list every annotation. Classes without an image are left out."""
    key = rng.integers(2**63, size=1, dtype=np.uint64)
    return class_aware_draws(*class_pairs(image_of, labels), np.arange(num_draws), key)


def class_pairs(
    image_of: NDArray[np.integer], labels: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(images, first, sizes): the images of every class that has one, class after class, each once; where a class's
    images begin, and how many there are."""
    if len(labels) == 0:
        raise ValueError("class-aware sampling needs at least one annotation")
    bits = int(image_of.max()).bit_length()
    pairs = labels.astype(np.int64)
    pairs <<= bits
    pairs |= image_of
    pairs.sort()  # sorted and compared: np.unique takes ten times as long
    pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
    classes = pairs >> bits
    first = np.flatnonzero(np.append(True, classes[1:] != classes[:-1]))
    pairs &= (1 << bits) - 1
    return pairs, first, np.diff(np.append(first, len(pairs)))


def class_aware_draws(
    images: NDArray[np.int64],
    first: NDArray[np.int64],
    sizes: NDArray[np.int64],
    number: NDArray[np.int64],
    key: NDArray[np.uint64],
) -> NDArray[np.int64]:
    """Image rows of the draws `number` [N] of the stream that `key` [1] chooses; the first three of `class_pairs`."""
    found = np.empty(len(number), dtype=np.int64)
    for start in range(0, len(number), CHUNK):
        part = slice(start, start + CHUNK)
        turn, place = np.divmod(number[part], len(sizes))
        drawn = keyed_permutation(place, len(sizes), keys(turn, key))  # every class once a turn
        size = sizes[drawn]
        lap, place = np.divmod(turn, size)  # a new permutation of its images each time they are used up
        found[part] = images[first[drawn] + keyed_permutation(place, size, keys(lap, keys(drawn, ~key)))]
    return found
