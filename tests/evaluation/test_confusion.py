"""confusion: a case of each rule by hand, what must hold for any input."""

from __future__ import annotations

import numpy as np
import pytest

from tailfin.evaluation import confusion, overlaps

BOX, NEAR, FAR = [10, 10, 20, 10], [12, 10, 20, 10], [60, 60, 20, 10]


def document(objects) -> dict:
    return {
        "images": [{"id": 1, "width": 100, "height": 100}, {"id": 2, "width": 100, "height": 100}],
        "annotations": [
            {"id": number, "image_id": 1, "category_id": category, "bbox": box, "iscrowd": crowd}
            for number, (category, box, crowd) in enumerate(objects, start=1)
        ],
        "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}, {"id": 9, "name": "c"}],
    }


def prediction(category, box, score=0.5, image=1) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ([prediction(3, BOX)], "found"),
        ([prediction(7, BOX)], 7),
        ([prediction(3, BOX, 0.4), prediction(7, NEAR, 0.6)], 7),  # the higher score, not the better place
        ([prediction(3, BOX, 0.6), prediction(7, BOX, 0.4)], "found"),
        ([prediction(7, BOX), prediction(3, BOX)], 7),  # equal scores: the first
        ([prediction(3, [10, 10, 20, 5])], "missed"),  # IoU 0.5 is not above it
        ([prediction(3, FAR)], "missed"),
        ([prediction(3, BOX, image=2)], "missed"),
        ([prediction(3, BOX, 0.04)], "missed"),  # below `min_score`
        ([], "missed"),
    ],
)
def test_where_an_object_goes(predictions, expected):
    found = confusion(document([(3, BOX, 0)]), predictions, min_score=0.05)
    assert found["num_gt"].tolist() == [1, 0, 0]
    assert found["found"].tolist() == [int(expected == "found"), 0, 0]
    assert found["missed"].tolist() == [int(expected == "missed"), 0, 0]
    assert found["taken_for"] == [[(expected, 1)] if isinstance(expected, int) else [], [], []]


def test_crowds_are_no_objects_and_the_most_frequent_class_is_first():
    objects = [(3, [30 * i, 0, 20, 20], 0) for i in range(3)] + [(3, FAR, 1)]
    wrong = [prediction(9, objects[0][1]), prediction(7, objects[1][1]), prediction(9, objects[2][1])]
    found = confusion(document(objects), wrong)
    assert found["num_gt"].tolist() == [3, 0, 0]
    assert found["taken_for"][0] == [(9, 2), (7, 1)]


def test_every_object_goes_somewhere_and_parts_change_nothing(monkeypatch):
    rng = np.random.default_rng(0)
    categories = (3, 7, 9)
    objects = [(categories[rng.integers(3)], [*rng.integers(0, 60, 2).tolist(), 20, 20], 0) for _ in range(30)]
    predictions = [
        prediction(categories[rng.integers(3)], [*rng.integers(0, 60, 2).tolist(), 20, 20], rng.random())
        for _ in range(200)
    ]
    whole = confusion(document(objects), predictions)
    others = np.array([sum(number for _, number in row) for row in whole["taken_for"]])
    np.testing.assert_array_equal(whole["found"] + whole["missed"] + others, whole["num_gt"])
    assert others.sum() > 3 and whole["found"].sum() > 3
    monkeypatch.setattr(overlaps, "NEAR_PAIRS", 7)
    parts = confusion(document(objects), predictions)
    assert parts["taken_for"] == whole["taken_for"]
    np.testing.assert_array_equal(parts["found"], whole["found"])
