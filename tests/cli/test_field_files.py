"""Annotation files and data set folders as other programs write them: each kind once broke, or passed with wrong
numbers."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def coco(folder: Path, **changes: Any) -> dict[str, Any]:
    """Six pictures with one object each, of the classes car and bus in turn; the pictures lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for k in range(6):
        name = f"img_{k}.jpg"
        Image.new("RGB", (96, 72), (40 * k, 90, 30)).save(folder / name)
        images.append({"id": k + 1, "file_name": name, "width": 96, "height": 72})
        box = {"bbox": [8 + 4 * k, 6 + 3 * k, 24, 20], "area": 480, "iscrowd": 0}
        annotations.append({"id": k + 1, "image_id": k + 1, "category_id": 1 + k % 2, **box})
    categories = [{"id": 1, "name": "car"}, {"id": 2, "name": "bus"}]
    return {"images": images, "annotations": annotations, "categories": categories, **changes}


def write(path: Path, document: Any, encoding: str = "utf-8") -> Path:
    path.write_bytes(json.dumps(document, ensure_ascii=False).encode(encoding))
    return path


def notes(outcome: Any) -> list[str]:
    assert outcome.code == 0, outcome.err
    return [line.removeprefix("  note: ") for line in outcome.out.splitlines() if line.startswith("  note: ")]


# ---- encodings -------------------------------------------------------------------------------------------------------


def test_packed_json_is_told_apart_from_an_encoding(tailfin, tmp_path):
    file = tmp_path / "train.json.gz"
    file.write_bytes(gzip.compress(b"{}"))
    assert "is packed (gzip): unpack it first" in tailfin("data", "check", file).err
    assert "is packed (gzip)" in tailfin("evaluate", "--results", file, "--annotations", file).error


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_json_in_any_unicode_encoding_is_read(tailfin, tmp_path, encoding):
    document = coco(tmp_path / "train", categories=[{"id": 1, "name": "Straße"}, {"id": 2, "name": "轿车"}])
    file = write(tmp_path / "train.json", document, encoding)
    assert "6 annotations" in tailfin("data", "check", file).out
    assert "轿车" in tailfin("data", "stats", file).out
    results = [{k: a[k] for k in ("image_id", "category_id", "bbox")} | {"score": 0.5} for a in document["annotations"]]
    found = write(tmp_path / "results.json", results, encoding)
    command = (
        "evaluate",
        "--results",
        found,
        "--annotations",
        file,
        "--protocol",
        "coco",
        "--json",
        tmp_path / "m.json",
    )
    assert tailfin(*command).code == 0
    assert json.loads((tmp_path / "m.json").read_text())["bbox"]["AP"] == pytest.approx(1)


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252"])
def test_json_in_a_legacy_encoding_is_one_message(tailfin, tmp_path, encoding):
    document = coco(tmp_path / "train", categories=[{"id": 1, "name": "Straße"}, {"id": 2, "name": "Ünal"}])
    file = write(tmp_path / "train.json", document, encoding)
    found = write(tmp_path / "results.json", [])
    for command in (
        ("data", "stats", file),
        ("data", "merge", file, "--out", tmp_path / "new.json"),
        ("evaluate", "--results", found, "--annotations", file),
    ):
        error = tailfin(*command).error
        assert "train.json is not UTF-8 text: byte " in error and "save it as UTF-8" in error
    checked = tailfin("data", "check", file)
    assert checked.code == 2 and "is not UTF-8 text" in checked.err


def test_gbk_label_files_and_class_lists_are_one_message(tailfin, tmp_path):
    yolo(tmp_path / "set", {"train": {"0.jpg": "0 .5 .5 .2 .2\n"}})
    (tmp_path / "set/data.yaml").write_bytes("train: images/train\nnames: [轿车]\n".encode("gbk"))
    assert "data.yaml is not UTF-8 text" in tailfin("data", "convert", tmp_path / "set", tmp_path / "out").error


@pytest.mark.parametrize("encoding", ["gbk", "shift_jis", "euc-kr", "utf-16", "iso-8859-1"])
def test_xml_may_declare_any_encoding(tailfin, tmp_path, encoding):
    name = {"gbk": "轿车", "shift_jis": "くるま", "euc-kr": "자동차", "utf-16": "くるま", "iso-8859-1": "Bär"}[encoding]
    folder = voc(tmp_path / "set", {"a": [(name, (5, 5, 20, 20))]}, ["a.jpg"])
    text = (folder / "Annotations/a.xml").read_text("utf-8")
    (folder / "Annotations/a.xml").write_bytes(f'<?xml version="1.0" encoding="{encoding}"?>{text}'.encode(encoding))
    assert tailfin("data", "convert", folder, tmp_path / "out").code == 0
    assert json.loads((tmp_path / "out/train.json").read_text())["categories"][0]["name"] == name


