"""COCO-LT: pairs of picture and class by counts or by a list, and the command that writes them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.cli.main import main
from tailfin.data.coco_lt import COUNTS, choose_listed, choose_pairs, coco_counts, kept_document
from tailfin.data.document import count_classes, positions
from tailfin.errors import UserError
from tailfin.stats import ClassStats


def made(images: int, objects: list[tuple[int, int, int]], names: list[str]) -> dict:
    """A document with `objects`: (image position, category position, how many)."""
    annotations = [
        {"image_id": 10 + image, "category_id": 2 * label + 1, "bbox": [1, 1, 8, 8], "area": 64, "iscrowd": 0}
        for image, label, many in objects
        for _ in range(many)
    ]
    return {
        "info": {"kept": True},
        "images": [{"id": 10 + n, "file_name": f"{n}.png", "width": 20, "height": 20} for n in range(images)],
        "annotations": [{"id": number, **entry} for number, entry in enumerate(annotations, start=1)],
        "categories": [{"id": 2 * n + 1, "name": name} for n, name in enumerate(names)],
    }


def drawn(seed: int, images: int = 60, classes: int = 5) -> dict:
    rng = np.random.default_rng(seed)
    pairs = rng.random((images, classes)) < 0.4
    objects = [(int(i), int(c), int(rng.integers(1, 5))) for i, c in np.argwhere(pairs)]
    return made(images, objects, [f"class {n}" for n in range(classes)])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 80), min_size=5, max_size=5), st.integers(0, 3))
def test_pairs_are_whole_and_counts_are_met_or_explained(seed, wanted, draw):
    document, wanted = drawn(seed), np.array(wanted)
    keep, lacking = choose_pairs(document, wanted, draw)
    image_of, category_of = positions(document)
    found = np.bincount(category_of[keep], minlength=5)
    np.testing.assert_array_equal(found + lacking, wanted)
    for label in range(5):
        own = category_of == label
        for image in np.unique(image_of[own]):
            pair = own & (image_of == image)
            assert keep[pair].all() or not keep[pair].any()
            if not keep[pair].any():  # nothing that fits was left out
                assert pair.sum() > lacking[label] or own.sum() <= wanted[label]
    again, _ = choose_pairs(document, wanted, draw)
    np.testing.assert_array_equal(keep, again)


def test_rare_classes_choose_first_and_others_go_where_they_are():
    # class 0 is in pictures 0..4, class 1 in all ten
    document = made(10, [*((n, 0, 1) for n in range(5)), *((n, 1, 1) for n in range(10))], ["rare", "common"])
    keep, lacking = choose_pairs(document, np.array([2, 4]), seed=3)
    image_of, category_of = positions(document)
    pictures = [set(image_of[keep & (category_of == label)].tolist()) for label in (0, 1)]
    assert not lacking.any() and (len(pictures[0]), len(pictures[1])) == (2, 4)
    assert pictures[0] < pictures[1]
    others = [choose_pairs(document, np.array([2, 4]), seed=seed)[0] for seed in range(6)]
    assert len({tuple(other) for other in others}) > 1


def test_by_list():
    document = drawn(1)
    image_of, category_of = positions(document)
    ids = np.array([image["id"] for image in document["images"]])[image_of]
    np.testing.assert_array_equal(choose_listed(document, [10, 12]), np.isin(ids, [10, 12]))
    keep = choose_listed(document, {"class 1": [10, 11, 12], "class 4": [11]})
    wanted = (category_of == 1) & np.isin(ids, [10, 11, 12]) | (category_of == 4) & (ids == 11)
    np.testing.assert_array_equal(keep, wanted)
    with pytest.raises(UserError, match="list: image id 9 is not"):
        choose_listed(document, [10, 9])
    with pytest.raises(UserError, match=r'no class "class 9" \(did you mean'):
        choose_listed(document, {"class 9": [10]})


def test_what_is_kept():
    document = drawn(2)
    keep, _ = choose_pairs(document, np.array([3, 6, 9, 12, 15]))
    result = kept_document(document, keep)
    assert result["info"] == {"kept": True}
    assert {a["image_id"] for a in result["annotations"]} == {image["id"] for image in result["images"]}
    assert len(kept_document(document, keep, keep_empty=True)["images"]) == 60
    images, instances = count_classes(result)
    assert [c["instance_count"] for c in result["categories"]] == instances.tolist()
    assert [c["image_count"] for c in result["categories"]] == images.tolist()


def test_the_released_counts():
    assert len(COUNTS) == 80 and sum(COUNTS.values()) == 666_493
    counts = np.array(list(COUNTS.values()))
    assert np.histogram(counts, [0, 20, 400, 8000, 10**9])[0].tolist() == [4, 24, 32, 20]
    assert coco_counts({"categories": [{"name": name} for name in COUNTS]}) == COUNTS
    with pytest.raises(UserError, match='"shape" is none of them'):
        coco_counts({"categories": [{"name": "shape"}]})


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, monkeypatch):
    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tailfin", "data", "coco-lt", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        said = capsys.readouterr()
        return int(end.value.code or 0), said.out, said.err

    return call


@pytest.fixture
def whole(tmp_path) -> Path:
    """Two classes at the edge of COCO-LT's groups, and a large one."""
    objects = [*((n, 0, 1) for n in range(30)), *((n, 1, 1) for n in range(40)), *((n, 2, 10) for n in range(45))]
    path = tmp_path / "train.json"
    path.write_text(json.dumps(made(50, objects, ["19", "20", "400"])))
    return path


