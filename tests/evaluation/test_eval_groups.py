"""Frequency groups and COCO-LT's groups: which count decides, and on which side of a bound a class falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tailfin.errors import UserError
from tailfin.evaluation import TrainCounts, evaluate

BOX = [10, 10, 30, 30]


def truth(*categories: dict[str, Any]) -> dict[str, Any]:
    """One image per class with one object of it; class ids are 1, 2, ..."""
    count = len(categories)
    return {
        "images": [{"id": k, "file_name": f"{k}.jpg", "width": 100, "height": 100} for k in range(count)],
        "categories": [{"id": k + 1, "name": f"class {k + 1}", **fields} for k, fields in enumerate(categories)],
        "annotations": [{"image_id": k, "category_id": k + 1, "bbox": BOX} for k in range(count)],
    }


def found(*classes: int) -> list[dict[str, Any]]:
    """A perfect detection of each of these classes; the others stay unfound, so that a group's AP tells its members."""
    return [{"image_id": c - 1, "category_id": c, "bbox": BOX, "score": 0.5} for c in classes]


def groups(document: dict[str, Any], **options: Any) -> str:
    """The letters of the classes in order, "-" for none; checked against the metrics."""
    metrics = evaluate(document, [], **options)
    letters = [row["frequency"] for row in metrics["per_category"]]
    for letter in "rcf":
        members = [k + 1 for k, each in enumerate(letters) if each == letter]
        score = evaluate(document, found(*members[:1]), **options)["bbox"][f"AP{letter}"]
        assert score == (pytest.approx(1 / len(members)) if members else -1)
    return "".join(letter or "-" for letter in letters)


@pytest.mark.parametrize("protocol", ["lvis", "coco", "lvis-fixed"])
def test_counts_of_the_training_file_with_lvis_bounds(protocol: str) -> None:
    counts = dict(zip(range(1, 8), (1, 10, 11, 100, 101, 0, 5000), strict=True))
    assert groups(truth(*[{}] * 8), protocol=protocol, train_counts=counts) == "rrccf-f-"


def test_own_frequency_comes_before_counts() -> None:
    document = truth({"frequency": "f"}, {"frequency": "r"}, {}, {"frequency": None}, {"frequency": "often"})
    assert groups(document, train_counts={1: 3, 2: 3000, 3: 50, 5: 7}) == "frc-r"
    assert groups(document) == "fr---"


def test_class_without_training_images_keeps_its_own_frequency() -> None:
    assert groups(truth({"frequency": "r", "image_count": 0}, {"image_count": 0}), train_counts={}) == "r-"


def test_explicit_bounds_come_first() -> None:
    own = truth({"frequency": "f"}, {"frequency": "f"}, {"frequency": "f"}, {"frequency": "f"})
    counts = TrainCounts({1: 3, 2: 4, 3: 8, 4: 9})
    assert groups(own, group_bounds=(3, 8), train_counts=counts) == "rccf"
    fields = truth(*({"frequency": "c", "image_count": n} for n in (3, 4, 9, 0)))
    assert groups(fields, group_bounds=[3, 8]) == "rcf-"
    assert groups(fields, group_bounds=[3, 8], train_counts={4: 1}) == "---r"
    with pytest.raises(UserError, match='category 2 \\("class 2"\\) has no image_count'):
        evaluate(truth({"image_count": 4}, {}), [], group_bounds=(3, 8))


@pytest.mark.parametrize("bounds", [(10,), (10, 10), (100, 10), (0, 5), (1, 2, 3)])
def test_bad_bounds(bounds: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="two ascending image counts are needed"):
        evaluate(truth({"image_count": 4}), [], group_bounds=bounds)


def test_counts_of_the_evaluated_file_are_never_used() -> None:
    """The file shows every class in one image: that would be rare; without training counts there are no groups."""
    assert groups(truth({}, {})) == "--"


COCO_LT = (11, 19, 20, 399, 400, 7999, 8000, 300_000)


