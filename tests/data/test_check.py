"""Broken files: each gives one message that names file, id and nearest choice, from index and `data check` alike."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from tailfin.cli.data import app
from tailfin.data.check import check_file
from tailfin.data.index import open_index
from tailfin.errors import UserError

GOOD: dict[str, Any] = {
    "images": [
        {"id": 1, "width": 40, "height": 30, "file_name": "one.png"},
        {"id": 2, "width": 40, "height": 30, "file_name": "two.png"},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 8, "name": "dog"}],
    "annotations": [
        {"id": 11, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0},
        {"id": 12, "image_id": 2, "category_id": 8, "bbox": [1, 2, 10, 10], "area": 100, "iscrowd": 0},
    ],
}


def put(*path: Any) -> Callable[[dict[str, Any]], str]:
    """A change of the good document: put("annotations", 1, "bbox", None) sets that value."""

    def change(document: dict[str, Any]) -> str:
        *way, key, value = path
        place: Any = document
        for step in way:
            place = place[step]
        place[key] = value
        return json.dumps(document)

    return change


def drop(*path: Any) -> Callable[[dict[str, Any]], str]:
    def change(document: dict[str, Any]) -> str:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        del place[path[-1]]
        return json.dumps(document)

    return change


def text(value: str | Callable[[str], str]) -> Callable[[dict[str, Any]], str]:
    return lambda document: value if isinstance(value, str) else value(json.dumps(document))


def again(key: str, row: int, **changes: Any) -> Callable[[dict[str, Any]], str]:
    return lambda document: json.dumps({**document, key: [*document[key], {**document[key][row], **changes}]})


RESULTS = [{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}]

# what is wrong, and what the one message must say besides the file's name
BROKEN: dict[str, tuple[Callable[[dict[str, Any]], str], list[str]]] = {
    "empty file": (text(""), ["is empty"]),
    "only spaces": (text(" \n "), ["is empty"]),
    "not JSON": (text('{"images": [1,\n oops]}'), ["not valid JSON", "line 2, column 2", "oops"]),
    "cut off": (text(lambda good: good[: len(good) // 2]), ["not valid JSON", "ends too early"]),
    "trailing text": (text(lambda good: good + "}"), ["not valid JSON", "}"]),
    "a results file": (text(json.dumps(RESULTS)), ["holds a list", "results file"]),
    "a list": (text("[1, 2]"), ["holds a list"]),
    "a number": (text("3"), ["holds a number"]),
    "null": (text("null"), ["holds null"]),
    "no images key": (drop("images"), ['no "images"']),
    "misspelt key": (
        lambda d: json.dumps({**{k: v for k, v in d.items() if k != "annotations"}, "anotations": []}),
        ['no "annotations"', 'did you mean "anotations"'],
    ),
    "images is an object": (put("images", {}), ['"images" is an object']),
    "no images": (put("images", []), ['"images" is empty']),
    "no categories key": (drop("categories"), ['no "categories"']),
    "no categories": (put("categories", []), ['"categories" is empty']),
    "duplicate image id": (again("images", 0, file_name="two.png"), ["image id 1 is given twice"]),
    "duplicate category id": (again("categories", 0, name="cow"), ["category id 3 is given twice"]),
    "duplicate annotation id": (put("annotations", 1, "id", 11), ["annotation id 11 is given twice"]),
    "duplicate category name": (put("categories", 1, "name", "cat"), ["category 8", '"cat"', "category 3"]),
    "text id": (put("images", 1, "id", "2"), ["image number 2", 'the text "2"', "whole number"]),
    "bool id": (put("annotations", 1, "id", True), ["annotation number 2", "id is true", "whole number"]),
    "float id": (put("annotations", 1, "id", 12.5), ["annotation number 2", "id is 12.5", "whole number"]),
    "huge id": (put("images", 0, "id", 2**70), ["image number 1", str(2**70), "does not fit 64 bits"]),
    "float image_id": (put("annotations", 0, "image_id", 1.5), ["annotation 11", "image_id is 1.5"]),
    "text category_id": (put("annotations", 0, "category_id", "3"), ["annotation 11", "category_id", '"3"']),
    "no image_id": (drop("annotations", 0, "image_id"), ["annotation 11", 'no "image_id"']),
    "no annotation id": (drop("annotations", 0, "id"), ["annotation number 1", 'no "id"']),
    "dangling image": (
        put("annotations", 0, "image_id", 7),
        ["annotation 11", "image_id 7 does not exist", "nearest image id: 2"],
    ),
    "dangling category": (
        put("annotations", 1, "category_id", 9),
        ["annotation 12", "category_id 9 does not exist", "nearest category id: 8"],
    ),
    "dangling negative": (
        put("images", 1, "neg_category_ids", [3, 4]),
        ["image 2", "neg_category_ids", "category 4", "nearest category id: 3"],
    ),
    "no bbox": (drop("annotations", 1, "bbox"), ["annotation 12", 'no "bbox"']),
    "null bbox": (put("annotations", 1, "bbox", None), ["annotation 12", "bbox is null"]),
    "short bbox": (put("annotations", 1, "bbox", [1, 2, 3]), ["annotation 12", "[1, 2, 3]", "four finite numbers"]),
    "text in bbox": (put("annotations", 1, "bbox", [1, 2, 3, "4"]), ["annotation 12", "four finite numbers"]),
    "NaN in bbox": (put("annotations", 1, "bbox", [1, 2, float("nan"), 4]), ["annotation 12", "nan", "four finite"]),
    "infinite bbox": (
        text(lambda good: good[::-1].replace("]01 ,01 ,2 ,1[", "]999e1 ,01 ,2 ,1[", 1)[::-1]),
        ["annotation 12", "inf", "four finite"],
    ),
    "overflowing bbox": (put("annotations", 1, "bbox", [1e308, 0, 1e308, 1]), ["annotation 12", "four finite"]),
    "negative width": (put("annotations", 1, "bbox", [9, 9, -2, 4]), ["annotation 12", "negative size"]),
    "NaN area": (put("annotations", 1, "area", float("nan")), ["annotation 12", "area is nan"]),
    "NaN elsewhere": (put("info", float("nan")), ["not valid JSON", "NaN", "line 1"]),
    "text iscrowd": (put("annotations", 1, "iscrowd", "0"), ["annotation 12", "iscrowd", "0 or 1"]),
    "zero-size image": (put("images", 1, "height", 0), ["image 2", "40 x 0"]),
    "fractional size": (put("images", 1, "height", 30.5), ["image 2", "40 x 30.5"]),
    "no width": (drop("images", 1, "width"), ["image 2", "width is missing"]),
    "no file name": (drop("images", 1, "file_name"), ["image 2", '"file_name"']),
    "empty file name": (put("images", 1, "file_name", ""), ["image 2", "file_name is empty"]),
    "absolute path": (put("images", 1, "file_name", "/etc/passwd"), ["image 2", '"/etc/passwd" is absolute']),
    "drive path": (put("images", 1, "file_name", "C:\\x.jpg"), ["image 2", "is absolute"]),
    "leaving path": (
        put("images", 1, "file_name", "a/../../x.jpg"),
        ["image 2", '"a/../../x.jpg"', "leaves the image"],
    ),
    "leaving by backslash": (put("images", 1, "file_name", "..\\x.jpg"), ["image 2", "leaves the image folder"]),
    "leaving by url": (
        lambda d: put("images", 1, {"id": 2, "width": 40, "height": 30, "coco_url": "http://h/../x.jpg"})(d),
        ["image 2", "leaves the image folder"],
    ),
    "nameless category": (drop("categories", 0, "name"), ["category 3", "name is missing"]),
    "text count": (put("categories", 0, "image_count", "many"), ["category 3", "image_count"]),
    "image is a number": (put("images", 1, 5), ["image number 2 is a number"]),
}


def make(folder: Path, document: str | dict[str, Any] = GOOD) -> Path:
    """An annotation file with its two pictures."""
    path = folder / "train.json"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    (folder / "train").mkdir(exist_ok=True)
    for name in ("one.png", "two.png"):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "train" / name)
    return path


def run_check(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


@pytest.mark.parametrize("case", BROKEN)
def test_broken_annotations_give_one_message(tmp_path: Path, case: str) -> None:
    change, parts = BROKEN[case]
    path = make(tmp_path, change(copy.deepcopy(GOOD)))
    with pytest.raises(UserError) as caught:
        open_index(path)
    result = run_check(path)
    assert result.exit_code == 2 and result.stdout == ""
    for message in (str(caught.value), result.stderr):
        assert message.count(str(path)) == 1 and len(message.strip().splitlines()) == 1
        for part in parts:
            assert part in message
    assert check_file(path).num_problems == 1


def test_missing_file_names_the_nearest(tmp_path: Path) -> None:
    make(tmp_path)
    for call in (open_index, check_file):
        with pytest.raises(UserError, match=r'trian\.json does not exist \(did you mean "train\.json"\?\)'):
            call(tmp_path / "trian.json")
    with pytest.raises(UserError, match="is a folder"):
        open_index(tmp_path)
    assert isinstance(run_check(tmp_path / "trian.json").exception, UserError)


def test_first_problem_and_number_of_others(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    for number in range(20, 25):
        document["annotations"].append({"id": number, "image_id": 99, "category_id": 3, "bbox": [0, 0, 5, -1]})
    path = make(tmp_path, document)
    (tmp_path / "train" / "two.png").unlink()
    report = check_file(path)
    assert report.num_problems == 11 and len(report.problems) == 1 and not report.usable
    result = run_check(path)
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [report.problems[0], "10 more problems (--all lists them)"]
    everything = run_check(path, "--all").stderr.splitlines()
    assert len(everything) == 11 and everything[0] == report.problems[0]
    assert sum("negative size" in line for line in everything) == 5 and "two.png does not exist" in everything[-1]
    with pytest.raises(UserError, match=r"annotation 20: image_id 99 .*\(9 more; "):
        open_index(path)


def test_wrong_types_are_all_listed(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["images"][0]["id"] = "1"
    document["annotations"][0]["bbox"] = "none"
    document["annotations"][1]["iscrowd"] = []
    report = check_file(make(tmp_path, document), all_problems=True)
    assert report.num_problems == 3 and len(report.problems) == 3


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_good_file_is_usable(tmp_path: Path) -> None:
    path = make(tmp_path)
    report = check_file(path)
    assert report.usable and report.images == tmp_path / "train"
    assert report.summary == {"images": 2, "annotations": 2, "categories": 2, "crowd": 0, "trained boxes": 2}
    result = run_check(path)
    assert result.exit_code == 0 and "usable" in result.stdout and result.stderr == ""


def problem_of(path: Path, **options: Any) -> str:
    report = check_file(path, **options)
    assert report.num_problems == 1
    assert run_check(path, *(["--decode"] if options.get("decode") else [])).exit_code in (0, 2)
    return report.problems[0]


def test_missing_picture(tmp_path: Path) -> None:
    path = make(tmp_path)
    (tmp_path / "train" / "two.png").unlink()
    message = problem_of(path)
    assert "image 2" in message and "two.png does not exist" in message and "--images" not in message
    (tmp_path / "train" / "one.png").unlink()
    assert "none of the 2 pictures" in check_file(path).problems[0] and "--images" in check_file(path).problems[0]


def test_other_image_folder(tmp_path: Path) -> None:
    path = make(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    assert check_file(path).num_problems == 2
    assert run_check(path, "--images", tmp_path / "elsewhere").exit_code == 0
    with pytest.raises(UserError, match="nowhere does not exist"):
        check_file(path, tmp_path / "nowhere")


def test_picture_of_another_size(tmp_path: Path) -> None:
    path = make(tmp_path)
    Image.new("RGB", (41, 30)).save(tmp_path / "train" / "two.png")
    assert "two.png: its size is 41 x 30, the annotation file says 40 x 30" in problem_of(path)
    Image.new("RGB", (30, 40)).save(tmp_path / "train" / "two.png")
    assert "swapped" in problem_of(path)


def test_damaged_pictures(tmp_path: Path) -> None:
    path = make(tmp_path)
    file = tmp_path / "train" / "two.png"
    file.write_bytes(b"no picture")
    assert "two.png is no picture" in problem_of(path)
    file.write_bytes(b"")
    assert "two.png is empty" in problem_of(path)
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:1500])
    assert check_file(path).usable  # the header is whole
    assert "two.png is damaged" in problem_of(path, decode=True)
    assert run_check(path, "--decode").exit_code == 2


def test_pictures_of_several_frames_are_told_of(tmp_path: Path) -> None:
    path = make(tmp_path)
    first, second = Image.new("RGB", (40, 30)), Image.new("RGB", (40, 30), "red")
    for kind in ("GIF", "TIFF", "PNG", "WEBP"):
        first.save(tmp_path / "train" / "two.png", kind, save_all=True, append_images=[second])
        assert [note for note in check_file(path).notes if "1 file of several frames or pages" in note], kind
    for kind in ("MPO", "GIF"):  # views of a camera; one frame
        more = [second] if kind == "MPO" else []
        first.save(tmp_path / "train" / "two.png", kind, save_all=True, append_images=more)
        assert not [note for note in check_file(path).notes if "frames" in note], kind


def test_picture_over_the_bound(tmp_path: Path) -> None:
    path = make(tmp_path)
    assert check_file(path, max_pixels=1200).usable
    assert check_file(path, max_pixels=1199).num_problems == 2
    result = run_check(path, "--max-pixels", 1199)
    assert result.exit_code == 2 and "40 x 30, larger than the bound of 1,199 pixels" in result.stderr


# ---- usable, and told ------------------------------------------------------------------------------------------------

USABLE: dict[str, tuple[Callable[[dict[str, Any]], str], str]] = {
    "zero width": (put("annotations", 0, "bbox", [1, 1, 0, 5]), "1 box without area"),
    "outside": (put("annotations", 0, "bbox", [50, 1, 9, 5]), "1 box without area"),
    "over the border": (put("annotations", 0, "bbox", [35, 1, 9, 5]), "1 box over the border"),
    "no iscrowd": (drop("annotations", 0, "iscrowd"), "1 annotation without iscrowd"),
    "gaps": (put("categories", 0, "id", 3), "4 unused numbers between the category ids"),
    "no annotations": (put("annotations", []), "there are no annotations"),
    "empty image": (put("annotations", 0, "image_id", 2), "1 image without annotations"),
    "unused class": (put("annotations", 0, "category_id", 8), "1 class without annotations: cat"),
    "shared file": (put("images", 0, "file_name", "two.png"), "1 image with the file_name of an earlier one"),
    "other frequency": (put("categories", 0, "frequency", "often"), 'frequency "often"'),
    "broken polygon": (put("annotations", 0, "segmentation", [[1]]), "masks cannot be used, boxes can: "),
    "one polygon": (put("annotations", 0, "segmentation", [[1, 1, 9, 1, 9, 9]]), "1 annotation without segmentation"),
    "ignored": (put("annotations", 0, "ignore", 1), "1 annotation with ignore set"),
    "alike names": (put("categories", 0, "name", " Dog"), "names differ in case or spaces alone: "),
    "repeated": (
        put("annotations", 1, {"id": 12, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 10]}),
        "1 annotation with the image, class and box of an earlier one",
    ),
}


AROUND = [[1, 2, 11, 2, 11, 12, 1, 12]]  # the box of both annotations as a polygon


def odd(**fields: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """The good document with fields of its annotations, each made of the annotation."""
    document = copy.deepcopy(GOOD)
    for entry in document["annotations"]:
        entry.update({"segmentation": AROUND, **{key: make(entry) for key, make in fields.items()}})
    return document


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("segmentation", lambda _: [[value / 40 for value in AROUND[0]]], "2 of 2 masks lie elsewhere"),
        ("segmentation", lambda _: [[30, 1, 39, 1, 39, 9]], "2 of 2 masks lie elsewhere"),
        ("segmentation", lambda _: {"size": [30, 40], "counts": [1000, 200]}, "2 of 2 masks lie elsewhere"),
        ("area", lambda _: 0, "area is 0 times width x height"),
        ("area", lambda _: 100 / 1200, "area is 0.00083 times width x height"),
        ("area", lambda _: 1200, "area is 12 times width x height"),
    ],
)
def test_fields_that_contradict_the_boxes_are_told_of(tmp_path: Path, field: str, value: Any, said: str) -> None:
    notes = check_file(make(tmp_path, odd(**{field: value}))).notes
    assert [note for note in notes if said in note], notes
    assert not [note for note in check_file(make(tmp_path, odd())).notes if "masks" in note or "area" in note]


@pytest.mark.parametrize("case", USABLE)
def test_usable_files_are_told_of(tmp_path: Path, case: str) -> None:
    change, note = USABLE[case]
    path = make(tmp_path, change(copy.deepcopy(GOOD)))
    result = run_check(path)
    assert result.exit_code == 0, result.stderr
    assert note in result.stdout
    open_index(path)


def test_true_and_false_are_crowd_flags(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    document["annotations"][0]["iscrowd"] = True
    document["annotations"][1]["iscrowd"] = 0.0
    assert open_index(make(tmp_path, document)).crowd.tolist() == [True, False]


def test_byte_order_mark_is_accepted(tmp_path: Path) -> None:
    path = make(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(open_index(path)) == 2 and len(open_index(path).segmentations().kinds) == 2


def test_rotated_and_odd_pictures_are_told_of(tmp_path: Path) -> None:
    path = make(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("L", (30, 40)).save(tmp_path / "train" / "one.png", exif=exif)  # shown 40 x 30
    Image.new("RGBA", (40, 30)).save(tmp_path / "train" / "two.png", exif=exif)  # stored 40 x 30, shown 30 x 40
    notes = "\n".join(check_file(path).notes)
    assert "1 picture with an EXIF rotation: turned when read" in notes
    assert "1 picture whose size fits only without the EXIF rotation" in notes
    assert "1 picture not 8-bit RGB or grey (RGBA 1)" in notes


@pytest.mark.parametrize("name", ["coco-sample/train", "road12-masks-lt/val", "lvis-sample/val"])
def test_real_sets_are_usable(data_dir: Path, name: str) -> None:
    report = check_file(data_dir / f"{name}.json", decode=True)
    assert report.usable and report.summary["images"] > 0


def test_notes_on_annotations_come_without_the_pictures_too(tmp_path: Path) -> None:
    document = copy.deepcopy(GOOD)
    for image in document["images"]:
        image["neg_category_ids"] = []
    result = run_check(make(tmp_path, put("annotations", 0, "iscrowd", 1)(document)), "--images", tmp_path)
    assert result.exit_code == 2 and "none of the 2 pictures" in result.stderr
    assert "every neg_category_ids is empty" in result.stderr and "1 of 2 annotations are crowd" in result.stderr
