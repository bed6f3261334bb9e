"""Annotations and results as users have them: missing fields, odd ids, nothing at all, and mistakes."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tailfin.errors import UserError
from tailfin.evaluation import evaluate


def truth(**changes: Any) -> dict[str, Any]:
    """Two images, three classes; the third class has no annotation."""
    document = {
        "images": [{"id": 10, "width": 200, "height": 100}, {"id": 20, "width": 200, "height": 100}],
        "categories": [{"id": 1, "name": "bolt"}, {"id": 5, "name": "nut"}, {"id": 9, "name": "cap"}],
        "annotations": [
            annotation(1, 10, 1, [10, 10, 40, 40]),
            annotation(2, 10, 5, [100, 10, 50, 60]),
            annotation(3, 20, 1, [20, 20, 60, 50]),
        ],
    }
    return {**document, **changes}


ONE = pytest.approx(1, abs=1e-12)  # the protocols' precision carries a rounding term


def annotation(number: int, image: int, category: int, box: list[float]) -> dict[str, Any]:
    x, y, w, h = box
    return {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": w * h,
        "iscrowd": 0,
        "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
    }


def perfect(document: dict[str, Any], score: float = 0.9) -> list[dict[str, Any]]:
    keys = ("image_id", "category_id", "bbox")
    return [{key: a[key] for key in keys} | {"score": score} for a in document["annotations"]]


def without(document: dict[str, Any], *keys: str) -> dict[str, Any]:
    document = copy.deepcopy(document)
    for entry in document["annotations"]:
        for key in keys:
            del entry[key]
    return document


@pytest.mark.parametrize("protocol", ["lvis", "coco", "lvis-fixed"])
def test_perfect_detections(protocol: str) -> None:
    metrics = evaluate(truth(), perfect(truth()), protocol)
    assert metrics["protocol"] == protocol
    assert metrics["bbox"]["AP"] == ONE
    assert metrics["bbox"]["APs"] == -1  # 1600 to 3000 pixels: none is small
    assert metrics["bbox"]["APm"] == ONE
    assert [row["bbox"]["AP"] for row in metrics["per_category"]] == [ONE, ONE, -1]
    assert [row["name"] for row in metrics["per_category"]] == ["bolt", "nut", "cap"]
    assert metrics["per_category"][0]["frequency"] is None


@pytest.mark.parametrize("kind", ["bbox", "segm"])
@pytest.mark.parametrize("protocol", ["lvis", "coco"])
def test_missing_area_and_iscrowd(protocol: str, kind: str) -> None:
    detections = [
        {k: a[k] for k in ("image_id", "category_id", "segmentation")} | {"score": 0.5} for a in truth()["annotations"]
    ]
    detections = perfect(truth()) if kind == "bbox" else detections
    full = evaluate(truth(), detections, protocol, kind)
    assert evaluate(without(truth(), "area", "iscrowd"), detections, protocol, kind) == full
    assert full[kind]["APm"] == ONE


def test_area_without_mask_is_that_of_the_box() -> None:
    bare = without(truth(), "area", "iscrowd", "segmentation")
    assert evaluate(bare, perfect(truth())) == evaluate(truth(), perfect(truth()))


def test_missing_area_is_that_of_the_mask() -> None:
    """A thin diagonal in a large box: its mask is small although the box is not."""
    document = without(truth(), "area")
    document["annotations"] = document["annotations"][:1]
    document["annotations"][0].update(bbox=[0, 0, 90, 90], segmentation=[[0, 0, 2, 0, 90, 90, 88, 90]])
    found = evaluate(document, perfect(document))["bbox"]
    assert (found["APs"], found["APl"]) == (ONE, -1)


def test_no_results() -> None:
    for results in ([], [{"image_id": 20, "category_id": 9, "bbox": [0, 0, 5, 5], "score": 0.1}]):
        for protocol in ("lvis", "coco", "lvis-fixed"):
            metrics = evaluate(truth(), results, protocol)
            assert metrics["bbox"]["AP"] == 0
            assert [row["bbox"]["AP"] for row in metrics["per_category"]] == [0, 0, -1]
            assert [row["bbox"]["AR"] for row in metrics["per_category"]] == [0, 0, -1]
    assert evaluate(truth(), [], "coco", "segm")["segm"]["AR@100"] == 0


def test_no_ground_truth() -> None:
    empty = truth(annotations=[])
    for document in (empty, truth(annotations=[], categories=[]), truth(annotations=[], images=[])):
        for protocol in ("lvis", "coco", "lvis-fixed"):
            results = perfect(truth()) if document is empty else []
            assert set(evaluate(document, results, protocol, ("bbox",))["bbox"].values()) == {-1}


@pytest.mark.parametrize("ids", [(0, 1, 2), (-5, 0, 7), (3, 2**40, 2**60)])
def test_ids_with_gaps_zero_negative_and_large(ids: tuple[int, int, int]) -> None:
    renamed = dict(zip((1, 5, 9), ids, strict=True))
    document = json.loads(json.dumps(truth()))
    document["categories"] = [{"id": renamed[c["id"]], "name": c["name"]} for c in document["categories"]][::-1]
    for entry in document["annotations"]:
        entry["category_id"] = renamed[entry["category_id"]]
        entry["id"] -= 1
    for protocol in ("lvis", "coco"):
        metrics = evaluate(document, perfect(document), protocol)
        assert metrics["bbox"] == evaluate(truth(), perfect(truth()), protocol)["bbox"]
        assert [row["id"] for row in metrics["per_category"]] == sorted(ids)


def test_image_without_negative_list_is_exhaustive() -> None:
    wrong = {"image_id": 20, "category_id": 5, "bbox": [0, 0, 30, 30], "score": 0.95}
    judged = truth()
    for image in judged["images"]:
        image.update(neg_category_ids=[], not_exhaustive_category_ids=[])
    by_class = [
        {row["name"]: row["bbox"]["AP"] for row in evaluate(document, [*perfect(truth()), wrong])["per_category"]}
        for document in (truth(), judged)
    ]
    assert by_class[0]["nut"] == pytest.approx(0.5)  # a false positive before the only hit
    assert by_class[1]["nut"] == ONE  # nobody looked for nuts in image 20
    judged["images"][1]["neg_category_ids"] = [5, 12345]
    assert evaluate(judged, [*perfect(truth()), wrong])["per_category"][1]["bbox"]["AP"] == pytest.approx(0.5)
    judged["images"][1]["not_exhaustive_category_ids"] = [5]
    assert evaluate(judged, [*perfect(truth()), wrong])["per_category"][1]["bbox"]["AP"] == ONE


def test_files_dicts_arrays_and_tensors_agree(tmp_path: Path) -> None:
    plain = perfect(truth(), 0.25)
    (tmp_path / "gt.json").write_text("\ufeff" + json.dumps(truth()))
    (tmp_path / "dt.json").write_text(json.dumps(plain))
    numpy = [{**e, "image_id": np.int64(e["image_id"]), "bbox": np.array(e["bbox"], np.float32)} for e in plain]
    tensors = [{**e, "score": torch.tensor(e["score"]), "bbox": torch.tensor(e["bbox"])} for e in plain]
    want = evaluate(truth(), plain)
    assert evaluate(tmp_path / "gt.json", tmp_path / "dt.json") == want
    assert evaluate(str(tmp_path / "gt.json"), numpy) == want
    assert evaluate(truth(info={"made": object()}), tensors) == want


def test_inputs_are_not_changed() -> None:
    document, results = truth(), perfect(truth())
    before = copy.deepcopy((document, results))
    evaluate(document, results, "lvis", "bbox")
    assert (document, results) == before


BAD_RESULTS = [
    ({"image_id": 11}, "entry 1: image_id 11 is not in annotations (nearest: 10"),
    ({"category_id": 6}, "entry 1: category_id 6 is not in annotations (nearest: 5"),
    ({"image_id": "10"}, 'entry 1: image_id is the text "10"'),
    ({"score": float("nan")}, "entry 1, score: Expected `float`, got `null` (missing, or not a finite number)"),
    ({"score": np.float32("inf")}, "entry 1, score"),
    ({"score": None}, "entry 1, score"),
    ({"bbox": [1, 2, 3]}, "entry 1, bbox: Expected `array` of at least length 4, got 3"),
    ({"bbox": [1, 2, 3, 4, 5]}, "entry 1: bbox has more than four numbers"),
    ({"bbox": [1, 2, -3, 4]}, "entry 1: bbox [1.0, 2.0, -3.0, 4.0] has a negative width or height"),
    ({"bbox": [1, float("nan"), 3, 4]}, "entry 1, bbox"),
    ({"bbox": None}, "entry 1 has no bbox"),
]


@pytest.mark.parametrize(("change", "message"), BAD_RESULTS)
@pytest.mark.parametrize("as_file", [False, True])
def test_bad_results(change: dict[str, Any], message: str, as_file: bool, tmp_path: Path) -> None:
    results: Any = perfect(truth())
    results[1] |= change
    if as_file:
        path = tmp_path / "dt.json"
        path.write_text(json.dumps(results, default=float))
        results = path
    with pytest.raises(UserError) as error:
        evaluate(truth(), results)
    assert message in str(error.value)
    assert not as_file or "dt.json" in str(error.value)


@pytest.mark.parametrize("key", ["image_id", "category_id", "score", "bbox"])
def test_missing_keys(key: str) -> None:
    results = perfect(truth())
    del results[2][key]
    with pytest.raises(UserError, match=f"entry 2.*{key}"):
        evaluate(truth(), results)


BAD_TRUTH = [
    (truth(annotations=[annotation(7, 11, 1, [0, 0, 1, 1])]), "annotation 7: there is no image_id 11 (nearest: 10"),
    (truth(annotations=[annotation(7, 10, 2, [0, 0, 1, 1])]), "annotation 7: there is no category_id 2 (nearest: 1"),
    (truth(annotations=[annotation(7, 10, 1, [0, 0, 1, -1])]), "annotation 7: bbox [0.0, 0.0, 1.0, -1.0] has a neg"),
    (truth(annotations=[annotation(7, 10, 1, [0, 0, 1, 1, 1][:4]) | {"bbox": [0, 0]}]), "annotations entry 0, bbox"),
    (truth(images=[{"id": 10}, {"id": 20}, {"id": 10}]), "image id 10 is given twice"),
    (truth(categories=[{"id": 5}] * 2), "category id 5 is given twice"),
    ({"images": [], "categories": [], "annotation": []}, 'there is no "annotations" (did you mean "annotation"?)'),
]


@pytest.mark.parametrize(("document", "message"), BAD_TRUTH)
def test_bad_annotations(document: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        evaluate(document, [])
    assert message in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    good, broken, empty = (tmp_path / name for name in ("val.json", "broken.json", "empty.json"))
    good.write_text(json.dumps(truth()))
    broken.write_text('{"images": [')
    empty.write_text("  ")
    for given, results, message in [
        (tmp_path / "vall.json", [], 'vall.json does not exist (did you mean "val.json"?)'),
        (broken, [], "broken.json is not valid JSON"),
        (empty, [], "empty.json is empty"),
        (good, good, 'val.json: an object, and a list [{"image_id": ...'),
        (good, tmp_path, "holds no finished shard and no results JSON"),
        (good, 7, "a path or a list of entries is needed, not a int"),
        (7, [], "a path or a COCO dict is needed, not a int"),
        (good, {"segm": []}, 'there are none for "bbox" (given: segm)'),
    ]:
        with pytest.raises(UserError) as error:
            evaluate(given, results)
        assert message in str(error.value)


def test_bad_options() -> None:
    for options, message in [
        ({"protocol": "lviss"}, 'unknown protocol "lviss" (did you mean "lvis"?)'),
        ({"iou_type": "box"}, 'unknown IoU type "box" (did you mean "bbox"?)'),
        ({"iou_type": ()}, "no IoU type"),
        ({"max_dets": 0}, "max_dets is 0"),
        ({"max_dets": (10, 300)}, 'protocol "lvis" takes one limit'),
        ({"protocol": "coco", "max_dets": (10, 1)}, "must ascend"),
        ({"protocol": "lvis-fixed", "max_dets": 300}, "has no limit per image"),
        ({"protocol": "lvis-fixed", "per_class": 0}, "per_class is 0"),
        ({"per_class": 20}, 'belongs to protocol "lvis-fixed"'),
        ({"use_cats": False}, 'classes can be pooled (use_cats=False, --no-cats) in protocol "coco"'),
        ({"names": ["a"]}, "1 names were given for the 3 categories"),
    ]:
        with pytest.raises(UserError) as error:
            evaluate(truth(), [], **options)
        assert message in str(error.value)


def test_masks_that_cannot_be_read() -> None:
    results = [{**entry, "segmentation": [[1, 2]]} for entry in perfect(truth())]
    with pytest.raises(UserError, match="entry 0: segmentation is neither polygons nor RLE"):
        evaluate(truth(), results, "coco", "segm")
    small = [{**e, "segmentation": {"size": [5, 5], "counts": [0, 25]}} for e in perfect(truth())]
    with pytest.raises(UserError, match=r"entry 0: the mask is \[5, 5\], its image \[100, 200\]"):
        evaluate(truth(), small, "coco", "segm")
    with pytest.raises(UserError, match="entry 0 has no segmentation"):
        evaluate(truth(), perfect(truth()), "coco", "segm")
    with pytest.raises(UserError, match="annotation 1 has no segmentation"):
        evaluate(without(truth(), "segmentation"), [], "coco", "segm")
    with pytest.raises(UserError, match="image 10 has no width and height"):
        evaluate(truth(images=[{"id": 10}, {"id": 20}]), [], "coco", "segm")


def test_keys_of_the_summary() -> None:
    results = perfect(truth())
    areas = ["APs", "APm", "APl"]
    groups = ["APr", "APc", "APf"]
    head = ["AP", "AP50", "AP75", *areas, *groups]
    lvis = [*head, "AR@300", "ARs@300", "ARm@300", "ARl@300"]
    assert list(evaluate(truth(), results)["bbox"]) == lvis
    assert list(evaluate(truth(), results, max_dets=-1)["bbox"])[-4:] == ["AR@-1", "ARs@-1", "ARm@-1", "ARl@-1"]
    assert list(evaluate(truth(), results, "lvis-fixed")["bbox"]) == [*head, "AR", "ARs", "ARm", "ARl"]
    coco = ["AR@1", "AR@10", "AR@100", "ARs", "ARm", "ARl"]
    assert list(evaluate(truth(), results, "coco")["bbox"]) == [*head, *coco]
    more = list(evaluate(truth(), results, "coco", max_dets=300)["bbox"])
    assert more[-6:] == ["AR@1", "AR@10", "AR@300", "ARs", "ARm", "ARl"]
    assert list(evaluate(truth(), results, "coco", max_dets=(5, -1))["bbox"])[-5:-3] == ["AR@5", "AR@-1"]
    row = evaluate(truth(), results)["per_category"][0]
    assert list(row) == ["id", "name", "frequency", "image_count", "instance_count", "bbox"]
    assert list(row["bbox"]) == ["AP", "AP50", "AP75", *areas, "AR"]
    assert json.loads(json.dumps(evaluate(truth(), results))) == evaluate(truth(), results)


def test_names_replace_those_of_the_file() -> None:
    by_order = evaluate(truth(), [], names=["Bolzen", "Mutter", "Kappe"])
    by_id = evaluate(truth(), [], names={5: "Mutter"})
    assert [row["name"] for row in by_order["per_category"]] == ["Bolzen", "Mutter", "Kappe"]
    assert [row["name"] for row in by_id["per_category"]] == ["bolt", "Mutter", "cap"]


def crowded(per_image: list[int]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    document = truth(images=[{"id": i, "width": 9, "height": 9} for i in range(len(per_image))], annotations=[])
    entry = {"category_id": 1, "bbox": [0, 0, 5, 5]}
    return document, [{"image_id": i, **entry, "score": 1 / (k + 1)} for i, n in enumerate(per_image) for k in range(n)]


@pytest.mark.parametrize("per_image", [[100] * 5, [300, 300, 12, 0, 250], [40] * 6 + [3, 7]])
def test_ap_fixed_warns_about_results_cut_per_image(per_image: list[int]) -> None:
    with pytest.warns(UserWarning, match=f"exactly {max(per_image)} detections.*cut per image") as caught:
        evaluate(*crowded(per_image), "lvis-fixed")
    assert caught[0].filename == __file__


@pytest.mark.parametrize("per_image", [[], [1, 1, 1, 1], [310, 402, 35, 280], [19, 19, 19]])
def test_ap_fixed_is_silent_about_results_that_are_not_cut(per_image: list[int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(*crowded(per_image), "lvis-fixed")
        evaluate(*crowded([100] * 5), "lvis")
