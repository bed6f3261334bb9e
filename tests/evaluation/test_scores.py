"""Scores: hand-counted cuts, the protocols' AP50 from the precision curves, thresholds that `calibrate` has too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tailfin.evaluation import evaluate, reading
from tailfin.evaluation.doubts import doubts
from tailfin.evaluation.operating import Aim, operating_points
from tailfin.evaluation.scores import SCORES, score_curves

GOLDEN = Path(__file__).parent.parent / "golden" / "eval"
BOX, FAR = [10, 10, 20, 10], [60, 60, 20, 10]


def document(objects: list[tuple[int, int, list]]) -> dict:
    return {
        "images": [{"id": 1, "width": 100, "height": 100}, {"id": 2, "width": 100, "height": 100}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box}
            for number, (image, category, box) in enumerate(objects, start=1)
        ],
        "categories": [{"id": 3, "name": "a", "frequency": "r"}, {"id": 7, "name": "b", "frequency": "f"}],
    }


def prediction(image: int, category: int, box: list, score: float) -> dict:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def test_cuts_by_hand() -> None:
    truth = document([(1, 3, BOX), (2, 3, BOX), (1, 7, FAR)])
    results = [
        prediction(1, 3, BOX, 0.9),  # right
        prediction(1, 3, BOX, 0.8),  # again
        prediction(2, 3, FAR, 0.4),  # of nothing
        prediction(1, 7, FAR, 0.2),  # right
    ]
    found = score_curves(truth, results)
    place = {score: int(np.flatnonzero(np.isclose(SCORES, score))[0]) for score in (0.1, 0.3, 0.85)}
    every, rare = found["groups"]["all"]["cut"], found["groups"]["r"]["cut"]
    assert [every["precision"][place[score]] for score in place] == pytest.approx([2 / 4, 1 / 3, 1])
    assert [every["recall"][place[score]] for score in place] == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert [every["boxes"][place[score]] for score in place] == pytest.approx([2, 1.5, 0.5])
    assert [every["wrong"][place[score]] for score in place] == pytest.approx([1, 1, 0])
    assert rare["recall"][place[0.1]] == pytest.approx(0.5)
    frequent = found["groups"]["f"]
    assert frequent["error"] == pytest.approx(0.8) and frequent["thresholds"]["f1"]["recall"] == 1
    assert np.isnan(found["groups"]["c"]["cut"]["recall"]).all()  # no class is common
    curve = found["classes"]["precision"]
    assert curve[0].tolist() == [1.0] * 51 + [0.0] * 50 and curve[1].tolist() == [1.0] * 101


@pytest.mark.parametrize("case", ["ties", "over300", "federated"])
def test_precision_curves_give_ap50(case: str) -> None:
    truth, results = (json.loads((GOLDEN / case / name).read_text()) for name in ("gt.json", "dt_bbox.json"))
    for image in truth["images"]:  # AP leaves out detections of the classes listed here, where they are wrong
        image["not_exhaustive_category_ids"] = []
    scores = np.random.default_rng(1).permutation(len(results))  # no equal scores: their order is another matter
    results = [
        {**row, "score": float(score + 1) / (len(results) + 1)} for row, score in zip(results, scores, strict=True)
    ]
    found = score_curves(truth, results)
    metrics = evaluate(truth, results, "lvis", max_dets=-1)["per_category"]
    expected = {row["id"]: row["bbox"]["AP50"] for row in metrics if row["bbox"]["AP50"] >= 0}
    compared = 0
    for number, curve in zip(found["category_ids"].tolist(), found["classes"]["precision"], strict=True):
        if number in expected:
            assert curve.mean() == pytest.approx(expected[number], abs=1e-6)
            compared += 1
    assert compared >= 3


def test_thresholds_are_those_of_calibrate() -> None:
    truth, results = GOLDEN / "crowd" / "gt.json", GOLDEN / "crowd" / "dt_bbox.json"
    source = reading(truth, results)
    for aim in ("f1", "precision=0.5"):
        assert operating_points(source, aim=Aim.of(aim)) == operating_points(truth, results, Aim.of(aim))
        own = score_curves(source)["groups"]["all"]["thresholds"][aim]
        if aim.startswith("precision") and own["reached"]:
            assert own["precision"] >= 0.5
    assert 0 < score_curves(source)["groups"]["all"]["error"] < 1


def test_doubtful_annotations_by_hand() -> None:
    truth = document([(1, 3, BOX), (2, 3, BOX), (2, 3, FAR), (1, 7, [40, 10, 20, 10])])
    one = [
        prediction(1, 3, FAR, 0.9),  # an object that nobody annotated
        prediction(2, 7, BOX, 0.8),  # annotated as another class
        prediction(2, 3, FAR, 0.7),  # right
        prediction(1, 7, [80, 10, 10, 10], 0.2),  # too unsure
    ]
    other = [prediction(1, 3, [61, 60, 20, 10], 0.7), prediction(2, 7, BOX, 0.6)]
    found = doubts([one, other], truth)
    (case,) = found.cases["unlabelled"]
    assert (case.image_id, case.category_id, case.runs) == (1, 3, 2) and case.score == pytest.approx(0.8)
    (case,) = found.cases["other class"]
    assert (case.annotation_id, case.category_id, case.annotated_as, case.runs) == (2, 7, 3, 2)
    assert [case.annotation_id for case in found.cases["unfound"]] == [1, 4]  # a third of the first's class is found
    coco = found.coco()
    assert [row["kind"] for row in coco["annotations"]] == ["unlabelled", "other class", "unfound", "unfound"]
    assert len({row["id"] for row in coco["annotations"]}) == 4 and [row["id"] for row in coco["images"]] == [1, 2]
    assert doubts([], truth).cases["unlabelled"] == []
