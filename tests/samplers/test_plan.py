"""Properties of the batch plan: it is a pure function of seed and epoch, and every way of reading it agrees."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tailfin.data.index import AnnotationIndex, open_index
from tailfin.errors import UserError
from tailfin.samplers import BatchPlan, category_factors, class_aware_order, image_factors
from tailfin.samplers.repeat_factor import training_labels
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

SAMPLERS = ["plain", "rfs", "irfs", "dynamic", "class_aware", "eirfs"]
quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def make_index(path: Path, images: int, seed: int, classes: int = 4) -> AnnotationIndex:
    """Class c is in about every 2^c-th image; some images are upright, some have no annotation."""
    rng = np.random.default_rng(seed)
    present = rng.random((images, classes)) < 0.9 * 0.5 ** np.arange(classes)
    present[0] = True
    upright = rng.random(images) < 0.4
    document = {
        "images": [
            {"id": 10 + i, "file_name": f"{i}.png", "width": 40 if u else 60, "height": 60 if u else 40}
            for i, u in enumerate(upright)
        ],
        "annotations": [
            {"id": int(i * classes + c), "image_id": 10 + int(i), "category_id": int(c) + 1, "bbox": [1, 1, 9, 9]}
            for i, c in zip(*np.nonzero(present), strict=True)
        ],
        "categories": [{"id": c + 1, "name": f"class {c}"} for c in range(classes)],
    }
    path.write_text(json.dumps(document))
    return open_index(path, cache=False)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return make_index(tmp_path_factory.mktemp("plan") / "train.json", 37, 0)


def make_plan(index, name="plain", *, batch=4, epochs=3.0, seed=0, group=False, rounding="stochastic", threshold=0.4):
    sampler = Sampler(name=name, threshold=threshold, rounding=rounding)
    rows = np.flatnonzero(np.diff(index.clean().offsets))
    return BatchPlan(index, rows, ClassStats.from_index(index), sampler, batch, epochs, seed, group)


def order(plan: BatchPlan, epoch: int) -> np.ndarray:
    """Image rows of an epoch of a plan with batches of one, which nothing fills up."""
    assert plan.batch == 1
    return plan.epoch(epoch)[:, 0, 0]


plans = st.fixed_dictionaries(
    {
        "name": st.sampled_from(SAMPLERS),
        "batch": st.sampled_from([1, 2, 4, 6, 64]),
        "epochs": st.sampled_from([0.25, 0.5, 1, 2, 2.5, 3]),
        "seed": st.integers(0, 5),
        "group": st.booleans(),
    }
)


def all_keys(plan: BatchPlan, start: int = 0) -> list[list[tuple[int, int, int]]]:
    return list(plan.keys(start, slice(0, 1), 1))


@given(options=plans)
@quick
def test_pure_function_of_its_arguments(index, options):
    first, second = make_plan(index, **options), make_plan(index, **options)
    second.epoch(1)  # reading another epoch first changes nothing
    assert all_keys(first) == all_keys(second)
    other = make_plan(index, **{**options, "seed": options["seed"] + 100})
    assume(first.iterations > 1)
    assert all_keys(first) != all_keys(other)


@given(options=plans, data=st.data())
@quick
def test_a_later_start_gives_the_tail(index, options, data):
    plan = make_plan(index, **options)
    everything = all_keys(plan)
    assert len(everything) == plan.iterations
    start = data.draw(st.integers(0, plan.iterations))
    assert all_keys(plan, start) == everything[start:]


@given(options=plans, processes=st.sampled_from([1, 2]), accumulation=st.sampled_from([1, 2]), data=st.data())
@quick
def test_parts_make_up_the_batch(index, options, processes, accumulation, data):
    parts = processes * accumulation
    assume(options["batch"] % parts == 0)
    plan = make_plan(index, **options)
    start = data.draw(st.integers(0, max(plan.iterations - 1, 0)))
    ranks = [
        list(plan.keys(start, slice(rank * accumulation, (rank + 1) * accumulation), parts))
        for rank in range(processes)
    ]
    joined = []
    for micro in range(0, len(ranks[0]), accumulation):
        joined.append([key for rank in ranks for piece in rank[micro : micro + accumulation] for key in piece])
        assert all(len(piece) == options["batch"] // parts for rank in ranks for piece in rank[micro : micro + 1])
    assert joined == all_keys(plan, start)


@given(batch=st.integers(1, 80), seed=st.integers(0, 20), epoch=st.integers(0, 5), group=st.booleans())
@quick
def test_plain_shows_every_image_once(index, batch, seed, epoch, group):
    plan = make_plan(index, batch=batch, seed=seed, group=group, epochs=6)
    table = plan.epoch(epoch)
    assert table.shape == (-(-len(plan.rows) // batch), batch, 2)
    counts = Counter(table[..., 0].ravel().tolist())
    assert set(counts) == set(plan.rows.tolist())
    fill = -len(plan.rows) % batch
    assert sum(counts.values()) == len(plan.rows) + fill
    laps = -(-fill // len(plan.rows))
    assert max(counts.values()) <= 1 + laps
    if fill == 0:
        assert set(counts.values()) == {1}


@given(options=plans)
@quick
def test_repeats_are_told_apart(index, options):
    """The third entry of a key differs between an image's repeats in an epoch: each is augmented differently."""
    plan = make_plan(index, **options)
    for epoch in range(int(np.ceil(plan.epochs))):
        table = plan.epoch(epoch).reshape(-1, 2)
        assert len(np.unique(table, axis=0)) == len(table)
        if options["name"] not in ("class_aware", "eirfs"):
            for row in np.unique(table[:, 0]):
                turns = table[table[:, 0] == row, 1]
                assert sorted(turns.tolist()) == list(range(len(turns)))


