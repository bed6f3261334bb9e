"""Results that read well and mean something else: told beside the numbers, and right results are not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from tailfin.evaluation import evaluate

NAMES = ("car", "bus", "tram", "cab")


def scene(pictures: int = 24) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Pictures of 200 x 120 with two objects each, and detections that are right with scores of their own."""
    rng = np.random.default_rng(3)
    objects = []
    for number in range(2 * pictures):
        x, y, w, h = rng.integers((5, 5, 20, 30), (90, 40, 90, 60)).tolist()
        objects.append(
            {
                "id": number + 1,
                "image_id": number // 2 + 1,
                "category_id": (number + number // 4) % 4 + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": 0,
            }
        )
    truth = {
        "images": [{"id": n + 1, "width": 200, "height": 120} for n in range(pictures)],
        "categories": [{"id": n + 1, "name": name} for n, name in enumerate(NAMES)],
        "annotations": objects,
    }
    keys = ("image_id", "category_id", "bbox")
    return truth, [{**{k: o[k] for k in keys}, "score": 0.3 + 0.5 * rng.random()} for o in objects]


def told(truth: dict[str, Any], results: list[dict[str, Any]], **options: Any) -> tuple[float, list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        metrics = evaluate(truth, results, "coco", **options)
    return metrics["bbox"]["AP"], [str(warning.message) for warning in caught]


def moved(results: list[dict[str, Any]], **columns: Any) -> list[dict[str, Any]]:
    return [{**entry, **{key: change(entry) for key, change in columns.items()}} for entry in results]


def test_right_results_are_not_odd() -> None:
    truth, results = scene()
    assert told(truth, results) == (pytest.approx(1), [])
    rng = np.random.default_rng(0)
    weak = moved(results, category_id=lambda _: int(rng.integers(1, 5)), score=lambda _: float(rng.random()))
    assert told(truth, weak)[1] == []  # wrong classes without a system
    all_one = moved(results, category_id=lambda _: 1)
    assert told(truth, all_one)[1] == []  # a detector that has seen nothing but cars


def test_entries_given_twice() -> None:
    truth, results = scene()
    ap, (note,) = told(truth, results + results)
    assert ap < 0.7 and "48 of 96 entries" in note and "joined twice" in note
    assert told(truth, results + results[:2])[1] == []
    near = moved(results, score=lambda entry: entry["score"] - 1e-6)
    assert told(truth, results + near)[1] == []  # duplicates of a detector, which are no error of the file


def test_pictures_without_an_entry() -> None:
    truth, results = scene()
    (note,) = told(truth, [entry for entry in results if entry["image_id"] <= 10])[1]
    assert "no entry for 14 of the 24 pictures with objects" in note
    assert told(truth, [entry for entry in results if entry["image_id"] <= 14])[1] == []  # of few detections
    dense = [
        {**entry, "score": entry["score"] / (n + 1)} for entry in results if entry["image_id"] <= 14 for n in range(6)
    ]
    assert "no entry for 10 of the 24" in told(truth, dense)[1][0]
    assert "no entry for 24 of the 24" in told(truth, [])[1][0]


@pytest.mark.parametrize("shift", [1, 2, 3])
def test_classes_of_another_numbering(shift: int) -> None:
    truth, results = scene()
    ap, (note,) = told(truth, moved(results, category_id=lambda entry: (entry["category_id"] - 1 + shift) % 4 + 1))
    assert ap < 0.05 and f'"car" (id 1) as "{NAMES[shift]}" (id {shift + 1})' in note and "another numbering" in note


def corners(entry: dict[str, Any]) -> list[float]:
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y + h]


def turned(box: list[float]) -> list[float]:
    return [box[1], box[0], box[3], box[2]]


def fractions(box: list[float]) -> list[float]:
    return [value / side for value, side in zip(box, (120, 200, 120, 200), strict=True)]


def test_boxes_with_x_and_y_exchanged() -> None:
    """Corners as TensorFlow's detection programs write them."""
    truth, results = scene()
    ap, notes = told(truth, moved(results, bbox=lambda entry: turned(entry["bbox"])))
    assert ap < 0.1 and "read as [y, x, height, width] the boxes find 48 of 48 objects" in notes[-1]

    yxyx = moved(results, bbox=lambda entry: fractions(turned(corners(entry))))
    ap, notes = told(truth, yxyx, box_form="xyxy-fractions")
    assert ap < 0.1 and "--box-form yxyx-fractions" in notes[-1]
    assert told(truth, yxyx, box_form="yxyx-fractions") == (pytest.approx(1), [])


def test_a_few_centres_are_recognised_by_the_objects() -> None:
    truth, results = scene(6)

    def centre(entry: dict[str, Any]) -> list[float]:
        x, y, w, h = entry["bbox"]
        return [x + w / 2, y + h / 2, w, h]

    ap, notes = told(truth, moved(results, bbox=centre))
    assert ap < 0.1 and any("--box-form cxcywh" in note for note in notes)


def test_scores_that_are_all_one_number() -> None:
    truth, results = scene()
    wrong = moved(results, bbox=lambda entry: [0, 0, 10, 10])
    same = moved(results + wrong, score=lambda _: 1.0)
    assert "all 96 scores are 1" in told(truth, same)[1][-1]


def test_areas_that_are_not_the_objects_are_told() -> None:
    """By them `lvis` drops objects, and all protocols tell small from large."""
    truth, results = scene()
    for entry in truth["annotations"]:
        entry["area"] = 0
    assert "area is 0 times width x height" in told(truth, results)[1][0]
