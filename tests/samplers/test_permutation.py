"""Permutations and random numbers that are computed place by place."""

from __future__ import annotations

import numpy as np
import pytest

from tailfin.samplers.permutation import CHUNK, keyed_permutation, keys, uniform

KEY = np.array([7], np.uint64)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 1000, 65536, 3 * CHUNK + 1])
def test_every_place_is_taken_once(size):
    for number in range(3):
        found = keyed_permutation(np.arange(size), size, keys(np.array([number]), KEY))
        np.testing.assert_array_equal(np.sort(found), np.arange(size))


def test_places_can_be_read_alone():
    """Each with its own size and key, and beyond 16 bits a side."""
    size = np.array([5, 100_003, 2**32, 1, 2**31 + 11])
    own = keys(np.arange(5), KEY)
    place = size - 1
    found = keyed_permutation(place, size, own)
    for number in range(5):
        alone = keyed_permutation(place[number : number + 1], int(size[number]), own[number : number + 1])
        assert alone[0] == found[number] < size[number]
    several = keyed_permutation(np.arange(200_000) * 21_474, 2**32, KEY)
    assert len(np.unique(several)) == 200_000
    with pytest.raises(ValueError, match="a permutation of more than 4294967296 places"):
        keyed_permutation(np.zeros(1, np.int64), 2**32 + 1, KEY)


def test_another_key_is_another_permutation():
    first, second = (keyed_permutation(np.arange(1000), 1000, keys(np.array([number]), KEY)) for number in (0, 1))
    assert (first == second).mean() < 0.02
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15


def test_all_orders_of_four_come_alike():
    number = 24_000
    own = keys(np.arange(number), KEY)
    orders = np.stack([keyed_permutation(np.full(number, place), 4, own) for place in range(4)], axis=1)
    found, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(found) == 24 and counts.min() > 800 and counts.max() < 1250


def test_uniform_numbers():
    found = uniform(np.arange(100_000), KEY)
    counts = np.histogram(found, bins=50, range=(0, 1))[0]
    assert counts.sum() == 100_000 and np.abs(counts - 2000).max() < 250
    assert abs(np.corrcoef(found[1:], found[:-1])[0, 1]) < 0.02
    np.testing.assert_array_equal(uniform(np.array([5, 77]), KEY), found[[5, 77]])
