"""Operating points: by hand, drawn to all classes where a class has few objects, intervals, what does not count."""

from __future__ import annotations

import numpy as np
import pytest

from tailfin.errors import UserError
from tailfin.evaluation.operating import PRIOR, Aim, OperatingPoints, operating_points


def truth(counts: dict[int, int], **more) -> dict:
    """An object of class k in each of the first `counts[k]` pictures, at a place of its class."""
    images = max(counts.values())
    annotations = [
        {"id": 0, "image_id": image, "category_id": k, "bbox": [40 * k, 0, 20, 20], "area": 400, "iscrowd": 0}
        for k, count in counts.items()
        for image in range(1, count + 1)
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    return {
        "images": [{"id": n, "width": 200, "height": 100, **more} for n in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": k, "name": f"class {k}"} for k in counts],
    }


def found(image: int, k: int, score: float, right: bool = True) -> dict:
    return {"image_id": image, "category_id": k, "bbox": [40 * k, 0 if right else 50, 20, 20], "score": score}


def many(k: int, images: int, good: float, bad: float) -> list[dict]:
    """A right detection at about `good` and a wrong one at about `bad` in each picture."""
    rng = np.random.default_rng(k)
    right = [found(n, k, good + 0.01 * rng.random()) for n in range(1, images + 1)]
    return right + [found(n, k, bad + 0.01 * rng.random(), right=False) for n in range(1, images + 1)]


def test_a_class_with_many_objects_has_its_own():
    points = operating_points(
        truth({0: 500, 1: 500}), many(0, 500, 0.8, 0.4) + many(1, 500, 0.3, 0.1), Aim("f1")
    ).points
    assert 0.41 < points["class 0"].threshold < 0.8 and 0.11 < points["class 1"].threshold < 0.3
    for point in points.values():
        assert point.examples == 500 and point.own == pytest.approx(500 / (500 + PRIOR), abs=1e-3)
        assert point.f1 == point.precision == point.recall == 1 and point.reached and point.low > 0.99


def test_a_class_with_few_objects_is_drawn_to_all():
    results = many(0, 500, 0.8, 0.4) + many(1, 2, 0.3, 0.1)
    points = operating_points(truth({0: 500, 1: 2, 2: 1}), results, Aim("f1")).points
    alone = operating_points(truth({1: 2}), many(1, 2, 0.3, 0.1), Aim("f1")).points["class 1"].threshold
    assert points["class 1"].own == pytest.approx(2 / (2 + PRIOR), abs=1e-3)
    assert alone < 0.3 < points["class 1"].threshold < points["class 0"].threshold  # much nearer to the many
    assert points["class 2"].precision == -1 and points["class 2"].recall == 0 and not points["class 2"].reached


def test_aims_by_hand():
    # of class 0, best first: right, right, wrong, right, wrong, right; 40 pictures so that the class counts for itself
    results, scores = [], (0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
    for number, score in enumerate(scores):
        right = number not in (2, 4)
        results += [found(4 * n + min(number, 3) + 1, 0, score, right) for n in range(10)]
    file = truth({0: 40})
    # two objects of each four pictures at 0.9 and 0.8, then wrong ones at 0.7: precision falls to 2/3
    points = operating_points(file, results, Aim.of("precision=0.9")).points["class 0"]
    assert 0.7 < points.threshold < 0.8 and points.precision == 1 and points.recall == 0.5 and points.reached
    points = operating_points(file, results, Aim.of("recall=0.75")).points["class 0"]
    assert 0.5 < points.threshold < 0.6 and points.recall == 0.75 and points.precision == 0.75
    assert points.low <= points.recall <= points.high and points.high - points.low > 0.05
    missed = operating_points(file, results, Aim.of("precision=1")).points["class 0"]
    assert missed.reached and missed.precision == 1
    wrong = [entry for entry in results if entry["score"] in (0.7, 0.5)]
    assert not operating_points(file, wrong, Aim.of("precision=0.5")).points["class 0"].reached


def test_a_second_detection_of_an_object_is_wrong():
    results = [found(n, 0, 0.9) for n in range(1, 41)] + [found(n, 0, 0.8) for n in range(1, 41)]
    point = operating_points(truth({0: 40}), results, Aim("recall", 1.0)).points["class 0"]
    assert point.precision == 1 and 0.8 < point.threshold < 0.9
    everything = operating_points(truth({0: 40}), results[40:], Aim("f1")).points["class 0"]
    assert everything.precision == 1  # the second alone is right


def test_crowds_and_classes_that_nobody_judged_count_neither_way():
    file = truth({0: 40, 1: 1})
    for annotation in file["annotations"]:
        if annotation["category_id"] == 0 and annotation["image_id"] > 20:
            annotation["iscrowd"] = 1
    point = operating_points(file, [found(n, 0, 0.9) for n in range(1, 41)], Aim("f1")).points["class 0"]
    assert point.examples == 20 and point.precision == point.recall == 1
    federated = truth({0: 40, 1: 20}, neg_category_ids=[], not_exhaustive_category_ids=[])
    results = [found(n, 1, 0.9) for n in range(1, 41)] + [found(n, 0, 0.9) for n in range(1, 41)]
    assert operating_points(federated, results, Aim("f1")).points["class 1"].precision == 1


def test_values_come_back_and_mistakes():
    points = operating_points(truth({0: 5}), [found(1, 0, 0.5)], Aim("f1"))
    assert OperatingPoints.from_dict(points.to_dict()) == points
    assert points.thresholds == {"class 0": points.points["class 0"].threshold}
    with pytest.raises(UserError, match="damaged"):
        OperatingPoints.from_dict({"aim": "f1", "classes": {"a": {}}})
    for text, message in (("precison=1", 'did you mean "precision"'), ("precision", "above 0"), ("f1=0.5", "no value")):
        with pytest.raises(UserError, match=message):
            Aim.of(text)