def test_command(run, whole, tmp_path):
    counts, out = tmp_path / "counts.yaml", tmp_path / "lt.json"
    counts.write_text("'19': 19\n'20': 20\n'400': 400\n")
    code, said, err = run(whole, "--out", out, "--counts", counts)
    assert code == 0, err
    assert "439 objects, 3 of 3 classes" in said
    assert "1 in [0,20), 1 in [20,400), 1 in [400,8000), 0 in [8000,inf); 400 to 19 per class" in said
    assert ClassStats.from_json(out).instance_count.tolist() == [19, 20, 400]
    first = out.read_bytes()
    assert run(whole, "--out", out, "--counts", counts)[0] == 2  # exists
    assert run(whole, "--out", out, "--counts", counts, "--overwrite")[0] == 0 and out.read_bytes() == first

    code, said, _ = run(whole, "--out", tmp_path / "tail.json", "--imbalance", 9, "--largest", 95)
    assert code == 0 and ClassStats.from_json(tmp_path / "tail.json").instance_count.tolist() == [11, 32, 90]
    assert "1 classes have fewer annotations than wanted, by: 400 5" in said

    listed = tmp_path / "ids.txt"
    listed.write_text("10\n11\n")
    assert run(whole, "--out", tmp_path / "two.json", "--image-ids", listed)[0] == 0
    assert ClassStats.from_json(tmp_path / "two.json").instance_count.tolist() == [2, 2, 20]
    by_class = tmp_path / "pairs.json"
    by_class.write_text('{"19": [10], "400": [11]}')
    assert run(whole, "--out", tmp_path / "pair.json", "--image-ids", by_class)[0] == 0
    assert ClassStats.from_json(tmp_path / "pair.json").instance_count.tolist() == [1, 0, 10]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COCO-LT's counts are those of COCO's 80 classes"),
        (["--imbalance", 9, "--counts", "x.yaml"], "--counts and --imbalance exclude each other"),
        (["--largest", 9], "--largest belongs to --imbalance"),
        (["--image-ids", "BAD"], "'x' is no image id"),
    ],
)
def test_mistakes(run, whole, tmp_path, words, message):
    bad = tmp_path / "bad.txt"
    bad.write_text("10 x")
    out = tmp_path / "lt.json"
    code, _, err = run(whole, "--out", out, *(bad if word == "BAD" else word for word in words))
    assert code == 2 and message in err and "Traceback" not in err
    assert not out.exists()
