"""Results, training counts and models of other files than the one that is evaluated: joined by name, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tailfin as library
from tailfin.class_rows import join_class_rows


def truth(ids: tuple[int, int, int] = (1, 2, 3), counts: tuple[int, int, int] = (2, 2, 2)) -> dict[str, Any]:
    """Pictures of one object each, so many of the classes car, bus and tram; `ids` are theirs."""
    document: dict[str, Any] = {"images": [], "annotations": []}
    document["categories"] = [{"id": n, "name": name} for n, name in zip(ids, ("car", "bus", "tram"), strict=True)]
    for label, count in enumerate(counts):
        for _ in range(count):
            k = len(document["images"]) + 1
            document["images"].append({"id": k, "file_name": f"{k:05d}.jpg", "width": 96, "height": 72})
            box = {"bbox": [5 + k % 7, 5 + k % 9, 24, 20], "area": 480, "iscrowd": 0}
            document["annotations"].append({"id": k, "image_id": k, "category_id": ids[label], **box})
    return document


def perfect(document: dict[str, Any], **more: Any) -> list[dict[str, Any]]:
    return [
        {**{key: a[key] for key in ("image_id", "category_id", "bbox")}, "score": 0.9, **more}
        for a in document["annotations"]
    ]


@pytest.fixture
def measured(tailfin, tmp_path):
    """`measured(document, results, *options)` -> (metrics, standard error) of protocol coco."""

    def run(document: Any, results: Any, *options: object, protocol: str = "coco") -> tuple[dict[str, Any], str]:
        (tmp_path / "val.json").write_text(json.dumps(document))
        (tmp_path / "results.json").write_text(json.dumps(results))
        command = ("evaluate", "--results", tmp_path / "results.json", "--annotations", tmp_path / "val.json")
        outcome = tailfin(*command, "--protocol", protocol, "--json", tmp_path / "m.json", *options)
        if outcome.code:
            return {}, outcome.error
        return json.loads((tmp_path / "m.json").read_text())["bbox"], outcome.err

    return run


ONE = pytest.approx(1)


# ---- training counts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [(1, 2, 3), (3, 1, 2), (70, 80, 90)])
def test_training_counts_are_joined_by_name(measured, tmp_path, ids):
    train = tmp_path / "train.json"
    train.write_text(json.dumps(truth(counts=(150, 40, 4))))
    document = truth(ids)
    results = [entry for entry in perfect(document) if entry["category_id"] != ids[2]]  # no tram is found
    metrics, said = measured(document, results, "--train", train)
    assert (metrics["APr"], metrics["APc"], metrics["APf"]) == (0, ONE, ONE) and "warning" not in said


def test_classes_without_a_partner_in_the_training_file_are_said(measured, tmp_path):
    document = truth()
    train = truth(counts=(150, 40, 4))
    train["categories"][2]["name"] = "tramway"
    (tmp_path / "train.json").write_text(json.dumps(train))
    metrics, said = measured(document, perfect(document), "--train", tmp_path / "train.json")
    assert metrics["APr"] == -1 and "1 of its 3 classes are not in the training file" in said and '"tram"' in said
    for category in train["categories"]:
        category["name"] += "!"
    (tmp_path / "train.json").write_text(json.dumps(train))
    assert "none of its 3 classes" in measured(document, perfect(document), "--train", tmp_path / "train.json")[1]


# ---- names in results ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "pics/", "/data/set/pics/", "C:\\pics\\"])
def test_file_names_that_contradict_the_ids_count(measured, prefix):
    document = truth()
    numbers = [image["id"] for image in document["images"]]
    results = [
        {**entry, "image_id": numbers[-entry["image_id"]], "file_name": f"{prefix}{entry['image_id']:05d}.jpg"}
        for entry in perfect(document)
    ]
    metrics, said = measured(document, results)
    assert metrics["AP"] == ONE
    assert "6 of 6 entries" in said and "image_id 6 is 00006.jpg in annotations" in said and "00001.jpg" in said
    right = [{**entry, "image_id": int(entry["file_name"][-9:-4])} for entry in results]
    assert measured(document, right) == (metrics, "")


def test_names_that_nobody_knows_are_refused(measured):
    document = truth()
    results = perfect(document)
    results[2]["file_name"] = "elsewhere.jpg"
    assert "entry 2: image_id 3 is 00003.jpg" in measured(document, results)[1]
    results[2] = {**perfect(document)[2], "category_name": "lorry"}
    assert "entry 2: category_id 2 is bus" in measured(document, results)[1]
    for image in document["images"]:
        del image["file_name"]  # nothing to contradict
    assert measured(document, perfect(document, file_name="x.jpg"))[0]["AP"] == ONE


def test_equal_names_in_two_folders_are_told_by_their_ids_alone(measured):
    document = truth()
    for image in document["images"]:
        image["file_name"] = f"{'ab'[image['id'] % 2]}/{(image['id'] + 1) // 2}.jpg"
    assert measured(document, perfect(document, file_name="1.jpg"))[1].startswith("error: ")
    results = [{**entry, "file_name": f"{(entry['image_id'] + 1) // 2}.jpg"} for entry in perfect(document)]
    assert measured(document, results) == (measured(document, perfect(document))[0], "")
    results[0]["image_id"] = 5
    assert "may be any of b/1.jpg, a/1.jpg" in measured(document, results)[1]


def test_category_names_that_contradict_the_ids_count(measured):
    document = truth()
    names = {1: "car", 2: "bus", 3: "tram"}
    results = [
        {**entry, "category_id": entry["category_id"] % 3 + 1, "category_name": names[entry["category_id"]]}
        for entry in perfect(document)
    ]
    metrics, said = measured(document, results)
    assert metrics["AP"] == ONE and "category_id and category_name contradict each other" in said


@pytest.mark.parametrize("key", ["filename", "image_name", "image_path", "image"])
def test_pictures_are_told_under_other_programs_keys(measured, key):
    document = truth()
    results = [{**e, "image_id": 7 - e["image_id"], key: f"x/{e['image_id']:05d}.jpg"} for e in perfect(document)]
    metrics, said = measured(document, results)
    assert metrics["AP"] == ONE and f"image_id and {key} contradict each other: matched by {key}" in said
    del results[1][key]
    assert f"entry 1 has no {key}, and elsewhere image_id and {key} contradict" in measured(document, results)[1]
    odd = [{**entry, key: "/9j/4AAQSkZJRg=="} for entry in perfect(document)]  # no name: the picture itself
    assert measured(document, odd) == (measured(document, perfect(document))[0], "")


@pytest.mark.parametrize("key", ["class_name", "category", "label", "class", "name"])
def test_classes_are_told_under_other_programs_keys(measured, key):
    document = truth()
    names = {1: "car", 2: "Bus", 3: "tram "}
    results = [{**e, "category_id": e["category_id"] % 3 + 1, key: names[e["category_id"]]} for e in perfect(document)]
    metrics, said = measured(document, results)
    assert metrics["AP"] == ONE and f"category_id and {key} contradict each other" in said
    for other in (7, "object"):  # a number, and what is no class
        assert measured(document, perfect(document, **{key: other}))[0]["AP"] == ONE


def test_results_in_an_object_are_refused_in_words(measured):
    assert 'an object, and a list [{"image_id": ...' in measured(truth(), {"annotations": perfect(truth())})[1]


def test_ids_as_floats_stems_and_other_text(measured):
    document = truth()
    floats = [
        {**e, "image_id": float(e["image_id"]), "category_id": float(e["category_id"])} for e in perfect(document)
    ]
    assert measured(document, floats) == measured(document, perfect(document))
    stems = [{**e, "image_id": f"{e['image_id']:05d}"} for e in perfect(document)]
    assert measured(document, stems)[0]["AP"] == ONE
    assert "image_id is 1.5, a whole number" in measured(document, [{**perfect(document)[0], "image_id": 1.5}])[1]
    texts = [{**e, "image_id": str(e["image_id"])} for e in perfect(document)]
    assert 'entry 0: image_id is the text "1"; ids of' in measured(document, texts)[1]
    floats = truth()
    for entry in floats["annotations"]:
        entry["image_id"] = float(entry["image_id"])
    assert measured(floats, perfect(document))[0]["AP"] == ONE


# ---- boxes and protocols ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["xyxy", "cxcywh", "xywh-fractions", "xyxy-fractions", "cxcywh-fractions"])
def test_results_of_another_form_are_refused_and_can_be_read(measured, form):
    rng = np.random.default_rng(0)
    document = truth(counts=(20, 20, 20))
    size = rng.uniform(8, 30, (60, 2))
    corner = rng.uniform(0, 1, (60, 2)) * (np.array([96, 72]) - size)
    for annotation, box in zip(document["annotations"], np.concatenate([corner, size], 1).tolist(), strict=True):
        annotation.update(bbox=box, area=box[2] * box[3])
    first = corner + (size / 2 if form.startswith("cx") else 0)
    boxes = np.concatenate([first, corner + size if form.startswith("xyxy") else size], 1)
    boxes = boxes / np.array([96, 72, 96, 72]) if form.endswith("-fractions") else boxes
    results = [{**entry, "bbox": box} for entry, box in zip(perfect(document), boxes.tolist(), strict=True)]
    assert f"--box-form {form}" in measured(document, results)[1]
    assert measured(document, results, "--box-form", form)[0]["AP"] == ONE
    assert measured(document, results, "--box-form", "xywh")[0]["AP"] < 0.5  # as it was wished
    assert measured(document, perfect(document)) == ({**measured(document, perfect(document))[0]}, "")
    for annotation, box in zip(document["annotations"], boxes.tolist(), strict=True):
        annotation["bbox"] = box
    assert f"data merge FILE --box-form {form}" in measured(document, [])[1]


@pytest.mark.parametrize("form", ["xywh-percent", "xyxy-percent"])
def test_percent_and_boxes_of_pictures_of_another_size_are_asked_about(measured, form):
    rng = np.random.default_rng(0)
    document = truth(counts=(10, 10, 10))
    size = rng.uniform(30, 200, (30, 2))
    corner = rng.uniform(0, 1, (30, 2)) * (np.array([640, 480]) - size)
    for image, own in zip(document["images"], document["annotations"], strict=True):
        image.update(width=640, height=480)
        (x, y), (w, h) = corner[own["id"] - 1].tolist(), size[own["id"] - 1].tolist()
        own.update(bbox=[x, y, w, h], area=w * h)

    def changed(change) -> list[dict[str, Any]]:
        return [{**entry, "bbox": change(*entry["bbox"])} for entry in perfect(document)]

    def percent(x: float, y: float, w: float, h: float) -> list[float]:
        last = (x + w, y + h) if form.startswith("xyxy") else (w, h)
        return [x / 6.4, y / 4.8, last[0] / 6.4, last[1] / 4.8]

    results = changed(percent)
    assert "lie in the upper left 100 x 100 pixels: are they [x" in measured(document, results)[1]
    assert measured(document, results, "--box-form", form)[0]["AP"] == ONE
    larger = changed(lambda *box: [2.5 * value for value in box])
    assert "are they of pictures of another size" in measured(document, larger)[1]
    some = [few if row % 3 == 0 else own for row, (few, own) in enumerate(zip(changed(
        lambda x, y, w, h: [x / 640, y / 480, w / 640, h / 480]), perfect(document), strict=True))]  # fmt: skip
    assert "10 of 30 boxes are smaller than 1 pixel: are they fractions" in measured(document, some)[1]
    assert measured(document, perfect(document))[1] == ""


def test_negative_lists_that_are_all_empty_warn(measured):
    document = truth()
    results = perfect(document) + [{**e, "category_id": e["category_id"] % 3 + 1} for e in perfect(document)]
    plain, said = measured(document, results, protocol="lvis")
    assert plain["AP"] < 0.9 and said == ""
    for image in document["images"]:
        image["neg_category_ids"] = []
    metrics, said = measured(document, results, protocol="lvis")
    assert metrics["AP"] == ONE and "no image lists a negative class" in said
    document["images"][0]["neg_category_ids"] = [3]
    assert measured(document, results, protocol="lvis")[1] == ""


def test_broken_masks_and_sizes_do_not_matter_to_boxes(measured):
    document = truth()
    for annotation in document["annotations"]:
        annotation["segmentation"] = [["x"]]
        del annotation["area"]
    document["images"][0]["width"] = "wide"
    metrics, said = measured(document, perfect(document))
    assert metrics["AP"] == ONE and "5 annotations have no area and a segmentation that cannot be read" in said


def test_long_class_names_stay_whole(tailfin, tmp_path):
    document = truth()
    names = [c["name"] + "_with_a_name_of_many_words_and_no_space" * 2 for c in document["categories"]]
    for category, name in zip(document["categories"], names, strict=True):
        category["name"] = name
    (tmp_path / "val.json").write_text(json.dumps(document))
    (tmp_path / "r.json").write_text(json.dumps(perfect(document)))
    shown = tailfin(
        "evaluate", "--results", tmp_path / "r.json", "--annotations", tmp_path / "val.json", "--per-category",
        "--protocol", "coco", "--train", tmp_path / "val.json",
    ).out  # fmt: skip
    column = [line.split("│")[1].strip() for line in shown.splitlines() if line.count("│") > 5]
    assert set(names) <= set(column) and "rare " in shown


# ---- weights ---------------------------------------------------------------------------------------------------------


def rows(names: list[str], columns: int, per_class: int = 1) -> torch.Tensor:
    """Rows that bear the number of their class's name (`c7`), then -1, -2, ... for what lies behind the classes."""
    values = [float(name[1:]) for name in names for _ in range(per_class)] + [-1.0 - k for k in range(columns)]
    return torch.tensor(values)[:, None].expand(-1, 4).clone()