def test_xml_of_another_encoding_than_it_says_is_one_message(tailfin, tmp_path):
    folder = voc(tmp_path / "set", {"a": [("轿车", (5, 5, 20, 20))]}, ["a.jpg"])
    file = folder / "Annotations/a.xml"
    text = file.read_text("utf-8")
    for head, codec, said in (
        ("", "gbk", "is not UTF-8 text"),
        ('<?xml version="1.0" encoding="ascii"?>', "gbk", "declares the encoding ascii"),
        ('<?xml version="1.0" encoding="klingon"?>', "utf-8", 'declares the encoding "klingon", which is not known'),
        ('<?xml version="1.0" encoding="rot13"?>', "utf-8", 'declares the encoding "rot13", which is not known'),
    ):
        file.write_bytes(f"{head}{text}".encode(codec))
        assert said in tailfin("data", "convert", folder, tmp_path / "out").error


# ---- ids, categories, boxes ------------------------------------------------------------------------------------------


def test_ids_written_as_floats_are_whole_numbers(tailfin, tmp_path):
    document = coco(tmp_path / "train")
    for entry in document["annotations"]:
        entry.update({key: float(entry[key]) for key in ("id", "image_id", "category_id")})
    for entry in document["images"] + document["categories"]:
        entry["id"] = float(entry["id"])
    document["images"][0]["neg_category_ids"] = [2.0]
    file = write(tmp_path / "train.json", document)
    assert "6 annotations" in tailfin("data", "check", file).out
    assert tailfin("data", "merge", file, "--out", tmp_path / "new.json").code == 0
    merged = json.loads((tmp_path / "new.json").read_text())
    assert {type(a["image_id"]) for a in merged["annotations"]} == {int}
    assert merged["images"][0]["neg_category_ids"] == [2]


def test_ids_beyond_64_bits_are_named_so(tailfin, tmp_path):
    document = coco(tmp_path / "train")
    document["annotations"][0]["id"] = 2**100
    checked = tailfin("data", "check", write(tmp_path / "train.json", document))
    assert checked.code == 2 and "which does not fit 64 bits" in checked.err


@pytest.mark.parametrize("root", [0, 7])
def test_an_unannotated_root_of_the_same_name_is_left_out(tailfin, tmp_path, root):
    document = coco(tmp_path / "train")
    document["categories"] += [{"id": root, "name": "car", "supercategory": "none"}]
    document["categories"][0]["supercategory"] = "car"
    file = write(tmp_path / "train.json", document)
    said = notes(tailfin("data", "check", file))
    assert f'category {root} has the name of category 1, "car", and no annotation: left out' in said
    out = tmp_path / "new.json"
    assert tailfin("data", "merge", file, "--rename", "car=auto", "--out", out).code == 0
    assert [(c["id"], c["name"]) for c in json.loads(out.read_text())["categories"]] == [(1, "auto"), (2, "bus")]


def test_two_annotated_categories_of_one_name_are_joined_by_merge_alone(tailfin, tmp_path):
    document = coco(tmp_path / "train")
    document["categories"][1]["name"] = "car"
    file = write(tmp_path / "train.json", document)
    checked = tailfin("data", "check", file)
    assert checked.code == 2 and "data merge FILE --out NEW" in checked.err
    out = tmp_path / "new.json"
    assert "1 classes" in tailfin("data", "merge", file, "--out", out).out
    assert {a["category_id"] for a in json.loads(out.read_text())["annotations"]} == {1}


def test_a_root_of_another_name_is_told_of(tailfin, tmp_path):
    document = coco(tmp_path / "train")
    document["categories"] = [{**c, "supercategory": "vehicles"} for c in document["categories"]]
    document["categories"].insert(0, {"id": 0, "name": "vehicles", "supercategory": "none"})
    said = notes(tailfin("data", "check", write(tmp_path / "train.json", document)))
    assert any("supercategory of other classes" in note and '--rename "vehicles="' in note for note in said)


