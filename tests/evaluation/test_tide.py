"""TIDE's dAP and AP-pool: the reference tools' numbers, groups and classes that add up to the whole, cases by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tailfin.errors import UserError
from tailfin.evaluation import ap_pool, reading, tide
from tailfin.evaluation.tide import MAIN

GOLDEN = Path(__file__).parent.parent / "golden" / "eval"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["cases"]
CASES = [(case, kind) for case, kinds in EXPECTED.items() if (GOLDEN / case).is_dir() for kind in kinds]


@pytest.mark.parametrize("rules", ["coco", "lvis"])
@pytest.mark.parametrize(("case", "kind"), CASES)
def test_the_reference_tools_numbers(case: str, kind: str, rules: str) -> None:
    expected = EXPECTED[case][kind][f"tide_{rules}"]
    found = tide(GOLDEN / case / "gt.json", GOLDEN / case / f"dt_{kind}.json", rules, iou_type=kind)
    assert found["AP50"] == pytest.approx(expected["AP50"], abs=1e-9)
    assert found["main"] == pytest.approx(expected["main"], abs=1e-9)
    assert found["special"] == pytest.approx(expected["special"], abs=1e-9)
    assert found["counts"] == expected["counts"]


@pytest.mark.parametrize(("case", "kind"), CASES)
def test_the_reference_pool(case: str, kind: str) -> None:
    expected = EXPECTED[case][kind]["ap_pool_10000"]
    found = ap_pool(GOLDEN / case / "gt.json", GOLDEN / case / f"dt_{kind}.json", iou_type=kind)
    assert list(found.values()) == pytest.approx(list(expected.values()), abs=1e-9)


def test_groups_are_means_of_their_classes() -> None:
    found = tide(GOLDEN / "crowd" / "gt.json", GOLDEN / "crowd" / "dt_bbox.json")
    table, groups = found["per_category"], found["groups"]
    annotated = ~np.isnan(table["AP50"])
    sizes = {"r": 0, "c": 0, "f": 0}
    frequency = {
        row["id"]: row["frequency"] for row in json.loads((GOLDEN / "crowd/gt.json").read_text())["categories"]
    }
    for number in found["category_ids"][annotated].tolist():
        sizes[frequency[number]] += 1
    assert groups["all"]["AP50"] == pytest.approx(table["AP50"][annotated].mean())
    whole = sum(sizes[group] * groups[group]["AP50"] for group in sizes) / sum(sizes.values())
    assert whole == pytest.approx(groups["all"]["AP50"])
    assert {kind: int(found["per_category_counts"][kind].sum()) for kind in MAIN} == found["counts"]
    assert min(table["Cls"][annotated]) >= 0


BOX, NEAR, FAR = [10, 10, 20, 10], [10, 10, 20, 4], [60, 60, 20, 10]
DOCUMENT = {
    "images": [{"id": 1, "width": 100, "height": 100}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 3, "bbox": BOX}],
    "categories": [{"id": 3, "name": "a"}, {"id": 7, "name": "b"}],
}


def prediction(category: int, box: list, score: float) -> dict:
    return {"image_id": 1, "category_id": category, "bbox": box, "score": score}


@pytest.mark.parametrize(
    ("others", "kind"),
    [
        ([prediction(7, BOX, 0.9)], "Cls"),
        ([prediction(3, NEAR, 0.9)], "Loc"),
        ([prediction(3, FAR, 0.9)], "Bkg"),
        ([prediction(7, NEAR, 0.9)], "Both"),
        ([prediction(3, BOX, 0.9), prediction(3, BOX, 0.8)], "Dupe"),
        ([], "Miss"),
    ],
)
def test_one_mistake_of_each_kind(others: list[dict], kind: str) -> None:
    found = tide(DOCUMENT, others, "coco")
    number = 1 if kind in ("Miss", "Dupe", "Cls", "Loc") else 2  # the object is missed too
    assert found["counts"][kind] == 1 and sum(found["counts"].values()) == number
    if kind in ("Cls", "Loc"):
        assert found["groups"]["all"]["main"][kind] == pytest.approx(100)


def test_a_reading_is_taken_for_the_files() -> None:
    files = GOLDEN / "ties" / "gt.json", GOLDEN / "ties" / "dt_bbox.json"
    assert tide(reading(*files))["main"] == tide(*files)["main"]
    with pytest.raises(UserError, match='did you mean "lvis"'):
        tide(*files, rules="lvs")
    with pytest.raises(UserError, match="no results"):
        tide(files[0])