OLD, NEW = ["c0", "c1", "c2", "c3"], ["c3", "c9", "c1"]


@pytest.mark.parametrize("behind", [0, 1, 2])
def test_classifier_rows_go_to_the_class_of_the_same_name(behind):
    key = "roi_heads.predictor.cls_score.weight"
    own = {key: torch.full((3 + behind, 4), 100.0)}
    joined, lines = join_class_rows(own, {key: rows(OLD, behind)}, OLD, NEW)
    assert joined[key][:, 0].tolist() == [3, 100, 1, *(-1.0 - k for k in range(behind))]
    assert '2 kept, 1 new ("c9"), 2 of the file left out ("c0", "c2")' in lines[0]
    assert (own[key] == 100).all()


def test_boxes_per_class_follow_and_boxes_of_all_classes_stay():
    key, score = "roi_heads.predictor.bbox_pred.weight", "roi_heads.predictor.cls_score.weight"
    own = {key: torch.full((12, 4), 100.0), score: torch.zeros(4, 4)}
    joined, _ = join_class_rows(own, {key: rows(OLD, 0, 4), score: rows(OLD, 1)}, OLD, NEW)
    assert joined[key][:, 0].tolist() == [3] * 4 + [100] * 4 + [1] * 4
    agnostic = {key: torch.arange(16.0).view(4, 4), score: rows(OLD, 1)}
    joined, _ = join_class_rows({**own, key: torch.zeros(4, 4)}, agnostic, OLD, NEW)
    assert joined[key] is agnostic[key]