@pytest.mark.parametrize("source", ["fields", "counts"])
def test_coco_lt_groups(source: str) -> None:
    document = truth(*({"instance_count": n} if source == "fields" else {} for n in COCO_LT))
    counts = None if source == "fields" else TrainCounts({}, {k + 1: n for k, n in enumerate(COCO_LT)})
    for number in range(4):
        for member in (2 * number + 1, 2 * number + 2):
            metrics = evaluate(document, found(member), "groups", train_counts=counts)["bbox"]
            scores = [metrics[f"AP{k}"] for k in range(1, 5)]
            assert scores == pytest.approx([0.5 if k == number else 0 for k in range(4)])
    assert set(evaluate(document, [], "coco")["bbox"]) | {"AP1", "AP2", "AP3", "AP4"} == set(metrics)


def test_coco_lt_group_skips_classes_without_ground_truth() -> None:
    document = truth({"instance_count": 5}, {"instance_count": 6}, {"instance_count": 500})
    document["annotations"] = document["annotations"][:1]
    metrics = evaluate(document, found(1), "groups")["bbox"]
    assert [metrics[f"AP{k}"] for k in range(1, 5)] == pytest.approx([1, -1, -1, -1])


def test_coco_lt_needs_instances() -> None:
    with pytest.raises(UserError, match='protocol "groups" needs training instances: category 2'):
        evaluate(truth({"instance_count": 3}, {}), [], "groups")
    with pytest.raises(UserError, match="category 1"):
        evaluate(truth({}), [], "groups", train_counts={1: 3})  # image counts say nothing of instances


def test_counts_in_the_table_of_classes() -> None:
    document = truth({"image_count": 4, "instance_count": 9}, {})
    rows = evaluate(document, [])["per_category"]
    assert [(row["image_count"], row["instance_count"]) for row in rows] == [(4, 9), (None, None)]
    rows = evaluate(document, [], train_counts=TrainCounts({1: 7}, {1: 8}))["per_category"]
    assert [(row["image_count"], row["instance_count"]) for row in rows] == [(7, 8), (0, 0)]
    rows = evaluate(document, [], train_counts={1: 7})["per_category"]
    assert [(row["image_count"], row["instance_count"]) for row in rows] == [(7, 9), (0, None)]


def test_training_file(tmp_path: Path) -> None:
    document = truth(*[{}] * 3)
    twice = [{"image_id": 0, "category_id": 1, "bbox": BOX}, {"image_id": 0, "category_id": 2, "bbox": BOX}]
    document["annotations"] = [
        {**entry, "id": k} for k, entry in enumerate([*document["annotations"][:2], *twice, *twice])
    ]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document))
    counts = TrainCounts.from_json(path)
    assert (counts.image_count, counts.instance_count) == ({1: 1, 2: 2, 3: 0}, {1: 3, 2: 3, 3: 0})
    assert groups(truth(*[{}] * 3), train_counts=path) == groups(truth(*[{}] * 3), train_counts=counts) == "rr-"
    with pytest.raises(UserError, match="no-such-file.json"):
        evaluate(truth({}), [], train_counts=tmp_path / "no-such-file.json")


def test_coco_lt_groups_of_masks() -> None:
    """Masks have groups of their own: a class with right boxes and wrong masks counts in the boxes alone."""
    document = truth(*({"instance_count": n} for n in (19, 399, 400, 8000, 9000)))
    left, top, width, height = BOX
    whole = [[left, top, left + width, top, left + width, top + height, left, top + height]]
    sliver = [[left, top, left + width, top, left + width, top + 6]]  # a tenth of it
    for annotation in document["annotations"]:
        annotation |= {"segmentation": whole, "area": width * height, "iscrowd": 0}
    results = [{**one, "segmentation": whole} for one in found(1, 2, 4)]
    results += [{**one, "segmentation": sliver} for one in found(3, 5)]
    metrics = evaluate(document, results, "groups", ("bbox", "segm"))
    assert [metrics["bbox"][f"AP{k}"] for k in range(1, 5)] == pytest.approx([1, 1, 1, 1])
    assert [metrics["segm"][f"AP{k}"] for k in range(1, 5)] == pytest.approx([1, 1, 0, 0.5])
    assert metrics["segm"]["AP"] == pytest.approx(3 / 5)
