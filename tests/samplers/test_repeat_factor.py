"""Repeat factors against the reference vectors, and their properties."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin import ClassStats, samplers
from tailfin.errors import UserError
from tailfin.samplers.class_aware import class_aware_order
from tailfin.samplers.repeat_factor import image_factors, round_factors


class Table:
    def __init__(self, golden_dir, name: str, file: str = "samplers.npz") -> None:
        data = np.load(golden_dir / file)
        self.values = {key.removeprefix(f"{name}/"): data[key] for key in data.files if key.startswith(f"{name}/")}
        self.images, self.classes = int(self["num_images"]), int(self["num_classes"])
        self.image_of, self.labels = self["ann_image"], self["ann_category"]
        self.threshold = float(self["hp/thresh"])
        pairs = np.unique(np.stack([self.labels, self.image_of], 1), axis=0)
        self.stats = ClassStats(
            image_count=np.bincount(pairs[:, 0], minlength=self.classes),
            instance_count=np.bincount(self.labels, minlength=self.classes),
            num_images=self.images,
        )

    def __getitem__(self, key: str) -> np.ndarray:
        return self.values[key]

    def factors(self, policy: str, progress: float = 0.0, **options) -> np.ndarray:
        per_class = samplers.category_factors(self.stats, policy, self.threshold, progress, **options)
        return image_factors(per_class, self.image_of, self.labels, self.images)


@pytest.fixture(params=["table0", "table1"])
def table(request, golden_dir) -> Table:
    return Table(golden_dir, request.param)


@pytest.fixture(params=["table0", "table1"])
def extra(request, golden_dir) -> Table:
    return Table(golden_dir, request.param, "samplers_extra.npz")


def test_rfs_factors(table):
    np.testing.assert_allclose(table.factors("rfs"), table["d2_repeat_factor"], rtol=1e-6)
    np.testing.assert_allclose(table.factors("rfs"), table["mmdet_repeat_factor"], rtol=1e-6)


def test_stochastic_rounding_gives_the_reference_epoch(table):
    repeats = round_factors(table["d2_repeat_factor"], "stochastic", table["rounding_uniform"])
    np.testing.assert_array_equal(np.repeat(np.arange(table.images), repeats), table["d2_epoch_indices"])


def test_ceil_rounding_gives_the_reference_epoch(table):
    repeats = round_factors(table.factors("rfs"), "ceil")
    np.testing.assert_array_equal(np.repeat(np.arange(table.images), repeats), table["mmdet_repeat_indices"])


def test_irfs_factors(table):
    per_class = samplers.category_factors(table.stats, "irfs", table.threshold)
    np.testing.assert_allclose(per_class, table["PAPER_irfs_category_factor"], rtol=1e-9)
    np.testing.assert_allclose(table.factors("irfs"), table["PAPER_irfs_image_factor"], rtol=1e-9)


@pytest.mark.parametrize("epoch", [0, 1, 3, 6])
def test_dynamic_factors(table, epoch):
    key = f"PAPER_2drcl_epoch{epoch}of6"
    progress = float(table[f"{key}/alpha"])
    per_class = samplers.category_factors(table.stats, "dynamic", table.threshold, progress)
    np.testing.assert_allclose(per_class, table[f"{key}/category_factor"], rtol=1e-9)
    np.testing.assert_allclose(table.factors("dynamic", progress), table[f"{key}/image_factor"], rtol=1e-9)


def test_powers(extra):
    np.testing.assert_allclose(extra.factors("rfs"), extra["d2_repeat_factor"], rtol=1e-6)
    np.testing.assert_allclose(extra.factors("rfs", exponent=1.0), extra["d2_repeat_factor_nosqrt"], rtol=1e-6)
    for power in ("0.25", "0.5", "1"):
        found = samplers.category_factors(extra.stats, threshold=extra.threshold, exponent=float(power))
        np.testing.assert_allclose(found, extra[f"up_power{power}/category_factor"], rtol=1e-9)


@pytest.mark.parametrize("power", ["0.25", "0.5", "1"])
def test_roundings(extra, power):
    factors = extra.factors("rfs", exponent=float(power))
    for rounding in ("ceil", "floor", "round"):
        np.testing.assert_array_equal(round_factors(factors, rounding), extra[f"up_power{power}/{rounding}/repeats"])
    uniform = extra[f"up_power{power}/random_round/uniform_per_image"]
    expected = extra[f"up_power{power}/random_round/repeats"]
    np.testing.assert_array_equal(round_factors(factors, "stochastic", uniform), expected)


def test_half_rounds_to_even():
    assert round_factors(np.array([1.5, 2.5, 3.5, 1.2]), "round").tolist() == [2, 2, 4, 1]
    with pytest.raises(ValueError, match=r'no rounding "flor" \(did you mean "floor"'):
        round_factors(np.ones(2), "flor")


@pytest.mark.parametrize("threshold", ["0.0001", "0.001"])
@pytest.mark.parametrize("alpha", [1, 2, 3])
@pytest.mark.parametrize(("policy", "key"), [("eirfs", "eirfs_official"), ("eirfs_paper", "PAPER_eirfs")])
def test_eirfs(extra, policy, key, alpha, threshold):
    prefix = f"{key}_alpha{alpha}_t{threshold}"
    factors = samplers.category_factors(extra.stats, policy, threshold=float(threshold), alpha=alpha)
    np.testing.assert_allclose(factors, extra[f"{prefix}/category_factor"], rtol=1e-6)
    per_image = image_factors(factors, extra.image_of, extra.labels, extra.images)
    np.testing.assert_allclose(per_image, extra[f"{prefix}/image_factor"], rtol=1e-6)
    np.testing.assert_allclose(per_image / per_image.sum(), extra[f"{prefix}/sampling_probability"], rtol=1e-6)


def test_eirfs_of_absent_classes():
    stats = ClassStats(image_count=[8, 2, 0], instance_count=[9, 2, 0], num_images=10)
    released = samplers.category_factors(stats, "eirfs", 0.1)
    # image counts 8, 2, 1 of 11; instances 10, 3, 1 of 14
    shares = np.sqrt(np.array([8, 2, 1]) / 11 * np.array([10, 3, 1]) / 14)
    np.testing.assert_allclose(released, np.exp(2 * np.sqrt(0.1 / shares)), rtol=1e-12)
    paper = samplers.category_factors(stats, "eirfs_paper", 0.1)
    np.testing.assert_allclose(paper[:2], np.exp(2 * np.sqrt(0.1 / np.sqrt([0.8 * 9 / 11, 0.2 * 2 / 11]))), rtol=1e-12)
    assert paper[2] == 1
    with pytest.raises(UserError, match="lower the threshold or alpha"):
        samplers.category_factors(stats, "eirfs", 1e9)


def test_dynamic_starts_as_rfs(table):
    np.testing.assert_allclose(table.factors("dynamic", 0.0), table.factors("rfs"), rtol=1e-12)


def test_worked_number():
    stats = ClassStats(image_count=[25, 100, 5000, 0], instance_count=[25, 100, 5000, 0], num_images=100_000)
    np.testing.assert_allclose(samplers.category_factors(stats, "rfs", 1e-3), [2, 1, 1, 1])
    assert (samplers.category_factors(stats, "dynamic", 1e-3, 0.5)[3], samplers.category_factors(stats, "irfs")[3]) == (
        1,
        1,
    )


def test_repeat_factors_from_a_file(tmp_path):
    document = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 10, "height": 10} for i in range(10)],
        "categories": [{"id": 7, "name": "rare"}, {"id": 9, "name": "often"}, {"id": 11, "name": "never"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 9 if i else 7, "bbox": [0, 0, 5, 5], "area": 25, "iscrowd": 0}
            for i in range(9)
        ],
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document))
    factors = samplers.repeat_factors(str(path), policy="rfs", threshold=0.4)
    np.testing.assert_allclose(factors, [2.0, *[1.0] * 9])
    np.testing.assert_allclose(samplers.repeat_factors(path, threshold=1e-3), np.ones(10))
    np.testing.assert_allclose(samplers.repeat_factors(path, threshold=0.4, exponent=1.0), [4.0, *[1.0] * 9])
    rarest = samplers.repeat_factors(path, policy="eirfs", threshold=0.01, alpha=1.0)
    assert rarest[0] > rarest[1] > rarest[9] == 1


@given(
    factors=st.lists(st.floats(1, 50), min_size=1, max_size=30),
    seed=st.integers(0, 100),
)
def test_rounding_is_within_one(factors, seed):
    values = np.array(factors)
    repeats = round_factors(values, "stochastic", np.random.default_rng(seed).random(len(values)))
    assert ((repeats == np.floor(values)) | (repeats == np.ceil(values))).all()
    assert (round_factors(values, "ceil") >= values).all()


@settings(deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8), draws=st.integers(1, 100), seed=st.integers(0, 50))
def test_class_aware_order_is_fair(sizes, draws, seed):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    image_of = np.arange(len(labels))  # every image has one class, so classes can be counted from images
    order = class_aware_order(image_of, labels, draws, np.random.default_rng(seed))
    assert len(order) == draws
    per_class = np.bincount(labels[order], minlength=len(sizes))
    assert per_class.max() - per_class.min() <= 1
    for label, size in enumerate(sizes):
        seen = np.bincount(order, minlength=len(labels))[labels == label]
        assert seen.max() - seen.min() <= 1
        own = order[labels[order] == label]
        for lap in range(len(own) // size):  # each lap shows every image of the class once
            assert sorted(own[lap * size : (lap + 1) * size]) == sorted(image_of[labels == label])


def test_mistakes():
    stats = ClassStats(image_count=[1], instance_count=[1], num_images=1)
    with pytest.raises(UserError, match=r'there is no sampling policy "rsf" \(did you mean "rfs"\?\)'):
        samplers.category_factors(stats, "rsf")
    with pytest.raises(UserError, match="threshold must be positive"):
        samplers.category_factors(stats, threshold=0)
    with pytest.raises(UserError, match=r"progress must lie in 0\.\.1"):
        samplers.category_factors(stats, "dynamic", progress=2.0)
    with pytest.raises(UserError, match="exponent must not be negative"):
        samplers.category_factors(stats, exponent=-0.5)
    with pytest.raises(UserError, match="alpha must not be negative"):
        samplers.category_factors(stats, "eirfs", alpha=float("nan"))
