"""Step-wise repeat factor sampling: factors by hand, the presets, and the order as a function of (seed, epoch)."""

from __future__ import annotations

import numpy as np
import pytest

from tailfin.data.index import open_index
from tailfin.data.smooth_tail import divide
from tailfin.errors import UserError
from tailfin.samplers.plan import BatchPlan
from tailfin.samplers.stepwise import band_factors, bands_of, step_factors
from tailfin.schema.stepwise import Band, StepSampler, Stepwise
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

COUNTS = np.array([500, 100, 60, 30, 11, 10, 1, 0])
OWN = np.array([200, 90, 1, 30, 2, 10, 1, 0])


def test_released_bands_by_hand():
    images = 10_000
    first = band_factors(COUNTS, OWN, images, bands_of(StepSampler(), expert=True))
    share = OWN / images
    expected = [1, 1, (0.003 / share[2]) ** 0.3, 1, (0.003 / share[4]) ** 0.5, (0.003 / share[5]) ** 0.5, 30**0.5, 1]
    np.testing.assert_allclose(first, np.maximum(1, expected))
    second = band_factors(COUNTS, OWN, images, bands_of(StepSampler(), expert=False))
    np.testing.assert_allclose(second, [1, 1, 1, 1, 7.5, 1.5, 15, 1])
    third = band_factors(COUNTS, OWN, images, bands_of(StepSampler(), expert=False, division=(10, 30)))
    np.testing.assert_allclose(third, [1, 1, 1, 1, 1, 1.5**0.5, 15**0.5, 1])


@pytest.mark.parametrize("boundary", ["gt", "ge"])
@pytest.mark.parametrize("cut", [5, 30, 50, 100, 200])
def test_bands_follow_the_division(cut, boundary):
    """Every tail class is repeated in step 2 and no head class, whatever parts them."""
    counts = np.arange(1, 301)
    tail = divide(counts, (cut,), boundary) == 1
    shown = np.ones_like(counts)  # of 10,000 images: far below every threshold
    second = band_factors(counts, shown, 10_000, bands_of(StepSampler(), False, (cut,), boundary))
    np.testing.assert_allclose(second, np.where(tail, 15, 1))
    first = band_factors(counts, shown, 10_000, bands_of(StepSampler(), True, (cut,), boundary))
    common = np.where(counts <= 100, 30**0.3, 1)
    np.testing.assert_allclose(first, np.where(tail, 30**0.5, common))


def test_a_class_above_the_threshold_is_not_repeated():
    bands = (Band(images=100, threshold=0.003, power=0.5),)
    assert band_factors(np.array([50]), np.array([30]), 10_000, bands).item() == 1
    assert band_factors(np.array([50]), np.array([29]), 10_000, bands).item() > 1


@pytest.mark.parametrize("expert", [True, False])
def test_paper_repeats_the_classes_of_the_step_alone(expert):
    image_of, labels = np.arange(1000), np.repeat([0, 1, 2], [990, 6, 4])
    counts = np.array([990, 40, 8])  # head, head of the second band, tail
    own = np.array([True, True, False]) if expert else np.array([False, False, True])
    threshold = [Band(images=100, threshold=0.5, power=1.0)]
    options = {"expert": expert}
    factors = step_factors(image_of, labels, 1000, counts, StepSampler(name="paper"), own, **options)
    released = step_factors(image_of, labels, 1000, counts, StepSampler(), own, **options)
    assert (factors[labels == 0] == 1).all()
    boosted = 1 if expert else 2
    assert (factors[labels == 3 - boosted] == 1).all()
    np.testing.assert_array_equal(factors[labels == boosted], released[labels == boosted])
    mine = StepSampler(name="bands", bands=threshold)
    factors = step_factors(image_of, labels, 1000, counts, mine, own, **options)
    np.testing.assert_allclose([factors[992], factors[999]], [0.5 / 0.006, 0.5 / 0.004])


def test_plain_repeats_nothing():
    factors = step_factors(
        np.arange(10), np.zeros(10, np.int64), 10, np.array([10]), StepSampler(name="plain"), np.array([True]),
        expert=True,
    )  # fmt: skip
    assert (factors == 1).all()


def test_plan_takes_the_factors(tiny_set):
    index = open_index(tiny_set[0])
    rows = np.arange(0, len(index), 2)
    factors = np.ones(len(index))
    factors[[4, 6]] = 2.2, 3.0

    def plan(seed: int) -> BatchPlan:
        sampler = Sampler(name="plain", rounding="ceil")
        return BatchPlan(index, rows, ClassStats.from_index(index), sampler, 1, 2, seed, factors=factors)

    def order(seed: int, epoch: int) -> np.ndarray:
        return plan(seed).epoch(epoch)[:, 0, 0]

    assert len(order(0, 0)) == plan(0).length(0) == np.ceil(factors[rows]).sum()
    np.testing.assert_array_equal(np.bincount(order(0, 0), minlength=len(index))[[0, 1, 4, 6]], [1, 0, 3, 3])
    np.testing.assert_array_equal(order(0, 1), order(0, 1))
    assert (order(0, 0) != order(0, 1)).any() and (order(0, 0) != order(1, 0)).any()


def test_stochastic_rounding_has_the_factor_as_its_mean(tiny_set):
    index = open_index(tiny_set[0])
    sampler = Sampler(name="plain", rounding="stochastic")
    stats = ClassStats.from_index(index)
    plan = BatchPlan(index, np.arange(20), stats, sampler, 4, 200, 0, factors=np.full(len(index), 1.25))
    assert np.mean([plan.length(epoch) for epoch in range(200)]) / 20 == pytest.approx(1.25, abs=0.03)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head": {"rfs": "rleased"}}, "released"),
        ({"head": {"rfs": {"name": "bands"}}}, "needs some"),
        ({"head": {"rfs": {"bands": [{"images": 3, "threshold": 0.1, "power": 1}]}}}, 'bands go with name "bands"'),
        ({"division": [30, 10]}, "division must ascend"),
        ({"tail": {"per_head_class": 501}}, "exemplars.length, 500"),
        ({"tail": {"per_head_class": 0, "per_tail_class": 0}}, "nothing would be left"),
    ],
)
def test_mistakes_in_the_section(values, message):
    from pydantic import ValidationError

    from tailfin.schema.problems import explain

    with pytest.raises(ValidationError) as caught:
        Stepwise.model_validate(values)
    assert message in explain(caught.value, "recipe", Stepwise)


def test_method_and_section_go_together():
    from tailfin.config import load_recipe

    with pytest.raises(UserError, match="method stepwise needs a section `stepwise`"):
        load_recipe("fod/faster_rcnn_r18_softmax", ["method=stepwise"])
    with pytest.raises(UserError, match="method baseline has no section `stepwise`"):
        load_recipe("fod/faster_rcnn_r18_softmax", ["stepwise.division=[3]"])