@given(options=plans, data=st.data())
@quick
def test_pieces_of_an_epoch_are_those_of_the_whole(index, options, data):
    plan = make_plan(index, **options)
    whole, read = plan.epoch(1), plan.order(1).read
    batches = np.array(data.draw(st.lists(st.integers(0, len(whole) - 1), min_size=1, max_size=9)))
    columns = np.array(data.draw(st.lists(st.integers(0, plan.batch - 1), min_size=1, max_size=5)))
    np.testing.assert_array_equal(read(batches, columns), whole[batches[:, None], columns])


@pytest.mark.parametrize("group", [False, True])
def test_an_image_may_stand_anywhere(index, group):
    """Over many epochs an image is in every tenth of an epoch alike, and after any other."""
    epochs = 1500
    plan = make_plan(index, "plain", batch=1, epochs=epochs, group=group)
    rows = np.stack([order(plan, epoch) for epoch in range(epochs)])
    places = np.argsort(rows, axis=1)  # of the images in ascending order
    images = places.shape[1]
    seen = np.stack([np.bincount(places[:, image] * 10 // images, minlength=10) for image in range(images)])
    cells = np.bincount(np.arange(images) * 10 // images, minlength=10)
    expected = epochs * cells / images
    assert (((seen - expected) ** 2 / expected).sum() / (9 * images)) < 1.3  # chi square over its degrees of freedom
    follows = (places[:, 1:] == places[:, :-1] + 1).mean()
    assert abs(follows - 1 / images) < 0.004


@pytest.mark.parametrize("policy", ["rfs", "irfs"])
def test_repeats_are_those_of_the_factors(index, policy):
    plan = make_plan(index, policy, rounding="ceil", batch=1)
    stats = ClassStats.from_index(index)
    factors = image_factors(category_factors(stats, policy, 0.4), *training_labels(index), len(index))
    expected = {int(row): int(np.ceil(factors[row])) for row in plan.rows}
    assert max(expected.values()) > min(expected.values())
    for epoch in range(3):
        assert Counter(order(plan, epoch).tolist()) == expected
        assert plan.length(epoch) == sum(expected.values())
    stochastic = make_plan(index, policy, epochs=400, batch=1)
    mean = np.mean([np.bincount(order(stochastic, epoch), minlength=len(index)) for epoch in range(400)], axis=0)
    assert np.abs(mean[plan.rows] - factors[plan.rows]).max() < 0.15
    for epoch in range(3):
        counts = np.bincount(order(stochastic, epoch), minlength=len(index))[plan.rows]
        assert (np.abs(counts - factors[plan.rows]) < 1).all()


def test_dynamic_moves_from_image_to_instance_shares(tmp_path):
    """A class with many objects in few images is repeated at first, and less and less as training goes on."""
    annotations, number = [], 0
    for image in range(40):
        for label, count in ((1, 1), (2, 12 if image < 3 else 0)):
            for _ in range(count):
                number += 1
                annotations.append({"id": number, "image_id": image, "category_id": label, "bbox": [1, 1, 9, 9]})
    document = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 50, "height": 40} for i in range(40)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "wide"}, {"id": 2, "name": "dense"}],
    }
    (tmp_path / "train.json").write_text(json.dumps(document))
    index = open_index(tmp_path / "train.json", cache=False)
    plan = make_plan(index, "dynamic", epochs=8, rounding="ceil", threshold=0.45, batch=1)
    dense = [int((order(plan, epoch) < 3).sum()) for epoch in range(8)]
    assert dense[0] == 3 * int(np.ceil(np.sqrt(0.45 / (3 / 40))))
    assert dense == sorted(dense, reverse=True) and dense[-1] < dense[0]
    static = make_plan(index, "rfs", epochs=8, rounding="ceil", threshold=0.45, batch=1)
    assert {int((order(static, epoch) < 3).sum()) for epoch in range(8)} == {dense[0]}