def test_other_layouts_and_statistics_start_anew():
    weights = {
        "roi_heads.predictor.cls_score.weight": rows(OLD, 4),  # groups with others of their own
        "roi_heads.loss.pos_grad": torch.ones(4),
        "backbone.conv.weight": torch.ones(4, 4),
    }
    own = {key: torch.zeros_like(value) for key, value in weights.items()}
    joined, lines = join_class_rows(own, weights, OLD, ["c3", "c2", "c1", "c0"])
    assert list(joined) == ["backbone.conv.weight"]
    assert "0 kept, 4 new, 4 of the file left out" in lines[0] and "start anew: 2" in lines[1]


def test_training_from_a_model_of_the_same_classes_in_another_order(tailfin, trained, tiny_set, tiny_recipe, tmp_path):
    turned = {3: 9, 5: 5, 9: 3}
    files = []
    for path in tiny_set:
        document = json.loads(path.read_text())
        for category in document["categories"]:
            category["id"] = turned[category["id"]]
        for annotation in document["annotations"]:
            annotation["category_id"] = turned[annotation["category_id"]]
        files.append(tmp_path / f"{path.stem}.json")
        files[-1].write_text(json.dumps(document))
    pictures = ("--train-images", tiny_set[0].with_suffix(""), "--val-images", tiny_set[1].with_suffix(""))
    outcome = tailfin(
        "train", tiny_recipe, "--train", files[0], "--val", files[1], *pictures, "--out", tmp_path / "run", "--weights",
        trained / "model.safetensors", "schedule.epochs=0.2", "schedule.lr=1e-12",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert "classes joined by name: 3 kept, 0 new, 0 of the file left out" in outcome.err
    before, after = (library.load(path, "cpu").model.state_dict() for path in (trained, tmp_path / "run"))
    key = "roi_heads.predictor.cls_score.weight"
    order = [2, 1, 0, *range(3, len(before[key]))]
    assert torch.allclose(after[key], before[key][order], atol=1e-6) and not torch.allclose(after[key], before[key])


# ---- predict ---------------------------------------------------------------------------------------------------------


def test_one_bad_picture_does_not_lose_the_others(tailfin, trained, tiny_set, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = Image.open(tiny_set[1].with_suffix("") / "0.png").convert("RGB")
    for name in ("a.jpg", "b.avif", "c.jfif", "d.jpg"):
        source.save(folder / name, "AVIF" if name.endswith("avif") else "JPEG")
    (folder / "._a.jpg").write_bytes(b"\0\5\x16\7")
    (folder / "broken.jpg").write_bytes((folder / "a.jpg").read_bytes()[:200])
    out = tmp_path / "p.json"
    outcome = tailfin("predict", trained, folder, "--out", out, "--score", 0)
    assert outcome.code == 0 and "in 4 pictures" in outcome.out
    assert "1 files skipped" in outcome.err and "broken.jpg" in outcome.err
    names = {Path(entry["file_name"]).name for entry in json.loads(out.read_text())}
    assert names <= {"a.jpg", "b.avif", "c.jfif", "d.jpg"} and len(names) > 1
    again = tailfin("predict", trained, folder, "--out", out)
    assert "p.json exists (--overwrite replaces it)" in again.error
    before = out.read_bytes()
    strict = tailfin("predict", trained, folder, "--out", out, "--overwrite", "--no-skip-bad")
    assert "broken.jpg" in strict.error and out.read_bytes() == before
    other = tmp_path / "q"
    assert "none of the 1 files" in tailfin("predict", trained, folder / "broken.jpg", "--out", other).error
    assert not other.exists() and not list(tmp_path.glob("*.part"))


def test_a_named_file_of_any_ending_is_read(tailfin, trained, tiny_set, tmp_path):
    file = tmp_path / "upload.bin"
    file.write_bytes((tiny_set[1].with_suffix("") / "0.png").read_bytes())
    assert "in 1 pictures" in tailfin("predict", trained, file, "--out", tmp_path / "p.json").out
    file.write_bytes(b"nothing")
    assert "by its content" in tailfin("predict", trained, file, "--out", tmp_path / "q.json").error


def test_pictures_of_kinds_that_are_not_read_and_lost_links_are_told_of(tailfin, trained, tiny_set, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    (folder / "a.png").write_bytes(sorted(tiny_set[1].with_suffix("").iterdir())[0].read_bytes())
    for name in ("b.heic", "c.NEF", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder / "d.jpg").symlink_to(folder / "gone.jpg")
    outcome = tailfin("predict", trained, folder, "--out", tmp_path / "p.json")
    assert (
        outcome.code == 0 and "2 files are of kinds that are not read here and left out (first: b.heic" in outcome.err
    )
    assert "1 files skipped" in outcome.out + outcome.err and "d.jpg does not exist" in outcome.out + outcome.err
    (folder / "a.png").unlink()
    (folder / "d.jpg").unlink()
    assert "there is no picture or video in this folder: 2 files are" in tailfin("predict", trained, folder).error
