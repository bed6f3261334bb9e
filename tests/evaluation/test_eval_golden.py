"""The numbers and arrays of lvis-api, pycocotools and the AP-fixed script, reproduced."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tailfin.evaluation import evaluate
from tailfin.evaluation.curves import coco_curves, lvis_curves
from tailfin.evaluation.detections import best_per_image, load_detections
from tailfin.evaluation.truth import load_truth

TOLERANCE = 1e-9
CASES = [
    ("crowd", "bbox"),
    ("edge", "bbox"),
    ("federated", "bbox"),
    ("over300", "bbox"),
    ("segm", "bbox"),
    ("segm", "segm"),
    ("ties", "bbox"),
    ("lvis_val_100", "bbox"),
    ("lvis_val_100", "segm"),
]
RUNS: dict[str, dict[str, Any]] = {
    "lvis": {"protocol": "lvis"},
    "lvis_no_limit": {"protocol": "lvis", "max_dets": -1},
    "coco": {"protocol": "coco"},
    "coco_class_agnostic": {"protocol": "coco", "use_cats": False},
    "ap_fixed_10000": {"protocol": "lvis-fixed", "per_class": 10_000},
    "ap_fixed_20": {"protocol": "lvis-fixed", "per_class": 20},
}


def case_folder(case: str, golden_dir: Path, request: pytest.FixtureRequest) -> Path:
    folder = golden_dir / "eval" / case
    if case == "lvis_val_100":  # too large for the repository
        folder = request.getfixturevalue("data_dir").parent / "golden" / "eval" / case
        if not folder.is_dir():
            pytest.skip(f"the 100-image LVIS sample is not at {folder}")
    return folder


@pytest.fixture(scope="module")
def expected(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "eval" / "expected.json").read_text())["cases"]


@pytest.mark.filterwarnings("ignore:.*cut per image")
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(("case", "kind"), CASES)
def test_metrics(
    case: str, kind: str, run: str, expected: dict[str, Any], golden_dir: Path, request: pytest.FixtureRequest
) -> None:
    folder = case_folder(case, golden_dir, request)
    if case == "lvis_val_100" and run not in expected[case][kind]:
        pytest.skip("the reference tools were not run so on this case")
    want = expected[case][kind][run]
    got = evaluate(folder / "gt.json", folder / f"dt_{kind}.json", iou_type=kind, **RUNS[run])
    want_metrics = want.get("metrics", want)
    for name, value in want_metrics.items():
        assert got[kind][name] == pytest.approx(value, abs=TOLERANCE, rel=0), name
    own_groups = {"APr", "APc", "APf"} if RUNS[run]["protocol"] == "coco" else set()
    assert set(got[kind]) == set(want_metrics) | own_groups
    if want.get("per_category_ap"):
        rows = {str(row["id"]): row[kind]["AP"] for row in got["per_category"]}
        assert rows == pytest.approx(want["per_category_ap"], abs=TOLERANCE, rel=0)


@pytest.mark.parametrize(("case", "kind"), CASES[:7])
def test_lvis_arrays(case: str, kind: str, golden_dir: Path) -> None:
    folder = golden_dir / "eval"
    truth = load_truth(folder / case / "gt.json")
    detections = best_per_image(load_detections(folder / case / f"dt_{kind}.json", truth, kind), 300)
    got = lvis_curves(truth, detections, kind)
    with np.load(folder / "arrays" / f"{case}_lvis_{kind}.npz") as want:
        np.testing.assert_array_equal(truth.category_ids, want["cat_ids"])
        np.testing.assert_allclose(got.precision[..., 0], want["precision"], rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(got.recall[..., 0], want["recall"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("case", "kind"), CASES[:7])
def test_coco_arrays(case: str, kind: str, golden_dir: Path) -> None:
    folder = golden_dir / "eval"
    truth = load_truth(folder / case / "gt.json")
    detections = load_detections(folder / case / f"dt_{kind}.json", truth, kind)
    got = coco_curves(truth, detections, kind, (1, 10, 100))
    with np.load(folder / "arrays" / f"{case}_coco_{kind}.npz") as want:
        for name in ("precision", "recall", "scores"):
            np.testing.assert_allclose(getattr(got, name), want[name], rtol=0, atol=TOLERANCE)


def test_both_iou_types_in_one_call(expected: dict[str, Any], golden_dir: Path) -> None:
    folder = golden_dir / "eval" / "segm"
    results = {kind: folder / f"dt_{kind}.json" for kind in ("bbox", "segm")}
    got = evaluate(folder / "gt.json", results, "lvis", ("bbox", "segm"))
    for kind in ("bbox", "segm"):
        assert got[kind] == pytest.approx(expected["segm"][kind]["lvis"]["metrics"], abs=TOLERANCE, rel=0)
    assert all({"bbox", "segm"} <= set(row) for row in got["per_category"])


def test_the_limit_of_300_changes_the_result(golden_dir: Path) -> None:
    """Guards the golden case itself: without the limit the numbers differ, so the equality above says something."""
    folder = golden_dir / "eval" / "over300"
    limited, unlimited = (
        evaluate(folder / "gt.json", folder / "dt_bbox.json", max_dets=limit)["bbox"]["AP"] for limit in (300, -1)
    )
    assert abs(limited - unlimited) > 1e-3
