"""What must hold of the five error types for any detections: each has one type, sums, unjudged classes, ties."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.evaluation import confusion, error_types, tide

SIDES = st.integers(0, 60)
BOXES = st.tuples(SIDES, SIDES, st.integers(5, 40), st.integers(5, 40)).map(list)
OBJECTS = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), BOXES), min_size=1, max_size=10)
FOUND = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3), BOXES, st.sampled_from([0.3, 0.6, 0.9])), max_size=14)


def document(objects: list, *, negatives: bool = False) -> dict:
    shown = {image: {category for own, category, _ in objects if own == image} for image in (1, 2, 3)}
    return {
        "images": [
            {"id": image, "width": 100, "height": 100, **({"neg_category_ids": []} if negatives else {})}
            for image in shown
        ],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box}
            for number, (image, category, box) in enumerate(objects, 1)
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}, {"id": 3, "name": "c"}],
    }


def results(found: list) -> list[dict]:
    return [{"image_id": i, "category_id": c, "bbox": b, "score": s} for i, c, b, s in found]


@settings(max_examples=40, deadline=None)
@given(OBJECTS, FOUND)
def test_every_best_prediction_has_one_type_and_counts_add_up(objects: list, found: list) -> None:
    seen = error_types(document(objects), results(found))
    types = seen["type_per_detection"]
    available = np.bincount([category for _, category, _, _ in found], minlength=4)[1:]
    assert seen["counts"].sum(axis=1).tolist() == np.minimum(seen["num_gt"], available).tolist()
    assert seen["counts"].sum() == (types >= 0).sum() and set(types.tolist()) <= set(range(-1, 5))
    for shares in (*seen["macro"].values(), *seen["micro"].values()):
        assert np.isnan(shares).all() or shares.sum() == pytest.approx(1) or not shares.any()


@settings(max_examples=30, deadline=None)
@given(OBJECTS, FOUND, FOUND)
def test_detections_of_unjudged_classes_change_nothing(objects: list, found: list, more: list) -> None:
    truth = document(objects, negatives=True)
    judged = {(image, category) for image, category, _ in objects}
    extra = [row for row in more if row[:2] not in judged]
    before, after = error_types(truth, results(found)), error_types(truth, results(found + extra))
    assert before["counts"].tolist() == after["counts"].tolist()
    assert tide(truth, results(found))["AP50"] == pytest.approx(
        tide(truth, results(found + extra))["AP50"], nan_ok=True
    )


@settings(max_examples=40, deadline=None)
@given(OBJECTS, FOUND, st.randoms(use_true_random=False))
def test_the_order_of_images_in_the_results_changes_nothing(objects: list, found: list, random) -> None:
    """Equal scores of different images stand by image id; within an image the order of the file decides."""
    order = [1, 2, 3]
    random.shuffle(order)
    moved = [row for image in order for row in found if row[0] == image]
    sorted_ = sorted(found, key=lambda row: row[0])
    truth = document(objects)
    assert (
        error_types(truth, results(moved))["counts"].tolist() == error_types(truth, results(found))["counts"].tolist()
    )
    assert confusion(truth, results(moved))["taken_for"] == confusion(truth, results(sorted_))["taken_for"]
    assert tide(truth, results(moved))["counts"] == tide(truth, results(sorted_))["counts"]


def test_perfect_shifted_and_far() -> None:
    objects = [(image, category, [10 + 30 * category, 10, 20, 30]) for image in (1, 2) for category in (1, 2)]
    truth = document(objects)
    for change, kind in (
        (lambda category, box: (category, box), "correct"),
        (lambda category, box: (3 - category, box), "classification"),
        (lambda category, box: (category, [0, 70, 8, 8]), "background"),
    ):
        found = [(image, *change(category, box), 0.5) for image, category, box in objects]
        seen = error_types(truth, results(found))
        assert dict(zip(seen["types"], seen["micro"]["all"].tolist(), strict=True))[kind] == 1
