"""error_types: reference vectors, a case of each rule by hand, what must hold for any input, mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailfin.errors import UserError
from tailfin.evaluation import error_types, overlaps
from tailfin.evaluation.error_types import TYPES

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "best_iou": {"precedence": "best_iou"},
    "duplicates_location": {"duplicates": "location"},
    "all_predictions": {"unjudged": "all"},
    "fixed_N3": {"top": 3},
}
CASES = ("a_hand", "b_random", "eval_crowd", "eval_edge", "eval_federated", "eval_over300", "eval_segm", "eval_ties")


@pytest.fixture(scope="module")
def file(golden_dir) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "five_errors.npz"))


@pytest.fixture(scope="module")
def inputs(file, golden_dir, tmp_path_factory):
    """Annotations and results of a case, as files."""
    folder = tmp_path_factory.mktemp("five")

    def of(case: str) -> tuple[Path, Path]:
        if case.startswith("eval_"):
            own = golden_dir / "eval" / case.removeprefix("eval_")
            return own / "gt.json", own / "dt_bbox.json"
        paths = folder / f"{case}_gt.json", folder / f"{case}_dt.json"
        for path, key in zip(paths, ("gt_json", "dt_json"), strict=True):
            path.write_bytes(file[f"{case}/{key}"].tobytes())
        return paths

    return of


@pytest.mark.parametrize("variant", OPTIONS)
@pytest.mark.parametrize("case", CASES)
def test_reference_vectors(file, inputs, case, variant):
    found = error_types(*inputs(case), **OPTIONS[variant])
    expected = {key.removeprefix(f"{case}/{variant}/"): file[key] for key in file if f"{case}/{variant}/" in key}
    assert found["types"] == file["types"].tolist()
    np.testing.assert_array_equal(found["type_per_detection"], expected["type_per_detection"])
    rows = np.searchsorted(found["category_ids"], expected["category_ids"])  # large cases list a part
    np.testing.assert_array_equal(found["category_ids"][rows], expected["category_ids"])
    np.testing.assert_array_equal(found["counts"][rows], expected["counts_per_class"])
    assert found["counts"].sum() == expected["counts_per_class"].sum()
    np.testing.assert_array_equal(found["num_gt"][rows], expected["num_gt_per_class"])
    for group in ("all", "r", "c", "f"):
        np.testing.assert_allclose(found["micro"][group], expected[f"micro_{group}"], atol=1e-12)
        np.testing.assert_allclose(found["macro"][group], expected[f"macro_{group}"], atol=1e-12)


def test_the_case_by_hand(file, inputs):
    found = error_types(*inputs("a_hand"))
    np.testing.assert_array_equal(found["type_per_detection"], file["a_hand/hand_expected_type"])
    assert set(found) == {"types", "category_ids", "counts", "num_gt", "type_per_detection", "macro", "micro"}


def document(objects, **image) -> dict[str, Any]:
    """One image of 100 x 100 (id 1) and an empty one; objects are (category, box)."""
    return {
        "images": [{"id": 1, "width": 100, "height": 100, **image}, {"id": 2, "width": 100, "height": 100}],
        "categories": [{"id": 3, "name": "a", "frequency": "r"}, {"id": 7, "name": "b", "frequency": "f"}],
        "annotations": [
            {"id": i + 1, "image_id": 1, "category_id": category, "bbox": box, "iscrowd": 0, **more}
            for i, (category, box, more) in enumerate((*entry, {})[:3] for entry in objects)
        ],
    }


def prediction(category, box, score=0.5, image=1) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


BOX, FAR = [10, 10, 20, 10], [60, 60, 20, 10]


@pytest.mark.parametrize(
    ("category", "box", "expected"),
    [
        (3, BOX, "correct"),
        (3, [10, 10, 20, 5], "location"),  # IoU 0.5
        (3, [10, 10, 2, 10], "background"),  # IoU 0.1
        (3, [10, 10, 3, 10], "location"),
        (3, [40, 40, 5, 5], "background"),
        (7, BOX, "classification"),
        (7, [10, 10, 20, 5], "other"),
        (3, [0, 0, 0, 0], "background"),
    ],
)
def test_one_of_each(category, box, expected):
    found = error_types(document([(3, BOX), (7, FAR)]), [prediction(category, box)])
    assert TYPES[found["type_per_detection"][0]] == expected
    row = 0 if category == 3 else 1
    assert found["counts"].sum() == found["counts"][row].sum() == 1
    group, empty = ("r", "f") if category == 3 else ("f", "r")
    np.testing.assert_array_equal(found["macro"][group], found["micro"]["all"])
    assert np.isnan(found["macro"][empty]).all() and not found["micro"][empty].any()
    assert np.isnan(found["macro"]["c"]).all()


def test_precedence():
    objects = [(3, [10, 10, 20, 10]), (7, [10, 16, 20, 10])]
    box = [prediction(3, [10, 16, 20, 9])]  # 0.27 with its own class, 0.9 with the other
    assert error_types(document(objects), box)["type_per_detection"].tolist() == [1]
    assert error_types(document(objects), box, precedence="best_iou")["type_per_detection"].tolist() == [3]
    tie = [(3, BOX), (7, BOX)]
    for precedence in ("same_class", "best_iou"):
        assert error_types(document(tie), [prediction(3, BOX)], precedence=precedence)["counts"][0, 0] == 1


def test_duplicates_in_the_order_of_scores():
    objects = [(3, BOX), (3, [10, 10, 20, 12]), (3, FAR)]
    found = [prediction(3, BOX, 0.3), prediction(3, BOX, 0.9), prediction(3, [10, 10, 20, 12], 0.1)]
    assert error_types(document(objects), found)["type_per_detection"].tolist() == [0, 0, 0]
    assert error_types(document(objects), found, duplicates="location")["type_per_detection"].tolist() == [1, 0, 0]
    equal = [(3, BOX), (3, BOX)]  # both overlap alike: the lower id, no moving on
    twice = error_types(document(equal), found[:2], duplicates="location")
    assert twice["type_per_detection"].tolist() == [1, 0]


def test_best_of_each_class_and_ties():
    objects = [(3, BOX), (3, FAR)]
    found = [prediction(3, BOX, 0.5, 2), prediction(3, BOX, 0.5), prediction(3, FAR, 0.5), prediction(3, FAR, 0.9)]
    assert error_types(document(objects), found)["type_per_detection"].tolist() == [-1, 0, -1, 0]
    assert error_types(document(objects), found, top=1)["type_per_detection"].tolist() == [-1, -1, -1, 0]
    assert error_types(document(objects), found, top=np.int64(3))["type_per_detection"].tolist() == [-1, 0, 0, 0]
    nothing = error_types(document(objects), [prediction(7, BOX)])
    assert nothing["type_per_detection"].tolist() == [-1]  # N is 0
    assert np.isnan(nothing["macro"]["all"]).all() and nothing["micro"]["all"].tolist() == [0] * 5


@pytest.mark.parametrize("mark", ["iscrowd", "ignore"])
def test_crowds_are_no_evidence_but_judge(mark):
    truth = document([(3, BOX, {mark: 1}), (3, FAR), (7, FAR)], neg_category_ids=[])
    found = error_types(truth, [prediction(3, BOX)])
    assert found["num_gt"].tolist() == [1, 1] and found["type_per_detection"].tolist() == [2]
    alone = document([(3, BOX, {mark: 1})], neg_category_ids=[])
    assert error_types(alone, [prediction(3, BOX)])["type_per_detection"].tolist() == [-1]
    assert error_types(alone, [prediction(7, BOX)])["type_per_detection"].tolist() == [-2]


def test_unjudged_predictions_change_nothing():
    truth = document([(3, BOX), (7, FAR)], neg_category_ids=[])
    truth["images"][1]["neg_category_ids"] = [3]
    sure = [prediction(3, BOX, 0.5), prediction(3, FAR, 0.4, image=2)]  # in image 2 class 3 is known to be absent
    noise = [prediction(7, FAR, 0.9, image=2)] * 3
    plain, noisy = error_types(truth, sure), error_types(truth, [*noise, *sure])
    assert noisy["type_per_detection"].tolist() == [-2, -2, -2, *plain["type_per_detection"]] == [-2, -2, -2, 0, -1]
    np.testing.assert_array_equal(noisy["counts"], plain["counts"])
    assert error_types(truth, noise, unjudged="all")["type_per_detection"].tolist() == [2, -1, -1]


def test_perfect_shifted_and_far_detections(inputs):
    truth = json.loads(inputs("b_random")[0].read_text())
    objects = [a for a in truth["annotations"] if not a.get("iscrowd") and not a.get("ignore")]
    boxes = [{**prediction(a["category_id"], a["bbox"]), "image_id": a["image_id"]} for a in objects]
    assert error_types(truth, boxes)["micro"]["all"][0] == 1
    far = [{**entry, "bbox": [1e5, 1e5, 5, 5]} for entry in boxes]
    assert error_types(truth, far)["micro"]["all"][2] == 1
    one_each = document([(3, BOX), (7, FAR)])
    swapped = [prediction(7, BOX), prediction(3, FAR)]
    assert error_types(one_each, swapped)["micro"]["all"][3] == 1


def test_in_parts(inputs, monkeypatch):
    whole = error_types(*inputs("eval_crowd"), duplicates="location", top=50)
    monkeypatch.setattr(overlaps, "NEAR_PAIRS", 7)
    parts = error_types(*inputs("eval_crowd"), duplicates="location", top=50)
    np.testing.assert_array_equal(parts["type_per_detection"], whole["type_per_detection"])


def test_nothing_at_all_and_groups():
    truth = document([])
    found = error_types(truth, [])
    assert found["counts"].shape == (2, 5) and found["type_per_detection"].shape == (0,)
    assert np.isnan(found["macro"]["all"]).all() and found["micro"]["r"].tolist() == [0] * 5
    grouped = error_types(
        document([(3, BOX), (7, FAR)]), [prediction(3, BOX)], train_counts={3: 500, 7: 2}, group_bounds=(10, 100)
    )
    assert grouped["micro"]["f"].tolist() == [1, 0, 0, 0, 0] and not grouped["micro"]["r"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precedence": "best_iuo"}, 'precedence "best_iuo" does not exist .did you mean "best_iou"'),
        ({"duplicates": "x"}, "choices: literal, location"),
        ({"unjudged": "dorp"}, 'did you mean "drop"'),
        ({"top": 0}, "top must be a positive whole number"),
        ({"top": True}, "top must be"),
        ({"top": "all"}, "top must be"),
    ],
)
def test_mistakes(options, message):
    with pytest.raises(UserError, match=message):
        error_types(document([]), [], **options)


def corners(box):
    left, top, wide, tall = box
    return [[left, top, left + wide, top, left + wide, top + tall, left, top + tall]]


def test_rectangular_masks_are_boxes():
    """Filled boxes in whole pixels give by masks what they give by boxes, over several images, options alike."""
    rng = np.random.default_rng(0)
    truth, found = document([]), []
    truth["images"] = [{"id": number, "width": 100, "height": 100} for number in (1, 2, 5)]
    for number in range(60):
        box = np.concatenate([rng.integers(0, 30, 2), rng.integers(1, 20, 2)]).tolist()
        image, category = int(rng.choice([1, 2, 5])), int(rng.choice([3, 7]))
        if number < 20:
            own = {
                "id": number + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "iscrowd": number % 5 == 4,
            }
            truth["annotations"].append({**own, "area": box[2] * box[3], "segmentation": corners(box)})
        else:
            near = truth["annotations"][int(rng.integers(20))]
            image, box = near["image_id"], (np.array(near["bbox"]) + rng.integers(0, 4, 4)).tolist()
            own = {"image_id": image, "category_id": category, "bbox": box, "score": float(rng.random())}
            found.append({**own, "segmentation": corners(box)})
    for options in OPTIONS.values():
        boxes, masks = (error_types(truth, found, iou_type=kind, **options) for kind in ("bbox", "segm"))
        assert len(np.unique(boxes["type_per_detection"])) > 3
        np.testing.assert_array_equal(boxes["type_per_detection"], masks["type_per_detection"])
        np.testing.assert_array_equal(boxes["counts"], masks["counts"])


def test_masks_decide_where_boxes_agree():
    """Two halves of one square have its box, and no pixel in common."""
    square = [10, 10, 20, 20]
    truth = document([(3, square)])
    truth["annotations"][0]["segmentation"] = [[10, 10, 30, 10, 10, 30]]
    other = {**prediction(3, square), "segmentation": [[30, 10, 30, 30, 10, 30]]}
    assert error_types(truth, [other])["type_per_detection"].tolist() == [0]
    assert error_types(truth, [other], iou_type="segm")["type_per_detection"].tolist() == [2]
    with pytest.raises(UserError, match="segmentation"):
        error_types(truth, [prediction(3, square)], iou_type="segm")
