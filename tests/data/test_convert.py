"""COCO, YOLO and VOC: round trips, every way to write a data.yaml, and messages that name file and line."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tailfin.cli import data_make
from tailfin.data.convert import convert, detect_layout
from tailfin.data.index import open_index
from tailfin.data.voc_xml import parse_xml
from tailfin.data.yolo import label_file
from tailfin.errors import UserError


def picture(path: Path, width: int = 40, height: int = 20, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), (width % 255, 80, 20)).save(path, **options)
    return path


def coco(
    folder: Path, splits: dict[str, list[list[tuple[int, list[float]]]]], names: list[str], **more: object
) -> Path:
    """COCO files with one 40 x 20 picture per row of (class position, bbox)."""
    image = annotation = 0
    for split, rows in splits.items():
        document: dict = {"images": [], "annotations": []}
        document["categories"] = [{"id": 3 * c + 1, "name": name} for c, name in enumerate(names)]
        for row in rows:
            image += 1
            name = f"{image:03d}.png"
            picture(folder / split / name)
            document["images"].append({"id": image, "file_name": name, "width": 40, "height": 20})
            for label, box in row:
                annotation += 1
                entry = {"id": annotation, "image_id": image, "category_id": 3 * label + 1, "bbox": box, "iscrowd": 0}
                document["annotations"].append({**entry, **more})
        (folder / f"{split}.json").write_text(json.dumps(document))
    return folder


def objects(path: Path) -> list[tuple[str, str, list[float]]]:
    """(file name, class, box) of every annotation, in file order."""
    document = json.loads(path.read_text())
    names = {c["id"]: c["name"] for c in document["categories"]}
    files = {i["id"]: i["file_name"] for i in document["images"]}
    return [(files[a["image_id"]], names[a["category_id"]], a["bbox"]) for a in document["annotations"]]


def same(first: list, second: list, tolerance: float) -> bool:
    return len(first) == len(second) and all(
        a[:2] == b[:2] and all(abs(x - y) <= tolerance for x, y in zip(a[2], b[2], strict=True))
        for a, b in zip(first, second, strict=True)
    )


inside = st.tuples(st.floats(0, 38), st.floats(0, 18), st.floats(0.01, 1), st.floats(0.01, 1)).map(
    lambda v: [v[0], v[1], max(0.01, v[2] * (40 - v[0])), max(0.01, v[3] * (20 - v[1]))]
)
names = st.lists(
    st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=8),
    min_size=1,
    max_size=4,
    unique=True,
)
sets = names.flatmap(
    lambda given_: st.tuples(
        st.just(given_),
        st.lists(st.lists(st.tuples(st.integers(0, len(given_) - 1), inside), max_size=3), min_size=1, max_size=3)
        .filter(any)
        .filter(lambda rows: all(max(max(box) for _, box in row) > 2 for row in rows if row)),  # not as fractions are
    )
)


@given(sets)
@settings(max_examples=40, deadline=None)
def test_yolo_round_trip(value: tuple) -> None:
    given_, rows = value
    with tempfile.TemporaryDirectory() as place:
        source = coco(Path(place) / "source", {"train": rows, "val": rows[:1]}, given_)
        convert(source, Path(place) / "yolo", target="yolo")
        report = convert(Path(place) / "yolo", Path(place) / "back")
        assert report.images == {"train": len(rows), "val": 1}
        for split in ("train", "val"):
            back = Path(place) / "back" / f"{split}.json"
            assert same(objects(source / f"{split}.json"), objects(back), 1e-3)
            assert open_index(back).names == tuple(given_)


@given(sets)
@settings(max_examples=40, deadline=None)
def test_voc_round_trip_is_exact(value: tuple) -> None:
    given_, rows = value
    with tempfile.TemporaryDirectory() as place:
        source = coco(Path(place) / "source", {"train": rows}, given_)
        convert(source, Path(place) / "voc", target="voc")
        convert(Path(place) / "voc", Path(place) / "back")
        back = Path(place) / "back" / "train.json"
        assert objects(source / "train.json") == objects(back)
        assert open_index(back).names == tuple(given_)


# COCO to others


def test_yolo_folder_is_what_others_expect(tmp_path: Path) -> None:
    source = coco(
        tmp_path / "s", {"train": [[(1, [10, 5, 20, 10])], []], "val": [[(0, [0, 0, 40, 20])]]}, ["no", "b: c"]
    )
    report = convert(source, tmp_path / "y", target="yolo")
    settings_ = yaml.safe_load((tmp_path / "y" / "data.yaml").read_text())
    assert settings_ == {"train": "images/train", "val": "images/val", "names": {0: "no", 1: "b: c"}}
    assert (tmp_path / "y/labels/train/001.txt").read_text() == "1 0.5 0.5 0.5 0.5\n"
    assert (tmp_path / "y/labels/train/002.txt").read_text() == ""
    assert (tmp_path / "y/labels/val/003.txt").read_text() == "0 0.5 0.5 1 1\n"
    assert (tmp_path / "y/images/val/003.png").read_bytes() == (source / "val/003.png").read_bytes()
    assert report.objects == {"train": 1, "val": 1} and report.classes == 2


def test_voc_boxes_count_from_one_and_include_their_ends(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [0, 2, 40, 1]), (0, [1.25, 2, 3.5, 4])]]}, ["a<&>"], difficult=1)
    convert(source, tmp_path / "v", target="voc")
    root, _ = parse_xml(tmp_path / "v/Annotations/001.xml")
    boxes = [[o.findtext(f"bndbox/{k}") for k in ("xmin", "ymin", "xmax", "ymax")] for o in root.findall("object")]
    assert boxes == [["1", "3", "40", "3"], ["2.25", "3", "4.75", "6"]]
    assert [o.findtext("name") for o in root.findall("object")] == ["a<&>", "a<&>"]
    assert (root.findtext("filename"), root.findtext("size/width"), root.findtext("size/height")) == (
        "001.png", "40", "20",
    )  # fmt: skip
    assert (tmp_path / "v/ImageSets/Main/train.txt").read_text() == "001\n"
    convert(tmp_path / "v", tmp_path / "back.json")
    assert [a["difficult"] for a in json.loads((tmp_path / "back.json").read_text())["annotations"]] == [1, 1]


def test_crowds_borders_and_empty_boxes_are_counted(tmp_path: Path) -> None:
    boxes = [[-5, -5, 10, 10], [39, 19, 5, 5], [50, 3, 4, 4], [3, 3, 0, 4], [1, 1, 2, 2]]
    source = coco(tmp_path / "s", {"train": [[(0, box) for box in boxes]]}, ["a"])
    document = json.loads((source / "train.json").read_text())
    document["annotations"].append({**document["annotations"][4], "id": 99, "iscrowd": 1})
    (source / "train.json").write_text(json.dumps(document))
    report = convert(source, tmp_path / "y", target="yolo")
    assert (report.crowd, report.clipped, report.empty, report.objects) == (1, 2, 2, {"train": 3})
    convert(tmp_path / "y", tmp_path / "c")
    assert [box for _, _, box in objects(tmp_path / "c/train.json")] == [[0, 0, 5, 5], [39, 19, 1, 1], [1, 1, 2, 2]]
    report = convert(source, tmp_path / "v", target="voc")
    assert (report.crowd, report.objects) == (1, {"train": 5})


def test_polygons_to_yolo_and_back(tmp_path: Path) -> None:
    triangle, square = [4.0, 2.0, 12.0, 2.0, 8.0, 10.0], [20.0, 2.0, 24.0, 2.0, 24.0, 6.0, 20.0, 6.0]
    source = coco(tmp_path / "s", {"train": [[(0, [4, 2, 8, 8])]]}, ["a"], segmentation=[triangle], area=32.0)
    convert(source, tmp_path / "y", target="yolo", masks=True)
    assert (tmp_path / "y/labels/train/001.txt").read_text() == "0 0.1 0.1 0.3 0.1 0.2 0.5\n"
    convert(tmp_path / "y", tmp_path / "c")
    annotation = json.loads((tmp_path / "c/train.json").read_text())["annotations"][0]
    assert annotation["segmentation"] == [triangle] and annotation["area"] == 32 and annotation["bbox"] == [4, 2, 8, 8]
    two = coco(tmp_path / "two", {"train": [[(0, [4, 2, 20, 8])]]}, ["a"], segmentation=[triangle, square])
    convert(two, tmp_path / "y2", target="yolo", masks=True)
    convert(tmp_path / "y2", tmp_path / "c2")
    joined = json.loads((tmp_path / "c2/train.json").read_text())["annotations"][0]
    assert joined["area"] == 32 + 16 and joined["bbox"] == [4, 2, 20, 8], "the bridge between parts has no area"
    boxes = coco(tmp_path / "boxes", {"train": [[(0, [4, 2, 8, 8])]]}, ["a"])
    convert(boxes, tmp_path / "y3", target="yolo", masks=True)
    assert (tmp_path / "y3/labels/train/001.txt").read_text() == "0 0.1 0.1 0.3 0.1 0.3 0.5 0.1 0.5\n"
    rle = coco(
        tmp_path / "rle", {"train": [[(0, [4, 2, 8, 8])]]}, ["a"], segmentation={"size": [20, 40], "counts": "0"}
    )
    with pytest.raises(UserError, match="annotation 1 has an RLE mask"):
        convert(rle, tmp_path / "y4", target="yolo", masks=True)
    assert convert(rle, tmp_path / "y4", target="yolo").masks == 1


def test_links_and_no_pictures(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [1, 1, 5, 5])]]}, ["a"])
    convert(source, tmp_path / "link", target="yolo", placing="link")
    assert (tmp_path / "link/images/train/001.png").samefile(source / "train/001.png")
    convert(tmp_path / "link", tmp_path / "none", placing="none")
    assert [p.name for p in (tmp_path / "none").iterdir()] == ["train.json"]
    report = convert(tmp_path / "link", tmp_path / "one.json")
    assert (report.folders["train"] / objects(tmp_path / "one.json")[0][0]).is_file()


def test_shared_names_get_the_split_in_voc(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [1, 1, 5, 5])]]}, ["a"])
    val = json.loads((source / "train.json").read_text())
    (source / "val.json").write_text(json.dumps(val))
    picture(source / "val/001.png")
    convert(source, tmp_path / "v", target="voc")
    assert sorted(p.name for p in (tmp_path / "v/Annotations").iterdir()) == ["train_001.xml", "val_001.xml"]
    report = convert(tmp_path / "v", tmp_path / "c")
    assert report.images == {"train": 1, "val": 1}


def test_coco_download_layout_and_subfolders(tmp_path: Path) -> None:
    made = coco(tmp_path / "made", {"train": [[(0, [1, 1, 5, 5])]]}, ["a"])
    document = json.loads((made / "train.json").read_text())
    document["images"][0]["file_name"] = "sub/x.png"
    root = tmp_path / "coco"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations/instances_train2017.json").write_text(json.dumps(document))
    picture(root / "train2017/sub/x.png")
    assert convert(root, tmp_path / "y", target="yolo").images == {"train": 1}
    assert (tmp_path / "y/labels/train/sub/x.txt").is_file()


# data.yaml in all its forms


def yolo(folder: Path, labels: str | None = "0 0.5 0.5 0.5 0.5\n", data: dict | None = None) -> Path:
    picture(folder / "images/train/a.jpg")
    (folder / "labels/train").mkdir(parents=True, exist_ok=True)
    if labels is not None:
        (folder / "labels/train/a.txt").write_text(labels)
    (folder / "data.yaml").write_text(yaml.safe_dump(data or {"train": "images/train", "names": ["x", "y"]}))
    return folder


@pytest.mark.parametrize(
    "entry",
    [
        {"train": "images/train"},
        {"train": ["images/train"]},
        {"train": "list.txt"},
        {"train": ["list.txt", "images/train"]},
        {"train": "../images/train"},
        {"path": ".", "train": "images/train"},
        {"path": "/no/such/folder", "train": "images/train"},
        {"path": "images", "train": "train"},
        {"train": "images/train/a.jpg"},
    ],
)
@pytest.mark.parametrize("listed", [["x", "y"], {0: "x", 1: "y"}])
def test_ways_to_name_the_pictures(tmp_path: Path, entry: dict, listed: list | dict) -> None:
    folder = yolo(tmp_path / "set", data={**entry, "names": listed, "nc": 2})
    (folder / "list.txt").write_text("./images/train/a.jpg\n\n")
    report = convert(folder, tmp_path / "out")
    assert report.images == {"train": 1} and objects(tmp_path / "out/train.json") == [("a.jpg", "x", [10, 5, 20, 10])]


def test_splits_from_lists_of_folders(tmp_path: Path) -> None:
    folder = yolo(
        tmp_path / "set", data={"train": ["images/train", "images/more"], "val": "images/v", "names": ["no", "1e3"]}
    )
    picture(folder / "images/more/a.jpg")
    picture(folder / "images/v/deep/b.JPG")
    (folder / "labels/v/deep").mkdir(parents=True)
    (folder / "labels/v/deep/b.txt").write_text("1 0.5 0.5 1 1")
    report = convert(folder, tmp_path / "out")
    assert report.images == {"train": 2, "val": 1}
    train, val = open_index(tmp_path / "out/train.json"), open_index(tmp_path / "out/val.json")
    assert [train.file_name(i) for i in range(2)] == ["train/a.jpg", "more/a.jpg"]
    assert train.names == ("no", "1e3") and not set(train.image_ids) & set(val.image_ids)
    assert (tmp_path / "out/train/more/a.jpg").is_file()
    assert [c.instance_count for c in val.categories] == [1, 0], "counts are those of train"


def test_rotated_pictures_have_their_shown_size(tmp_path: Path) -> None:
    folder = yolo(tmp_path / "set")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(folder / "images/train/a.jpg", exif=exif)
    convert(folder, tmp_path / "out")
    index = open_index(tmp_path / "out/train.json")
    assert (index.widths[0], index.heights[0]) == (20, 40) and index.boxes[0].tolist() == [5, 10, 10, 20]


def test_where_labels_are_looked_for() -> None:
    assert label_file(Path("/d/images/images/a.b.jpg")) == Path("/d/images/labels/a.b.txt")
    assert label_file(Path("images/train/a.jpg")) == Path("labels/train/a.txt")
    assert label_file(Path("/d/pictures/a.jpg")) == Path("/d/pictures/a.txt")
    assert label_file(Path("/d/images")) == Path("/d/images.txt")


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("0 0.5 0.5 0.5", "4 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.9", "6 numbers"),
        ("0 0.5 0.5 0.5 0.5 0.9 0.1 0.1", "8 numbers"),
        ("x 0.5 0.5 0.5 0.5", "'x' is not a number"),
        ("0 0.5 0.5 nan 0.5", "not finite"),
        ("0 0.5 inf 0.5 0.5", "not finite"),
        ("2 0.5 0.5 0.5 0.5", "class 2 is not one of the 2 classes 0 to 1"),
        ("-1 0.5 0.5 0.5 0.5", "class -1"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5"),
        ("0 0.5 0.5 1.5 0.5", "1.5 is outside 0 to 1"),
        ("0 0.5 -0.1 0.5 0.5", "-0.1 is outside"),
        ("0 12 5 20 10", "12 is outside"),
    ],
)
def test_bad_label_lines(tmp_path: Path, line: str, word: str) -> None:
    folder = yolo(tmp_path / "set", f"0 0.5 0.5 0.5 0.5\n\n{line}\n")
    with pytest.raises(UserError, match="a.txt, line 3: ") as error:
        convert(folder, tmp_path / "out")
    assert word in str(error.value) and sorted(p.name for p in tmp_path.iterdir()) == ["set"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({"train": "images/train"}, "names is missing"),
        ({"train": "images/train", "names": []}, "names is missing"),
        ({"train": "images/train", "names": {0: "a", 2: "b"}}, "1 is missing"),
        ({"train": "images/train", "names": {"a": "b"}}, "class numbers"),
        ({"train": "images/train", "names": ["a", "a"]}, '"a" is the name of class 0 and of class 1'),
        ({"train": "images/train", "names": ["a", None]}, "class 1 has no name"),
        ({"train": "images/train", "names": ["a"], "nc": 3}, "nc is 3"),
        ({"train": "images/nothing", "names": ["a"]}, "nothing does not exist"),
        ({"train": "labels", "names": ["a"]}, "no pictures"),
        ({"names": ["a"]}, "names no pictures"),
        ({"train": "broken.txt", "names": ["a"]}, "broken.txt, line 2: there is no picture b.jpg"),
        ({"train": [["x"]], "names": ["a"]}, "is no path"),
    ],
)
def test_bad_data_yaml(tmp_path: Path, data: dict, word: str) -> None:
    folder = yolo(tmp_path / "set", data=data)
    (folder / "broken.txt").write_text("images/train/a.jpg\nb.jpg\n")
    with pytest.raises(UserError, match="data.yaml|broken.txt") as error:
        convert(folder, tmp_path / "out")
    assert word in str(error.value) and not (tmp_path / "out").exists()


def test_yaml_that_is_none_and_pictures_that_are_none(tmp_path: Path) -> None:
    folder = yolo(tmp_path / "set")
    (folder / "images/train/b.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="b.jpg"):
        convert(folder, tmp_path / "out")
    (folder / "data.yaml").write_text("names: [a\ntrain: x")
    with pytest.raises(UserError, match="data.yaml is not valid YAML"):
        convert(folder, tmp_path / "out")
    (folder / "data.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(UserError, match="not valid YAML"):
        convert(folder, tmp_path / "out")


def test_no_label_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 pictures has a label file"):
        convert(yolo(tmp_path / "set", labels=None), tmp_path / "out")


def test_pictures_that_would_share_labels(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[], []]}, ["a"])
    document = json.loads((source / "train.json").read_text())
    document["images"][1]["file_name"] = "001.jpg"
    picture(source / "train/001.jpg")
    (source / "train.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="images 1 and 2 would share"):
        convert(source, tmp_path / "y", target="yolo")
    with pytest.raises(UserError, match="images 1 and 2 would both be called 001"):
        convert(source, tmp_path / "v", target="voc")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


# VOC


def voc(folder: Path, body: str, *, size: str = "<size><width>40</width><height>20</height></size>") -> Path:
    picture(folder / "JPEGImages/a.jpg")
    (folder / "Annotations").mkdir(parents=True, exist_ok=True)
    (folder / "Annotations/a.xml").write_text(f"<annotation>\n<filename>a.jpg</filename>{size}\n{body}\n</annotation>")
    return folder


BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{}</xmax><ymax>2</ymax></bndbox>"
DOG = "<object><name>dog</name>" + BOX.format(10) + "</object>"


def test_voc_without_lists_sizes_or_flags(tmp_path: Path) -> None:
    folder = voc(tmp_path / "v", DOG, size="")
    convert(folder, tmp_path / "c")
    assert objects(tmp_path / "c/train.json") == [("a.jpg", "dog", [0, 0, 10, 2])]
    assert (open_index(tmp_path / "c/train.json").widths[0], open_index(tmp_path / "c/train.json").heights[0]) == (
        40,
        20,
    )


def test_voc_lists_and_other_folders(tmp_path: Path) -> None:
    folder = voc(tmp_path / "v", DOG)
    main = folder / "ImageSets/Main"
    main.mkdir(parents=True)
    (main / "trainval.txt").write_text("a\n")
    (main / "dog_train.txt").write_text("a 1\n")
    assert convert(folder, tmp_path / "c1").images == {"train": 1}
    (main / "val.txt").write_text("a  1\n")
    assert convert(folder, tmp_path / "c2").images == {"val": 1}
    (main / "val.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"val.txt, line 2: .*b.xml does not exist"):
        convert(folder, tmp_path / "c3")
    flat = tmp_path / "flat"
    for split in ("train", "valid"):
        picture(flat / split / f"{split}.jpg")
        (flat / split / f"{split}.xml").write_text(f"<annotation>{DOG}</annotation>")
    assert convert(flat, tmp_path / "c4").images == {"train": 1, "val": 1}


@pytest.mark.parametrize(
    ("body", "word"),
    [
        ("<object>" + BOX.format(3) + "</object>", "a.xml, line 3: object 1 has no name"),
        (DOG + "\n<object><name>cat</name></object>", "a.xml, line 4: object 2 (cat) has no xmin"),
        ("<object><name>d</name>" + BOX.format("x") + "</object>", "xmax is 'x', a number is needed"),
        (
            "<object><name>d</name>" + BOX.format("NaN") + "</object>",
            "xmax is NaN, a finite number of pixels is needed",
        ),
        ("<object><name>d</name>" + BOX.format("1e999999999") + "</object>", "xmax is 1e999999999, a finite"),
        ("<object><name>d</name>" + BOX.format(-1) + "</object>", "xmax -1 is less than xmin 1"),
        ("<object>", "a.xml, line 4: not valid XML: mismatched tag"),
    ],
)
def test_bad_xml(tmp_path: Path, body: str, word: str) -> None:
    folder = voc(tmp_path / "v", body)
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "c")
    assert word in str(error.value) and not (tmp_path / "c").exists()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_document_types_are_refused(tmp_path: Path, encoding: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for declaration in (
        f'<!DOCTYPE a [<!ENTITY e SYSTEM "{secret.as_uri()}">]>',
        '<!DOCTYPE a [<!ENTITY e "boom">]>',
        f'<!DOCTYPE a SYSTEM "{secret.as_uri()}">',
    ):
        text = f'<?xml version="1.0" encoding="{encoding}"?>\n{declaration}\n<annotation>&e;</annotation>'
        (tmp_path / "x.xml").write_text(text, encoding)
        with pytest.raises(UserError, match="x.xml, line 2: it declares a document type"):
            parse_xml(tmp_path / "x.xml")


def test_names_xml_cannot_hold(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [1, 1, 2, 2])]]}, ["a\x01"])
    with pytest.raises(UserError, match="category 1: .* cannot be written to XML"):
        convert(source, tmp_path / "v", target="voc")


# which layout, which target


def test_detection_and_its_errors(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [1, 1, 2, 2])]], "val": [[]]}, ["a"])
    folder = yolo(tmp_path / "y")
    assert [detect_layout(p) for p in (source, source / "val.json", folder, folder / "data.yaml")] == [
        "coco", "coco", "yolo", "yolo",
    ]  # fmt: skip
    assert detect_layout(voc(tmp_path / "v", DOG)) == "voc"
    with pytest.raises(UserError, match="Annotations"):
        detect_layout(picture(tmp_path / "empty/x.png").parent)
    for arguments, options, word in (
        ((source, tmp_path / "o"), {}, "say with --to"),
        ((source, tmp_path / "o"), {"target": "coco"}, "is coco already"),
        ((tmp_path / "none", tmp_path / "o"), {}, "none does not exist"),
        ((folder, folder), {}, "holds the source"),
        ((folder, tmp_path), {"overwrite": True}, "holds the source"),
        ((folder, source), {}, "not empty"),
        ((folder, tmp_path / "o"), {"split": "val"}, r"no split val \(choices: train\)"),
        ((source, tmp_path / "o"), {"split": "x", "target": "voc"}, r"no split x \(choices: train, val\)"),
    ):
        with pytest.raises(UserError, match=word):
            convert(*arguments, **options)  # type: ignore[arg-type]
    assert not (tmp_path / "o").exists()
    convert(source, tmp_path / "both", target="yolo")
    with pytest.raises(UserError, match="splits train, val"):
        convert(tmp_path / "both", tmp_path / "one.json")
    convert(tmp_path / "both", tmp_path / "one.json", split="train")
    with pytest.raises(UserError, match="one.json exists"):
        convert(tmp_path / "both", tmp_path / "one.json", split="train")


def test_categories_must_agree(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [1, 1, 2, 2])]]}, ["a", "b"])
    coco(source, {"val": [[(0, [1, 1, 2, 2])]]}, ["b", "a"])
    with pytest.raises(UserError, match='val.json: class "b" has id 1 here and 4 in'):
        convert(source, tmp_path / "y", target="yolo")


def test_missing_and_escaping_pictures(tmp_path: Path) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [1, 1, 2, 2])]]}, ["a"])
    document = json.loads((source / "train.json").read_text())
    (source / "train.json").write_text(json.dumps(document).replace("001.png", "../001.png"))
    with pytest.raises(UserError, match="leaves the image folder"):
        convert(source, tmp_path / "y", target="yolo")
    (source / "train.json").write_text(json.dumps(document).replace("001.png", "gone.png"))
    with pytest.raises(UserError, match="gone.png does not exist"):
        convert(source, tmp_path / "y", target="yolo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = coco(tmp_path / "s", {"train": [[(0, [-1, 1, 4, 2])]]}, ["a"])
    data_make.convert(source, tmp_path / "y", to="yolo")
    output = capsys.readouterr().out
    assert "train: 1 pictures, 1 objects" in output and "1 boxes cut at the border" in output
    with pytest.raises(UserError, match=r'--to yola is not a layout \(did you mean "yolo"\?\)'):
        data_make.convert(source, tmp_path / "z", to="yola")
    with pytest.raises(UserError, match="exclude"):
        data_make.convert(source, tmp_path / "z", to="yolo", link=True, no_images=True)


def test_real_set_through_all_layouts(data_dir: Path, tmp_path: Path) -> None:
    """The LVIS picture and COCO's 57 validation pictures, crowds aside."""
    source = data_dir / "coco-sample" / "val.json"
    kept = json.loads(source.read_text())
    kept["annotations"] = [a for a in kept["annotations"] if not a["iscrowd"]]
    (tmp_path / "plain.json").write_text(json.dumps(kept))
    convert(source, tmp_path / "voc", target="voc", placing="link")
    convert(tmp_path / "voc", tmp_path / "back", placing="none")
    assert objects(tmp_path / "back/val.json") == objects(tmp_path / "plain.json")
    convert(source, tmp_path / "yolo", target="yolo", placing="link")
    convert(tmp_path / "yolo", tmp_path / "again", placing="none")
    assert same(objects(tmp_path / "again/val.json"), objects(tmp_path / "plain.json"), 0.02)  # boxes cut at the border
    assert open_index(tmp_path / "again/val.json").names == open_index(source).names
