"""paired_bootstrap: AP as the protocols have it, intervals that cover, seeds as one side, what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tailfin.errors import UserError
from tailfin.evaluation import evaluate, paired_bootstrap
from tailfin.evaluation.bootstrap import compare
from tailfin.evaluation.matches import Matches, average_precision, matches
from tailfin.evaluation.reading import reading

GOLDEN = Path(__file__).parent.parent / "golden" / "eval"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())["cases"]
CASES = [
    (case, kind, key)
    for case, kinds in EXPECTED.items()
    if (GOLDEN / case).is_dir()
    for kind in kinds
    for key in ("lvis", "lvis_no_limit", "coco")
]


@pytest.mark.parametrize(("case", "kind", "key"), CASES)
def test_average_precision_is_that_of_the_reference(case: str, kind: str, key: str) -> None:
    found = reading(GOLDEN / case / "gt.json", GOLDEN / case / f"dt_{kind}.json", kind)
    matched = matches(found, key.removesuffix("_no_limit"), -1 if key.endswith("limit") else None)
    expected = EXPECTED[case][kind][key]["per_category_ap"]
    table = average_precision(matched)
    for number, own in zip(matched.category_ids.tolist(), table.mean(axis=0), strict=True):
        assert (own if np.isfinite(own) else -1) == pytest.approx(expected[str(number)], abs=1e-9)
    assert np.nanmean(table[0]) == pytest.approx(EXPECTED[case][kind][key]["metrics"]["AP50"], abs=1e-9)


def test_weights_count_images_as_often_as_they_say() -> None:
    document = json.loads((GOLDEN / "crowd" / "gt.json").read_text())
    results = json.loads((GOLDEN / "crowd" / "dt_bbox.json").read_text())
    images = sorted(image["id"] for image in document["images"])
    rng = np.random.default_rng(3)
    weights = rng.integers(0, 3, len(images))
    own = average_precision(matches(reading(document, results), "coco"), weights.astype(float))
    copies = [(old, old + 10_000 * copy) for old, number in zip(images, weights, strict=True) for copy in range(number)]

    def spread(rows: list[dict], key: str) -> list[dict]:
        found = [{**row, key: new} for old, new in copies for row in rows if row[key] == old]
        return [{**row, "id": number} for number, row in enumerate(found, 1)] if key == "image_id" else found

    images_again, objects = spread(document["images"], "id"), spread(document["annotations"], "image_id")
    again = {**document, "images": images_again, "annotations": objects}
    other = average_precision(matches(reading(again, spread(results, "image_id")), "coco"))
    # equal scores of different images stand in another order: distinct ones make the comparison exact
    np.testing.assert_allclose(own, other, atol=0.02)
    assert np.nanmean(own) == pytest.approx(np.nanmean(other), abs=2e-3)


def made(hits: np.ndarray) -> Matches:
    """One object and one detection per image, found or not."""
    images = len(hits)
    return Matches(
        images=images,
        category_ids=np.array([1]),
        rows=np.arange(images),
        image_rows=np.arange(images),
        category_rows=np.zeros(images, dtype=np.int64),
        scores=np.linspace(1, 0.5, images),
        hit=np.tile(hits, (10, 1)),
        ignored=np.tile(~hits, (10, 1)),  # no false positive: AP is the recall, on a grid of 101 points
        object_images=np.arange(images),
        object_categories=np.zeros(images, dtype=np.int64),
    )


def test_intervals_cover_the_difference() -> None:
    rng = np.random.default_rng(11)
    chances, covered = np.array([0.5, 0.65]), 0
    for trial in range(50):
        shared = rng.random(120)  # the same pictures are hard for both
        runs = [made(0.7 * shared + 0.3 * rng.random(120) < chance) for chance in chances]
        _, drawn = compare([runs[0]], [runs[1]], ["r"], draws=100, seed=trial)
        low, high = np.quantile(drawn[:, 0], [0.025, 0.975])
        covered += low <= _chance(chances[1]) - _chance(chances[0]) <= high
    assert covered >= 42  # of 50; 95 % are 47 or 48


def _chance(limit: float) -> float:
    """P(0.7 u + 0.3 v < limit) for limit in 0.3..0.7."""
    return (limit - 0.15) / 0.7


def test_seeds_are_one_side() -> None:
    truth, results = GOLDEN / "ties" / "gt.json", json.loads((GOLDEN / "ties" / "dt_bbox.json").read_text())
    rng = np.random.default_rng(5)
    seeds = [[row for row in results if rng.random() < share] for share in (0.5, 0.6)]
    found = paired_bootstrap(seeds, results, truth, protocol="coco", draws=60)
    own = found["metrics"]["AP"]
    expected = [evaluate(truth, seed, "coco")["bbox"]["AP"] for seed in seeds]
    assert own["a"] == pytest.approx(expected, abs=1e-9) and len(own["b"]) == 1
    assert own["difference"] == pytest.approx(own["b"][0] - np.mean(expected), abs=1e-9)
    assert own["low"] <= own["difference"] <= own["high"] and own["beyond"] == (own["low"] > 0)
    assert {"AP", "AP50", "AP75", "APr", "APc", "APf"} >= set(found["metrics"])
    assert found["per_category"] and {"id", "name", "difference", "beyond"} <= set(found["per_category"][0])


def test_a_run_does_not_differ_from_itself() -> None:
    truth, results = GOLDEN / "edge" / "gt.json", GOLDEN / "edge" / "dt_bbox.json"
    own = paired_bootstrap(results, results, truth, draws=20)["metrics"]["AP"]
    assert own["difference"] == own["low"] == own["high"] == 0 and not own["beyond"]


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(UserError, match="need annotations"):
        paired_bootstrap([], [])
    readings = [reading(GOLDEN / case / "gt.json", GOLDEN / case / "dt_bbox.json") for case in ("edge", "ties")]
    with pytest.raises(UserError, match="other images or classes"):
        paired_bootstrap(*readings)
