"""Stratified splits and long-tailed parts: every class on both sides, exact counts, determinism, messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from tailfin.cli import data_make
from tailfin.data.document import count_classes, load_document
from tailfin.data.index import open_index
from tailfin.data.split import absent_classes, long_tail_subsample, split_train_val, unlabelled
from tailfin.errors import UserError


def make_document(rows: list[list[int]], classes: int) -> dict:
    """One image per row, with one annotation per entry (a class position); ids have gaps."""
    pairs = [(image, label) for image, row in enumerate(rows) for label in row]
    return {
        "info": {"version": "7"},
        "images": [
            {"id": 10 + 3 * i, "file_name": f"{i}.jpg", "width": 20, "height": 10, "note": i} for i in range(len(rows))
        ],
        "annotations": [
            {
                "id": 5 + 2 * k,
                "image_id": 10 + 3 * i,
                "category_id": 2 + 4 * label,
                "bbox": [1, 1, 3, 4],
                "extra": [k],
            }
            for k, (i, label) in enumerate(pairs)
        ],
        "categories": [{"id": 2 + 4 * c, "name": f"class {c}", "synset": f"s{c}"} for c in range(classes)],
    }


def _ids(document: dict, key: str) -> list[int]:
    return [entry["id"] for entry in document[key]]


documents = st.integers(1, 6).flatmap(
    lambda classes: st.lists(st.lists(st.integers(0, classes - 1), max_size=4), min_size=2, max_size=25).map(
        lambda rows: make_document(rows, classes)
    )
)


@given(documents, st.floats(0.05, 0.95), st.integers(0, 3))
@settings(max_examples=150, deadline=None)
def test_split_is_a_partition_and_train_has_every_class(document: dict, fraction: float, seed: int) -> None:
    train, val = split_train_val(document, fraction, seed)
    for key in ("images", "annotations"):
        assert sorted(_ids(train, key) + _ids(val, key)) == sorted(_ids(document, key))
        for part in (train, val):
            originals = {entry["id"]: entry for entry in document[key]}
            assert all(entry == originals[entry["id"]] for entry in part[key])  # unknown fields and all
            order = [_ids(document, key).index(number) for number in _ids(part, key)]
            assert order == sorted(order)
    for part in (train, val):
        there = set(_ids(part, "images"))
        assert all(annotation["image_id"] in there for annotation in part["annotations"])
        assert part["info"] == {"version": "7"}
    assert absent_classes(document, train) == []
    images, _ = count_classes(document)
    single = {f"class {c}" for c in np.flatnonzero(images == 1)}
    assert single <= set(absent_classes(document, val))
    assert (train, val) == split_train_val(document, fraction, seed)


@given(documents, st.integers(0, 3))
@settings(max_examples=80, deadline=None)
def test_a_class_misses_val_only_where_no_single_move_helps(document: dict, seed: int) -> None:
    train, val = split_train_val(document, 0.3, seed)
    in_train, _ = count_classes(train)
    labels: dict[int, set[int]] = {}
    for annotation in document["annotations"]:
        labels.setdefault(annotation["image_id"], set()).add((annotation["category_id"] - 2) // 4)
    for name in absent_classes(document, val):
        label = int(name.split()[1])
        for image in train["images"]:
            own = labels.get(image["id"], set())
            if label in own:
                assert any(in_train[other] == 1 for other in own)


def test_stratification_of_a_long_tail() -> None:
    rng = np.random.default_rng(3)
    weights = 1 / np.arange(1, 61) ** 1.2
    rows = [rng.choice(60, rng.integers(0, 6), p=weights / weights.sum(), replace=False).tolist() for _ in range(4000)]
    document = make_document(rows, 60)
    train, val = split_train_val(document, 0.2, 0)
    images, _ = count_classes(document)
    share = count_classes(val)[0] / images
    assert abs(len(val["images"]) / 4000 - 0.2) < 0.005
    assert np.abs(count_classes(val)[0] - 0.2 * images).max() <= 3  # images, of 40 to 2000
    assert np.abs(share - 0.2).max() < 0.04
    empty = [sum(not set(_ids(part, "images")).isdisjoint([10 + 3 * i]) for i, row in enumerate(rows) if not row)
             for part in (train, val)]  # fmt: skip
    assert abs(empty[1] / sum(empty) - 0.2) < 0.01
    # a plain random split of the same size is several times worse
    chosen = np.zeros(4000, bool)
    chosen[rng.permutation(4000)[: len(val["images"])]] = True
    plain = np.array([sum(chosen[i] for i, row in enumerate(rows) if c in row) for c in range(60)]) / images
    assert np.abs(plain - 0.2).mean() > 3 * np.abs(share - 0.2).mean()
    assert train != split_train_val(document, 0.2, 1)[0]


def test_counts_of_both_parts_are_those_of_train() -> None:
    document = make_document([[0, 0, 1]] * 30 + [[1]] * 5 + [[2]], 4)
    train, val = split_train_val(document, 0.25, 0)
    assert train["categories"] == val["categories"]
    images, instances = count_classes(train)
    for c, category in enumerate(val["categories"]):
        assert (category["image_count"], category["instance_count"]) == (images[c], instances[c])
        assert category["synset"] == f"s{c}"
    groups = [category.get("frequency") for category in val["categories"]]
    assert groups == ["c", "c", "r", None], "a class without training images is in no group"
    assert "image_count" not in document["categories"][0], "the input is left alone"
    assert absent_classes(document, val) == ["class 2"]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1.0, float("nan")])
def test_bad_fraction(fraction: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        split_train_val(make_document([[0], [0]], 1), fraction)


def test_split_of_bad_documents() -> None:
    with pytest.raises(UserError, match="cannot be split"):
        split_train_val(make_document([[0]], 1), 0.5)
    document = make_document([[0], [0]], 1)
    document["annotations"][1]["category_id"] = 99
    with pytest.raises(UserError, match="annotation 7: category_id 99 does not exist"):
        split_train_val(document, 0.5)


@given(documents, st.lists(st.integers(0, 8), min_size=6, max_size=6), st.integers(0, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_given_counts_are_exact(document: dict, wanted: list[int], seed: int, keep_empty: bool) -> None:
    classes = len(document["categories"])
    counts = {f"class {c}": wanted[c] for c in range(classes)}
    part = long_tail_subsample(document, counts, seed=seed, keep_empty=keep_empty)
    _, present = count_classes(document)
    _, kept = count_classes(part)
    assert kept.tolist() == np.minimum(present, wanted[:classes]).tolist()
    with_labels = {annotation["image_id"] for annotation in document["annotations"]}
    still = {annotation["image_id"] for annotation in part["annotations"]}
    for image in document["images"]:
        number = image["id"]
        expected = number in still or number not in with_labels or keep_empty
        assert (image in part["images"]) == expected
    assert part == long_tail_subsample(document, counts, seed=seed, keep_empty=keep_empty)
    assert unlabelled(document, part) >= 0


def test_exponential_tail() -> None:
    rng = np.random.default_rng(0)
    document = make_document([rng.integers(0, 10, 2).tolist() for _ in range(2000)], 10)
    part = long_tail_subsample(document, imbalance=50, largest=200, seed=4)
    _, kept = count_classes(part)
    assert sorted(kept.tolist(), reverse=True) == np.rint(200 * 50 ** -(np.arange(10) / 9)).astype(int).tolist()
    assert part["categories"][0]["instance_count"] == kept[0]
    assert _ids(part, "images") != _ids(long_tail_subsample(document, imbalance=50, largest=200, seed=5), "images")
    whole, _ = count_classes(document)
    assert count_classes(long_tail_subsample(document, imbalance=1))[1].max() <= count_classes(document)[1].max()
    assert whole.min() > 200


def test_classes_without_annotations_take_no_place_on_the_curve() -> None:
    document = make_document([[0]] * 40 + [[2]] * 40, 4)
    _, kept = count_classes(long_tail_subsample(document, imbalance=4))
    assert sorted(kept.tolist()) == [0, 0, 10, 40]


def test_whole_images_are_preferred() -> None:
    """Ten images with five objects of one class: 20 objects are four whole images, not some of each."""
    document = make_document([[0] * 5] * 10, 1)
    part = long_tail_subsample(document, {"class 0": 20})
    assert len(part["images"]) == 4 and unlabelled(document, part) == 0


def test_images_of_rare_classes_are_used_first() -> None:
    document = make_document([[0, 1]] * 5 + [[0]] * 50, 2)
    part = long_tail_subsample(document, {"class 0": 5, "class 1": 5})
    assert len(part["images"]) == 5 and unlabelled(document, part) == 0


def test_a_federated_image_says_which_classes_it_now_shows_in_part() -> None:
    document = make_document([[0, 0, 0, 1], [0, 0], [1]], 2)
    for image in document["images"][:2]:
        image["neg_category_ids"], image["not_exhaustive_category_ids"] = [], []
    zero = document["categories"][0]["id"]
    part = long_tail_subsample(document, {"class 0": 1}, keep_empty=True)
    classes = {image["id"]: image.get("not_exhaustive_category_ids") for image in part["images"]}
    holder = next(a["image_id"] for a in part["annotations"] if a["category_id"] == zero)
    assert classes == {image["id"]: [zero] if image["id"] == holder else image.get("not_exhaustive_category_ids")
                       for image in document["images"]}  # fmt: skip
    assert all(
        not image.get("not_exhaustive_category_ids") for image in document["images"]
    )  # nothing is changed in place


def test_crowds_go_with_their_images_and_do_not_count() -> None:
    document = make_document([[0, 0], [0, 0], [0, 0]], 1)
    for annotation in document["annotations"][1::2]:
        annotation["iscrowd"] = 1
    part = long_tail_subsample(document, {"class 0": 2})
    assert sum(a.get("iscrowd", 0) == 0 for a in part["annotations"]) == 2
    assert sum(a.get("iscrowd", 0) for a in part["annotations"]) == 2 == len(part["images"])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "either counts"),
        ({"counts": {"class 0": 1}, "imbalance": 3.0}, "either counts"),
        ({"counts": {"clas 1": 1}}, 'did you mean "class 1"'),
        ({"counts": {"class 1": -1}}, 'count of class "class 1" is -1'),
        ({"counts": {"class 1": True}}, "is True"),
        ({"imbalance": 0.5}, "imbalance is 0.5"),
        ({"imbalance": float("nan")}, "imbalance is nan"),
        ({"imbalance": 2.0, "largest": 0}, "largest class count is 0"),
    ],
)
def test_bad_long_tail(options: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        long_tail_subsample(make_document([[0], [1]], 2), **options)


# the command


def _app() -> typer.Typer:
    app = typer.Typer()
    for command in (data_make.synth, data_make.split, data_make.convert, data_make.merge):
        app.command()(command)
    return app


def _run(*arguments: object) -> str:
    result = CliRunner().invoke(_app(), [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    return result.output


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    document = make_document([rng.integers(0, 5, 3).tolist() for _ in range(60)] + [[5]], 6)
    (tmp_path / "all").mkdir()
    (tmp_path / "all.json").write_text(json.dumps(document))
    return tmp_path / "all.json"


def test_command_splits_and_thins(annotations: Path) -> None:
    folder = annotations.parent
    train, val = folder / "train.json", folder / "val.json"
    output = _run("split", annotations, "--val", 0.2, "--out-train", train, "--out-val", val)
    assert "class 5" in output and "6 of 6 classes" in output and "5 of 6 classes" in output
    opened = open_index(train)
    assert len(opened) + len(open_index(val)) == 61
    assert opened.file_name(0).startswith("all/"), "the file names lead from train.json to the pictures"
    with pytest.raises(UserError, match="exists"):
        _run("split", annotations, "--val", 0.2, "--out-train", train, "--out-val", val)

    counts = folder / "counts.yaml"
    counts.write_text("class 0: 3\nclass 1: 2\n")
    _run("split", annotations, "--val", 0.2, "--counts", counts, "--out-train", train, "--out-val", val, "--overwrite")
    thinned, kept = load_document(train), load_document(val)
    assert [c["instance_count"] for c in thinned["categories"]][:2] == [3, 2]
    assert thinned["categories"] == kept["categories"]

    tail = folder / "tail.json"
    output = _run("split", annotations, "--long-tail", "--imbalance", 5, "--out-train", tail)
    instances = [c["instance_count"] for c in load_document(tail)["categories"] if c["instance_count"]]
    assert max(instances) > 4 * min(instances)


def test_command_names_pictures_elsewhere(annotations: Path, tmp_path: Path) -> None:
    out = tmp_path / "away" / "train.json"
    assert str(tmp_path / "all") in _run("split", annotations, "--imbalance", 2, "--out-train", out)
    assert open_index(out).file_name(0) == open_index(annotations).file_name(0)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--out-train", "t.json"], "give --val"),
        (["--out-train", "t.json", "--val", "0.2"], "belong together"),
        (["--out-train", "t.json", "--out-val", "t.json", "--val", "0.2"], "both t.json"),
        (["--out-train", "all.json", "--imbalance", "4", "--overwrite"], "all.json exists"),
        (["--out-train", "t.json", "--counts", "none.yaml"], "none.yaml does not exist"),
        (["--out-train", "t.json", "--counts", "bad.json"], 'bad.json: class "class 0"'),
    ],
)
def test_command_errors(annotations: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], word: str) -> None:
    monkeypatch.chdir(annotations.parent)
    Path("bad.json").write_text('{"class 0": 1.5}')
    with pytest.raises(UserError, match=word):
        _run("split", "all.json", *arguments)
    assert not Path("t.json").exists()


def test_real_file(data_dir: Path) -> None:
    document = load_document(data_dir / "coco-sample" / "train.json")
    train, val = split_train_val(document, 0.25, 0)
    assert absent_classes(document, train) == []
    images, _ = count_classes(document)
    missing = absent_classes(document, val)
    several = {c["name"] for c, n in zip(document["categories"], images, strict=True) if n > 1}
    assert len(several & set(missing)) <= 1 and 18 <= len(val["images"]) <= 30
    fod = load_document(data_dir / "fod31-lt" / "train.json")
    train, val = split_train_val(fod, 0.2, 0)
    assert absent_classes(fod, val) == [] and abs(len(val["images"]) / 3614 - 0.2) < 0.005