def scattered(count: int = 60, seed: int = 0) -> np.ndarray:
    """[x, y, w, h] inside of 96 x 72."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(8, 30, (count, 2))
    corner = rng.uniform(0, 1, (count, 2)) * (np.array([96, 72]) - size)
    return np.concatenate([corner, size], 1)


def in_form(boxes: np.ndarray, form: str) -> np.ndarray:
    first, second = boxes[:, :2], boxes[:, 2:]
    if form in ("xyxy", "xyxy-fractions", "yxyx"):
        second = first + second
    elif form.startswith("cxcywh"):
        first = first + second / 2
    boxes = np.concatenate([first, second], 1)
    if form == "yxyx":
        boxes = boxes[:, [1, 0, 3, 2]]
    return boxes / np.array([96, 72, 96, 72]) if form.endswith("-fractions") else boxes


FORMS = ["xyxy", "yxyx", "cxcywh", "xywh-fractions", "xyxy-fractions", "cxcywh-fractions"]


def with_boxes(document: dict[str, Any], boxes: np.ndarray) -> dict[str, Any]:
    entries = [
        {"id": k + 1, "image_id": 1 + k % 6, "category_id": 1 + k % 2, "bbox": box}
        for k, box in enumerate(boxes.round(4).tolist())
    ]
    return {**document, "annotations": entries}


@pytest.mark.parametrize("form", FORMS)
def test_boxes_of_another_form_are_refused_and_rewritten(tailfin, tmp_path, form):
    document = coco(tmp_path / "train")
    file = write(tmp_path / "train.json", with_boxes(document, in_form(scattered(), form)))
    checked = tailfin("data", "check", file)
    assert checked.code == 2 and f"--box-form {form} --out NEW" in checked.err
    assert f"--box-form {form}" in tailfin("data", "stats", file).error
    out = tmp_path / "new.json"
    assert tailfin("data", "merge", file, "--box-form", form, "--out", out).code == 0
    written = np.array([a["bbox"] for a in json.loads(out.read_text())["annotations"]])
    assert np.abs(written - scattered()).max() < 0.02
    assert tailfin("data", "check", out).code == 0
    right = write(tmp_path / "right.json", with_boxes(document, scattered()))
    assert not [n for n in notes(tailfin("data", "check", right, "--images", tmp_path / "train")) if "are they" in n]


def test_odd_boxes_that_are_said_to_be_right_pass(tailfin, tmp_path):
    file = write(tmp_path / "train.json", with_boxes(coco(tmp_path / "train"), scattered() / 100))
    assert tailfin("data", "check", file).code == 2
    assert tailfin("data", "merge", file, "--box-form", "xywh", "--out", tmp_path / "new.json").code == 0
    assert tailfin("data", "check", tmp_path / "new.json").code == 0
    assert 'no box form "xyyx"' in tailfin("data", "merge", file, "--box-form", "xyyx", "--out", tmp_path / "b").error


def test_boxes_over_the_border_are_no_other_form(tailfin, tmp_path):
    boxes = scattered()
    boxes[:20, 2:] += 30  # a sloppy file, whose boxes do not lie inside in any other form
    said = notes(tailfin("data", "check", write(tmp_path / "train.json", with_boxes(coco(tmp_path / "train"), boxes))))
    assert any("over the border" in note for note in said) and not any("are they" in note for note in said)


def test_a_polygon_of_four_numbers_is_an_error(tailfin, tmp_path):
    document = coco(tmp_path / "train")
    for entry in document["annotations"]:
        x, y, w, h = entry["bbox"]
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    right = write(tmp_path / "right.json", document)
    document["annotations"][3]["segmentation"] = [[20, 15, 44, 35]]
    file = write(tmp_path / "train.json", document)
    checked = tailfin("data", "check", file)
    assert checked.code == 2 and "annotation 4: segmentation: a polygon has 4 numbers" in checked.err
    results = write(tmp_path / "r.json", [{**a, "score": 0.5} for a in document["annotations"]])
    command = ("evaluate", "--results", results, "--protocol", "coco", "--annotations")
    empty = write(tmp_path / "empty.json", [])
    said = tailfin("evaluate", "--results", empty, "--annotations", file, "--protocol", "coco", "--iou", "segm").error
    assert "annotation 4: segmentation is" in said
    assert "entry 3: segmentation is" in tailfin(*command, right, "--iou", "segm").error
    assert tailfin(*command, file).code == 0  # boxes need no masks


def test_crowds_and_empty_negative_lists_are_told_of(tailfin, tmp_path):
    document = coco(tmp_path / "train")
    for entry in document["annotations"]:
        entry["iscrowd"] = 1
    for image in document["images"]:
        image["neg_category_ids"] = []
    file = write(tmp_path / "train.json", document)
    said = notes(tailfin("data", "check", file))
    assert any("all 6 annotations are crowd regions" in note for note in said)
    assert any("no image lists a negative class" in note for note in said)
    assert "all 6 annotations are crowd regions" in tailfin("data", "stats", file).out


def test_a_folder_in_place_of_a_file_is_looked_into(tailfin, tmp_path):
    write(tmp_path / "train.json", coco(tmp_path / "train"))
    assert "train: usable" in tailfin("data", "check", tmp_path).out
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in tailfin("data", "check", empty).error


# ---- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["images\\{}", "images%2F{}", ".\\images\\{}", "images/{}"])
def test_backslashes_and_url_escapes_in_names(tailfin, tmp_path, written):
    document = coco(tmp_path / "images")
    for image in document["images"]:
        image["file_name"] = written.format(image["file_name"])
    file = write(tmp_path / "result.json", document)
    assert tailfin("data", "check", file).code == 0
    assert tailfin("data", "convert", file, tmp_path / "out", "--to", "yolo").code == 0
    assert len(list((tmp_path / "out").rglob("img_*.jpg"))) == 6
    assert not [path for path in (tmp_path / "out").rglob("*") if "\\" in path.name or "%" in path.name]


def test_escaped_names_do_not_leave_the_folder(tailfin, tmp_path):
    document = coco(tmp_path / "in/images")
    Image.new("RGB", (96, 72)).save(tmp_path / "secret.jpg")
    document["images"][0]["file_name"] = "%2E%2E/secret.jpg"
    assert "does not exist" in tailfin("data", "check", write(tmp_path / "in/images.json", document)).err


@pytest.mark.parametrize(("largest", "smallest", "seen"), [(7900, 7200, "13-bit"), (3900, 200, "12-bit")])
def test_sixteen_bit_pictures_are_scaled_by_their_own_depth(tailfin, tmp_path, largest, smallest, seen):
    from tailfin.data.images import read_image

    document = coco(tmp_path / "train")
    for image in document["images"]:
        name = image["file_name"] = f"{image['id']}.png"
        values = np.linspace(smallest, largest, 96 * 72).reshape(72, 96).astype(np.uint16)
        Image.fromarray(values).save(tmp_path / "train" / name)
    said = notes(tailfin("data", "check", write(tmp_path / "train.json", document)))
    assert any(f"reach {largest:,} of 65,535" in note and f"read as {seen}" in note for note in said)
    top = 2 ** largest.bit_length() - 1
    pixels = read_image(tmp_path / "train" / "1.png")
    assert pixels.min() == round(255 * smallest / top) and pixels.max() == round(255 * largest / top) > 200
    assert any(f"data.value_range=[{smallest},{largest}]" in note for note in said)
    alike = read_image(tmp_path / "train" / "1.png", value_range=(smallest, largest))
    assert alike.min() == 0 and alike.max() == 255
    dark = read_image(tmp_path / "train" / "1.png", value_range=(0, 65535))
    assert dark.max() == round(255 * largest / 65535)


def test_a_range_of_values_reaches_training_and_prediction(tailfin, tmp_path):
    from tailfin.data.dataset import TrainingDataset, open_source
    from tailfin.pictures import to_tensor
    from tailfin.schema.data import Data

    document = coco(tmp_path / "train")
    for image in document["images"]:
        name = image["file_name"] = f"{image['id']}.png"
        Image.fromarray(np.full((72, 96), 1000, np.uint16)).save(tmp_path / "train" / name)
    path = write(tmp_path / "train.json", document)
    files = {"train": {"annotations": str(path)}, "resize": "square", "sizes": [96], "flip": 0}
    brightness = []
    for given in (None, (0, 2000), (0, 4000)):
        config = Data.model_validate({**files, "value_range": given})
        image, _ = TrainingDataset(open_source(config.train, "", "train"), config, 0).sample(0, 0, 0)
        brightness.append(int(image.max()))
        assert int(to_tensor(tmp_path / "train" / document["images"][0]["file_name"], config).max()) == brightness[-1]
    assert brightness == [round(255 * 1000 / 1023), 128, 64]
    outcome = tailfin("train", "demo/bacl", "--train", path, "data.value_range=[5,5]")
    assert outcome.code == 2 and "value_range must be (smaller, larger)" in outcome.error


def test_equal_pictures_stay_on_one_side_of_a_split(tailfin, tmp_path):
    document = coco(tmp_path / "all")
    images, annotations = document["images"], document["annotations"]
    for k in range(20):  # each picture again, by its name or as a copy of its bytes
        source = images[k % 6]
        name = source["file_name"] if k % 2 else f"copy_{k}.jpg"
        (tmp_path / "all" / name).write_bytes((tmp_path / "all" / source["file_name"]).read_bytes())
        images.append({**source, "id": 100 + k, "file_name": name})
        annotations.append({**annotations[k % 6], "id": 100 + k, "image_id": 100 + k})
    file = write(tmp_path / "all.json", document)
    for seed in range(4):
        train, val = tmp_path / "all" / f"t{seed}.json", tmp_path / "all" / f"v{seed}.json"
        outcome = tailfin("data", "split", file, "--val", 0.4, "--out-train", train, "--out-val", val, "--seed", seed)
        assert outcome.code == 0, outcome.err
        assert "20 pictures are there more than once" in outcome.out
        kinds = [
            {(tmp_path / "all" / i["file_name"]).read_bytes() for i in json.loads(path.read_text())["images"]}
            for path in (train, val)
        ]
        assert all(kinds) and not kinds[0] & kinds[1]


# ---- YOLO ------------------------------------------------------------------------------------------------------------


def yolo(folder: Path, splits: dict[str, dict[str, str]], names: str = "[car, bus]", **settings: str) -> Path:
    """images/SPLIT, labels/SPLIT and a data.yaml; the label text by picture name."""
    lines = [f"names: {names}", *(f"{key}: {value}" for key, value in settings.items())]
    for split, pictures in splits.items():
        lines.append(f"{split}: images/{split}")
        for k, (name, text) in enumerate(pictures.items()):
            picture = folder / "images" / split / name
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (64, 48), (30 * k, 60, 90)).save(picture)
            labels = folder / "labels" / split / Path(name).with_suffix(".txt").name
            labels.parent.mkdir(parents=True, exist_ok=True)
            labels.write_text(text)
    (folder / "data.yaml").write_text("\n".join(lines))
    return folder


ROW = "0 0.5 0.5 0.25 0.5\n"


def converted(tailfin: Any, source: Path, *options: object) -> tuple[dict[str, Any], str]:
    out = source.parent / "out"
    outcome = tailfin("data", "convert", source, out, "--overwrite", *options)
    assert outcome.code == 0, outcome.err
    return json.loads((out / "train.json").read_text()), outcome.out


def test_pictures_of_every_suffix_that_pillow_reads(tailfin, tmp_path):
    names = ["0.jpg", "1.avif", "2.jfif", "3.webp", "4.JPE", "5.tga", "6.ppm"]
    source = yolo(tmp_path / "set", {"train": dict.fromkeys(names, ROW)})
    document, _ = converted(tailfin, source)
    assert sorted(image["file_name"] for image in document["images"]) == names
    assert len(document["annotations"]) == 7


def test_labels_without_a_picture_are_counted_and_named(tailfin, tmp_path):
    source = yolo(tmp_path / "set", {"train": {"0.jpg": ROW, "1.jpg": ROW, "2.jpg": ROW}})
    (source / "images/train/1.jpg").rename(source / "images/train/1.raw")
    (source / "images/train/2.jpg").unlink()
    document, said = converted(tailfin, source)
    assert len(document["images"]) == 1
    assert "2 label files without a picture left out (1.txt: 1.raw is no picture that can be read here, 2.txt)" in said


def test_pictures_without_labels_and_labels_of_another_case_are_counted(tailfin, tmp_path):
    source = yolo(tmp_path / "set", {"train": dict.fromkeys(["a.jpg", "b.jpg", "c.jpg"], ROW)})
    (source / "labels/train/a.txt").rename(source / "labels/train/A.TXT")
    (source / "labels/train/b.txt").unlink()
    document, said = converted(tailfin, source)
    assert len(document["annotations"]) == 1 and "2 pictures without a label file kept" in said
    assert "1 label file without a picture left out (A.TXT)" in said


def test_pictures_on_both_sides_of_a_split_are_told_of(tailfin, tmp_path):
    source = yolo(tmp_path / "set", {"train": {"a.jpg": ROW, "b.jpg": ROW}}, val="images/train")
    assert "2 pictures are in train and in val" in converted(tailfin, source)[1]
    folder = voc(tmp_path / "voc", {"a": CAR, "b": CAR}, ["a.jpg", "b.jpg"])
    (folder / "ImageSets/Main").mkdir(parents=True)
    for split, names in (("train", "a\nb\n"), ("val", "b\n")):
        (folder / f"ImageSets/Main/{split}.txt").write_text(names)
    assert "1 picture is in train and in val" in converted(tailfin, folder)[1]


def test_splits_that_are_one_folder_are_told_of(tailfin, tmp_path):
    folder = yolo(tmp_path / "set", {"train": {"0.jpg": ROW, "1.jpg": ROW}})
    assert "no measure" not in tailfin("data", "check", folder).out
    text = (folder / "data.yaml").read_text()
    (folder / "data.yaml").write_text(f"{text}\nval: images/train\n")
    assert "note: 2 pictures are in train and in val: they are no measure" in tailfin("data", "check", folder).out


def test_files_of_macos_are_passed_over(tailfin, tmp_path):
    source = yolo(tmp_path / "set", {"train": {"0.jpg": ROW, "1.jpg": ROW}})
    for name in ("images/train/._0.jpg", "labels/train/._0.txt", "._data.yaml", "images/__MACOSX/._x.jpg"):
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_bytes(b"\x00\x05\x16\x07" + bytes(range(200)))
    document, said = converted(tailfin, source)
    assert len(document["images"]) == 2 and "left out" not in said
    folder = voc(tmp_path / "voc", {"a": [("car", (5, 5, 20, 20))]}, ["a.jpg"])
    for name in ("Annotations/._a.xml", "JPEGImages/._a.jpg"):
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    assert len(converted(tailfin, folder)[0]["images"]) == 1


def test_labels_beside_pictures_below_a_folder_called_images(tailfin, tmp_path):
    folder = tmp_path / "images/myset"
    (folder / "train").mkdir(parents=True)
    for k in range(3):
        Image.new("RGB", (64, 48)).save(folder / f"train/{k}.jpg")
        (folder / f"train/{k}.txt").write_text(ROW)
    (folder / "data.yaml").write_text("train: train\nnames: [car]\n")
    assert len(converted(tailfin, folder)[0]["annotations"]) == 3


@pytest.mark.parametrize("place", ["classes.txt", "labels/classes.txt"])
def test_a_folder_with_classes_txt_needs_no_yaml(tailfin, tmp_path, place):
    source = yolo(tmp_path / "ls", {"train": {f"{k}.jpg": ROW for k in range(3)}})
    (source / "data.yaml").unlink()
    (source / "notes.json").write_text('{"categories": [], "info": {"version": "1.0"}}')
    (source / place).write_text("lorry\nbus\n")
    for options in ((), ("--from", "yolo")):
        document, said = converted(tailfin, source, *options)
        assert [c["name"] for c in document["categories"]] == ["lorry", "bus"] and "no data.yaml" in said
        assert len(document["annotations"]) == 3
    (source / place).unlink()
    assert "has no data.yaml, nor a classes.txt" in tailfin("data", "convert", source, tmp_path / "o2").error


def test_absent_splits_are_left_out_and_said(tailfin, tmp_path):
    source = yolo(tmp_path / "set", {"train": {"0.jpg": ROW}}, val="images/val", test="../test/images")
    _, said = converted(tailfin, source)
    assert "images/val does not exist: left out" in said and "test/images does not exist: left out" in said
    yolo(tmp_path / "set2", {"val": {"0.jpg": ROW}}, train="images/train")
    assert "images/train does not exist" in tailfin("data", "convert", tmp_path / "set2", tmp_path / "o").error


def test_keypoint_rows_give_boxes(tailfin, tmp_path):
    row = "0 0.5 0.5 0.25 0.5 0.4 0.4 2 0.6 0.6 1\n"
    source = yolo(tmp_path / "set", {"train": {f"{k}.jpg": row for k in range(6)}}, kpt_shape="[2, 3]")
    document, said = converted(tailfin, source)
    assert [a["bbox"] for a in document["annotations"]] == [[24, 12, 16, 24]] * 6
    assert "segmentation" not in document["annotations"][0] and "keypoints of 6 objects left out" in said
    (source / "labels/train/0.txt").write_text(row.rsplit(" ", 2)[0] + "\n")
    assert "by kpt_shape an object has 11" in tailfin("data", "convert", source, tmp_path / "o").error


@pytest.mark.parametrize("tail", ["0.4 0.4 2 0.6 0.6 1", "0.45 0.4 0.5 0.6 0.55 0.45"])
def test_keypoint_rows_without_kpt_shape_are_refused(tailfin, tmp_path, tail):
    source = yolo(tmp_path / "set", {"train": {f"{k}.jpg": f"0 0.5 0.5 0.25 0.5 {tail}\n" for k in range(6)}})
    assert "look like a box and keypoints" in tailfin("data", "convert", source, tmp_path / "o").error


def test_a_box_with_its_polygon_behind_is_refused(tailfin, tmp_path):
    row = "0 0.5 0.5 0.25 0.5 0.375 0.3 0.6 0.25 0.625 0.75 0.4 0.7\n"
    source = yolo(tmp_path / "set", {"train": {"0.jpg": row}})
    error = tailfin("data", "convert", source, tmp_path / "o").error
    assert "rows hold a box and then the polygon that it is around (one has 13 numbers)" in error


@pytest.mark.parametrize("form", ["xyxy-fractions", "xywh-fractions", "xyxy", "cxcywh"])
def test_rows_with_boxes_of_another_form_are_refused_and_can_be_read(tailfin, tmp_path, form):
    right = [(32.0, 24.0, 16.0, 12.0), (4.0, 3.0, 24.0, 30.0), (40.0, 6.0, 20.0, 39.0)]  # x, y, width, height
    scale = (64, 48, 64, 48) if form.endswith("-fractions") else (1, 1, 1, 1)

    def row(x: float, y: float, w: float, h: float) -> str:
        numbers = {
            "xywh": (x, y, w, h),
            "xyxy": (x, y, x + w, y + h),
            "cxcywh": (x + w / 2, y + h / 2, w, h),
        }[form.partition("-")[0]]
        return f"0 {' '.join(f'{number / size:.6f}' for number, size in zip(numbers, scale, strict=True))}\n"

    text = "".join(row(*box) for box in right)
    source = yolo(tmp_path / "set", {"train": {f"{k}.jpg": text for k in range(3)}})
    error = tailfin("data", "convert", source, tmp_path / "o").error
    if form.endswith("-fractions"):
        assert "boxes pass the border of their picture, and read as" in error and f"--box-form {form} reads" in error
    else:
        assert "is outside 0 to 1 (coordinates are fractions" in error
    document, _ = converted(tailfin, source, "--box-form", form)
    boxes = [a["bbox"] for a in document["annotations"]]
    assert np.abs(np.array(boxes) - np.array(right * 3)).max() < 1e-3


def test_yolo_boxes_over_the_border_are_read(tailfin, tmp_path):
    rows = "0 0.05 0.5 0.2 0.5\n0 0.9 0.9 0.4 0.3\n0 0.5 0.5 0.2 0.2\n"  # of no other form either
    document, said = converted(tailfin, yolo(tmp_path / "set", {"train": {"0.jpg": rows}}))
    assert len(document["annotations"]) == 3 and "pass the border" not in said
    single = "0 0.5 0.5 0.9 0.95\n0 0.2 0.2 0.9 0.9\n"
    _, said = converted(tailfin, yolo(tmp_path / "set2", {"train": {"0.jpg": single}}))
    assert "1 of 2 boxes pass the border" in said and "are they? (--box-form xyxy-fractions)" in said


def test_oriented_boxes_give_upright_boxes_and_are_told_of(tailfin, tmp_path):
    row = "0 0.5 0.2 0.8 0.5 0.5 0.8 0.2 0.5\n"
    document, said = converted(tailfin, yolo(tmp_path / "set", {"train": {f"{k}.jpg": row for k in range(3)}}))
    assert document["annotations"][0]["bbox"] == pytest.approx([12.8, 9.6, 38.4, 28.8])
    assert "segmentation" not in document["annotations"][0] and "3 oriented boxes" in said
    outline = "0 0.2 0.2 0.8 0.25 0.7 0.8 0.3 0.6\n"  # an outline of four points is none
    document, said = converted(tailfin, yolo(tmp_path / "set2", {"train": {"0.jpg": outline}}))
    assert "segmentation" in document["annotations"][0] and "oriented boxes" not in said


def test_pictures_that_share_a_label_file_are_refused(tailfin, tmp_path):
    source = yolo(tmp_path / "set", {"train": {"a.jpg": ROW, "a.png": ROW, "b.jpg": ROW}})
    error = tailfin("data", "convert", source, tmp_path / "o").error
    assert "a.jpg and " in error and "share the label file" in error


# ---- VOC -------------------------------------------------------------------------------------------------------------


def voc(folder: Path, files: dict[str, list[tuple[str, tuple[int, ...]]]], pictures: list[str]) -> Path:
    """Annotations/NAME.xml with (class, box) each, and JPEGImages; "name|inner" gives another <filename>."""
    for k, name in enumerate(pictures):
        picture = folder / "JPEGImages" / name
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 48), (20 * k, 50, 70)).save(picture)
    for given, objects in files.items():
        name, _, inner = given.partition("|")
        xml = folder / "Annotations" / f"{name}.xml"
        xml.parent.mkdir(parents=True, exist_ok=True)
        body = "".join(
            f"<object><name>{label}</name><bndbox><xmin>{x}</xmin><ymin>{y}</ymin><xmax>{r}</xmax><ymax>{b}</ymax>"
            "</bndbox></object>"
            for label, (x, y, r, b) in objects
        )
        size = "<size><width>64</width><height>48</height></size>"
        xml.write_text(f"<annotation><filename>{inner}</filename>{size}{body}</annotation>", "utf-8")
    return folder


CAR = [("car", (5, 5, 20, 20))]


def owners(document: dict[str, Any]) -> list[str]:
    names = {image["id"]: image["file_name"] for image in document["images"]}
    return [names[a["image_id"]] for a in document["annotations"]]


def test_voc_pictures_without_xml_are_kept(tailfin, tmp_path):
    document, said = converted(tailfin, voc(tmp_path / "set", {"a": CAR}, ["a.jpg", "b.jpg", "c.jpg"]))
    assert len(document["images"]) == 3 and owners(document) == ["a.jpg"]
    assert "2 pictures without an XML file kept as pictures without objects" in said


def test_voc_objects_marked_difficult_are_told_of(tailfin, tmp_path):
    folder = voc(tmp_path / "set", {"a": CAR, "b": CAR}, ["a.jpg", "b.jpg"])
    xml = folder / "Annotations/a.xml"
    xml.write_text(xml.read_text().replace("<bndbox>", "<difficult>1</difficult><bndbox>"))
    document, said = converted(tailfin, folder)
    assert len(document["annotations"]) == 2 and "1 object is marked difficult" in said


def test_voc_sizes_that_are_not_the_picture_s_are_refused(tailfin, tmp_path):
    folder = voc(tmp_path / "set", {"a": CAR, "b": CAR}, ["a.jpg", "b.jpg"])
    Image.new("RGB", (48, 64)).save(folder / "JPEGImages/b.jpg")
    said = tailfin("data", "convert", folder, tmp_path / "out").error
    assert "b.xml" in said and "its size is 48 x 64" in said and "width and height are swapped" in said
    assert tailfin("data", "check", folder).error == said


def test_voc_lists_with_spaces_absent_splits_and_pictures_without_xml(tailfin, tmp_path):
    folder = voc(tmp_path / "set", {"my photo 1": CAR, "b": CAR}, ["my photo 1.jpg", "b.jpg", "c.jpg"])
    lists = folder / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("my photo 1\nb  1\nc -1\n")
    (lists / "test.txt").write_text("x\ny\n")
    document, said = converted(tailfin, folder)
    assert sorted(i["file_name"] for i in document["images"]) == ["b.jpg", "c.jpg", "my photo 1.jpg"]
    assert "test.txt, line 1" in said and "left out" in said
    (lists / "train.txt").write_text("b\nzz\n")
    assert "train.txt, line 2" in tailfin("data", "convert", folder, tmp_path / "o").error


def test_voc_files_in_no_list_are_told_of(tailfin, tmp_path):
    folder = voc(tmp_path / "set", {"a": CAR, "b": CAR, "c": CAR}, ["a.jpg", "b.jpg", "c.jpg"])
    lists = folder / "ImageSets/Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\n")
    document, said = converted(tailfin, folder)
    assert (
        len(document["images"]) == 1 and "2 XML files are in no list of ImageSets/Main (first: b.xml): left out" in said
    )
    (lists / "val.txt").write_text("b\nc\n")
    assert "in no list" not in tailfin("data", "convert", folder, tmp_path / "both").err


def test_voc_pictures_are_found_in_subfolders_and_never_guessed(tailfin, tmp_path):
    pictures = ["000001.jpg", "vid1/000001.jpg", "vid2/000001.jpg"]
    folder = voc(tmp_path / "set", {"vid1/000001": CAR, "vid2/000001": CAR}, pictures)
    assert owners(converted(tailfin, folder)[0]) == pictures[1:]
    (folder / "JPEGImages/vid2/000001.jpg").unlink()
    error = tailfin("data", "convert", folder, tmp_path / "o").error  # not the top folder's
    assert "vid2/000001.xml: its picture may be 000001.jpg or vid1/000001.jpg" in error
    (folder / "JPEGImages/vid1/000001.jpg").unlink()
    assert "both mean the picture" in tailfin("data", "convert", folder, tmp_path / "o").error
    named = {f"{name}|000001.jpg": CAR for name in ("vid1/000001", "vid2/000001")}
    inner = voc(tmp_path / "inner", named, ["000001.jpg", "vid1/000001.jpg"])  # as each file says, vid2's too
    assert "vid2/000001.xml: its picture may be" in tailfin("data", "convert", inner, tmp_path / "o").error
    flat = voc(tmp_path / "flat", {"a|x/a.jpg": CAR, "b": CAR}, ["x/a.jpg", "y/a.jpg", "z/b.jpg"])
    assert owners(converted(tailfin, flat)[0]) == ["x/a.jpg", "z/b.jpg"]


def test_of_two_suffixes_the_file_name_inside_decides(tailfin, tmp_path):
    folder = voc(tmp_path / "set", {"a|a.png": CAR}, ["a.jpg", "a.png"])
    assert owners(converted(tailfin, folder)[0]) == ["a.png"]
    folder = voc(tmp_path / "set2", {"a": CAR}, ["a.jpg", "a.png"])
    assert "its picture may be a.jpg or a.png" in tailfin("data", "convert", folder, tmp_path / "o").error
    folder = voc(tmp_path / "set3", {"1|b.jpg": CAR, "2|b.jpg": CAR}, ["b.jpg"])
    assert "both mean the picture" in tailfin("data", "convert", folder, tmp_path / "o").error


def test_another_pictures_name_in_an_xml_file_is_told_of(tailfin, tmp_path):
    folder = voc(tmp_path / "set", {"a|b.jpg": CAR, "c|old_name.jpg": CAR}, ["a.jpg", "b.jpg", "c.jpg"])
    document, said = converted(tailfin, folder)
    assert owners(document) == ["a.jpg", "c.jpg"]
    assert "1 XML file gives the name of another picture, their own names count (first: a.xml says b.jpg)" in said


def test_fractions_in_xml_files_are_refused(tailfin, tmp_path):
    boxes = [("car", (0.2, 0.1, 0.5, 0.6)), ("car", (0.1, 0.1, 1.0, 0.9))]  # type: ignore[list-item]
    folder = voc(tmp_path / "set", {"a": boxes}, ["a.jpg"])
    assert "all 2 boxes are smaller than 1 pixel" in tailfin("data", "convert", folder, tmp_path / "o").error


# ---- classes ---------------------------------------------------------------------------------------------------------


def test_a_validation_file_gets_the_classes_that_it_lacks(tailfin, tiny_recipe, tmp_path):
    train = write(tmp_path / "train.json", coco(tmp_path / "train"))
    val = coco(tmp_path / "val", categories=[{"id": 1, "name": "bus"}])
    val["annotations"] = [{**a, "category_id": 1} for a in val["annotations"]]
    val_file = write(tmp_path / "val.json", val)
    error = tailfin("train", tiny_recipe, "--train", train, "--val", val_file, "--out", tmp_path / "run").error
    assert '"car" is not in the file' in error and "--classes-of" in error
    out = tmp_path / "val" / "new.json"
    outcome = tailfin("data", "merge", val_file, "--classes-of", train, "--out", out)
    assert outcome.code == 0 and "car" in outcome.out
    written = json.loads(out.read_text())
    assert [(c["id"], c["name"]) for c in written["categories"]] == [(1, "car"), (2, "bus")]
    assert {a["category_id"] for a in written["annotations"]} == {2}
    outcome = tailfin("data", "merge", train, "--classes-of", val_file, "--out", tmp_path / "x.json")
    assert 'it lacks the class "car"' in outcome.error


def test_a_zip_of_macos_unpacks_to_a_usable_set(tailfin, tmp_path):
    source = yolo(tmp_path / "set", {"train": {"0.jpg": ROW}})
    archive = tmp_path / "set.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in source.rglob("*"):
            if path.is_file():
                file.write(path, path.relative_to(source))
                file.writestr(f"__MACOSX/{path.relative_to(source).with_name('._' + path.name)}", b"\0\5\x16\7")
    with zipfile.ZipFile(archive) as file:
        file.extractall(tmp_path / "unpacked")
    assert len(converted(tailfin, tmp_path / "unpacked")[0]["images"]) == 1


def test_training_on_crowds_is_refused_or_warned_of(tailfin, tiny_recipe, tiny_set, edited, tmp_path):
    def crowded(share: float) -> Path:
        def change(document: dict[str, Any]) -> None:
            for entry in document["annotations"][: int(share * len(document["annotations"]))]:
                entry["iscrowd"] = 1

        return edited(tiny_set[0], change)

    options = ("--train-images", tiny_set[0].with_suffix(""), "--val", tiny_set[1], "schedule.epochs=0.2")
    outcome = tailfin("train", tiny_recipe, "--train", crowded(1), "--out", tmp_path / "a", *options)
    assert "annotations are crowd regions" in outcome.error and "nothing to train on" in outcome.error
    outcome = tailfin("train", tiny_recipe, "--train", crowded(0.7), "--out", tmp_path / "b", *options)
    assert outcome.code == 0 and "annotations are crowd regions" in outcome.err
