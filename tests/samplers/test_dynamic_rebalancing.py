"""2DRCL's dynamic rebalancing (eq. 4): how a class's share, its factor and the epochs hang together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailfin.data.index import open_index
from tailfin.samplers import category_factors, image_factors, round_factors
from tailfin.samplers.plan import BatchPlan
from tailfin.samplers.repeat_factor import training_labels
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

COUNTS = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 500)), min_size=1, max_size=6)


def stats_of(counts: list[tuple[int, int]]) -> ClassStats:
    images = [one for one, _ in counts]
    return ClassStats(
        image_count=images, instance_count=[one + more for one, more in counts], num_images=max(images) + 300
    )


def share(stats: ClassStats, progress: float) -> np.ndarray:
    """f_c, read back from its factor at a threshold so high that every class is repeated."""
    return 1e6 / category_factors(stats, "dynamic", 1e6, progress) ** 2


@given(COUNTS)
def test_the_ends_and_the_middle(counts):
    stats = stats_of(counts)
    image = np.array([one for one, _ in counts]) / stats.num_images
    instance = np.array(stats.instance_count) / np.sum(stats.instance_count)
    np.testing.assert_allclose(share(stats, 0.0), image, rtol=1e-9)
    np.testing.assert_allclose(share(stats, 1.0), instance, rtol=1e-9)
    np.testing.assert_allclose(share(stats, 0.5), 2 * image * instance / (image + instance), rtol=1e-9)


@given(COUNTS, st.floats(0, 1), st.floats(1e-4, 1))
def test_bounds(counts, progress, threshold):
    stats = stats_of(counts)
    ends = np.stack([share(stats, 0.0), share(stats, 1.0)])
    between = share(stats, progress)
    assert (between >= ends.min(0) * (1 - 1e-9)).all() and (between <= ends.max(0) * (1 + 1e-9)).all()
    factors = category_factors(stats, "dynamic", threshold, progress)
    assert (factors >= 1).all()
    clear = np.abs(between / threshold - 1) > 1e-9
    assert ((factors == 1) == (between >= threshold))[clear].all()


@given(st.integers(1, 50), st.integers(1, 5), st.floats(0, 1))
def test_equal_shares_do_not_depend_on_progress(count, classes, progress):
    """One object per picture, no empty picture: both shares are the same."""
    stats = ClassStats(image_count=[count] * classes, instance_count=[count] * classes, num_images=count * classes)
    np.testing.assert_allclose(share(stats, progress), share(stats, 0.0), rtol=1e-9)


def test_stochastic_rounding_has_the_factor_as_its_mean():
    factors = np.array([1.0, 1.25, 2.5, 3.9])
    draws = np.stack(
        [round_factors(factors, "stochastic", np.random.default_rng([0, epoch]).random(4)) for epoch in range(4000)]
    )
    assert (draws >= np.floor(factors)).all() and (draws <= np.ceil(factors)).all()
    assert draws.mean(0) == pytest.approx(factors, abs=0.03)
    again = round_factors(factors, "stochastic", np.random.default_rng([0, 7]).random(4))
    assert (again == draws[7]).all()


@pytest.mark.parametrize(("first", "shares"), [(0, (0.0, 0.5)), (1, (0.5, 1.0))])
def test_the_number_of_the_first_epoch(tiny_set, first, shares):
    """From 0, two epochs go by the images' shares and by both; from 1, by both and by the instances'."""
    index = open_index(tiny_set[0])
    stats = ClassStats(image_count=[20, 10, 2], instance_count=[200, 10, 20], num_images=26)
    sampler = Sampler(name="dynamic", threshold=0.9, rounding="ceil", first_epoch=first)
    plan = BatchPlan(index, np.arange(len(index)), stats, sampler, batch=1, epochs=2, seed=0)
    for epoch, progress in enumerate(shares):
        factors = image_factors(category_factors(stats, "dynamic", 0.9, progress), *training_labels(index), len(index))
        counted = np.bincount(plan.epoch(epoch)[:, 0, 0], minlength=len(index))
        np.testing.assert_array_equal(counted, np.ceil(factors))
    assert plan.length(0) != plan.length(1)