def test_class_aware_shows_every_class_equally_often(index):
    plan = make_plan(index, "class_aware", epochs=2, batch=1)
    rows = order(plan, 0)
    assert len(rows) == plan.length(0) == len(plan.rows) and set(rows.tolist()) <= set(plan.rows.tolist())
    image_of = np.array([0, 1, 2, 3, 4, 4], np.int64)
    labels = np.array([0, 0, 0, 0, 0, 1], np.int64)
    draws = class_aware_order(image_of, labels, 40, np.random.default_rng(0))
    assert np.bincount(draws, minlength=5)[4] >= 20  # half of the draws are of class 1, which is in image 4 alone
    assert set(draws.tolist()) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("batch", [2, 4, 8])
def test_batches_hold_one_orientation(index, batch):
    plan = make_plan(index, batch=batch, group=True)
    wide = index.widths > index.heights
    for epoch in range(3):
        mixed = [row for row in wide[plan.epoch(epoch)[..., 0]] if row.any() and not row.all()]
        assert len(mixed) <= 1  # what is left over of both
    ungrouped = make_plan(index, batch=batch)
    assert sum(row.any() and not row.all() for row in wide[ungrouped.epoch(0)[..., 0]]) > 1
    assert Counter(order(make_plan(index, batch=1, group=True), 0).tolist()) == Counter(plan.rows.tolist())


@given(options=plans)
@quick
def test_epochs_and_iterations_convert_into_each_other(index, options):
    plan = make_plan(index, **options)
    assert plan.boundaries[0] == 0 and plan.iterations == plan.boundaries[-1]
    assert (np.diff(plan.boundaries) >= 1).all()
    assert plan.epoch_at(0) == 0 and plan.epoch_at(plan.iterations) == options["epochs"]
    assert plan.iteration_at(options["epochs"]) == plan.iterations
    for epoch in range(int(options["epochs"]) + 1):
        assert plan.iteration_at(epoch) == plan.boundaries[epoch]
        assert plan.epoch_at(int(plan.boundaries[epoch])) == pytest.approx(epoch)
    for iteration in range(plan.iterations + 1):
        assert plan.iteration_at(plan.epoch_at(iteration)) == iteration
    assert plan.iteration_at(2 * options["epochs"]) >= plan.iterations


def test_fractional_epochs(index):
    """Half an epoch is the first half of the whole one; milestones inside it lie where they should."""
    whole, half = make_plan(index, batch=2, epochs=2), make_plan(index, batch=2, epochs=1.5)
    first = int(whole.boundaries[1])
    assert half.iterations == first + round(first / 2)
    assert all_keys(half) == all_keys(whole)[: half.iterations]
    assert half.iteration_at(1.25) == first + round((half.iterations - first) / 2)
    assert half.epoch_at(half.iterations) == 1.5
    assert make_plan(index, batch=2, epochs=0.01).iterations == 1


def test_nothing_to_train_on(index):
    with pytest.raises(UserError, match="has no image to train on"):
        BatchPlan(index, np.zeros(0, np.int64), ClassStats.from_index(index), Sampler(), 4, 1, 0)


@given(images=st.integers(1, 12), seed=st.integers(0, 50), options=plans)
@quick
def test_small_sets(tmp_path_factory, images, seed, options):
    """Down to a single image: every batch is full and holds images that train."""
    small = make_index(tmp_path_factory.getbasetemp() / "small.json", images, seed)
    plan = make_plan(small, **options)
    keys = all_keys(plan)
    assert len(keys) == plan.iterations >= 1
    assert all(len(batch) == options["batch"] for batch in keys)
    assert {row for batch in keys for _, row, _ in batch} <= set(plan.rows.tolist())


@pytest.mark.parametrize("name", ["eirfs", "eirfs_paper"])
def test_eirfs_draws_with_replacement_by_the_factors(index, name):
    plan = make_plan(index, name, threshold=0.05, batch=1)
    expected = image_factors(category_factors(plan.stats, name, 0.05), *training_labels(index), len(index))[plan.rows]
    expected /= expected.sum()
    epochs = 400
    seen = np.zeros(len(index))
    for epoch in range(epochs):
        rows = order(plan, epoch)
        assert len(rows) == len(plan.rows)
        seen += np.bincount(rows, minlength=len(index))
    share = seen[plan.rows] / seen.sum()
    assert (np.abs(share - expected) < 5 * np.sqrt(expected / seen.sum())).all()
    assert expected.max() > 1.2 * expected.min()
