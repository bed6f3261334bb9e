"""The synthetic set: counts, masks, determinism, federated labels, and the demo set's remaking."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from tailfin.data.index import open_index
from tailfin.data.synth import (
    MAX_CLASSES,
    SynthReport,
    demo_set,
    exponential_counts,
    make_synthetic,
    vocabulary,
)
from tailfin.data.synth_shapes import OUTLINES, rasterise
from tailfin.errors import UserError

SMALL = {"images_train": 30, "images_val": 12, "classes": 9, "imbalance": 10.0, "size": 64}


@pytest.mark.parametrize("centre", [(-30.0, 20.0), (20.0, -30.0), (90.0, 20.0), (20.0, 90.0)])
def test_what_lies_beyond_the_border_has_an_empty_window(centre):
    """A stick whose centre is near the border may lie outside with all of its patch."""
    body = rasterise(OUTLINES["disc"], np.eye(2) * 5, np.array(centre), 5.0, None, 64)
    assert np.zeros((64, 64))[body.window].size == body.alpha[body.inside].size == 0
    inner = rasterise(OUTLINES["disc"], np.eye(2) * 5, np.array([1.0, 62.0]), 5.0, None, 64)
    assert np.zeros((64, 64))[inner.window].shape == inner.alpha[inner.inside].shape
    assert 0 < inner.alpha[inner.inside].size < inner.alpha.size


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SynthReport:
    return make_synthetic(tmp_path_factory.mktemp("synth") / "set", **SMALL)


def _read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_files_open_and_counts_are_exact(small: SynthReport) -> None:
    train, val = open_index(small.train), open_index(small.val)
    assert (len(train), len(val)) == (30, 12)
    assert train.names == val.names == small.names == tuple(sorted(small.names))
    counts = np.sort(small.train_instances)[::-1]
    assert counts[0] == 10 * counts[-1]
    if small.hidden == 0:
        assert counts.tolist() == exponential_counts(9, 30 * 3.5, 10).tolist()
    assert np.bincount(train.labels, minlength=9).tolist() == small.train_instances.tolist()
    assert np.bincount(val.labels, minlength=9).tolist() == small.val_instances.tolist()
    assert small.val_instances.max() == round(12 * 3.5 / 9)
    for category, instances in zip(train.categories, small.train_instances, strict=True):
        assert category.instance_count == instances
        assert category.frequency == ("r" if category.image_count <= 10 else "c")
    assert train.categories == val.categories


def test_every_class_in_every_split_and_pictures_there(small: SynthReport) -> None:
    for path in (small.train, small.val):
        document = _read(path)
        assert {a["category_id"] for a in document["annotations"]} == set(range(1, 10))
        for image in document["images"]:
            with Image.open(path.with_suffix("") / image["file_name"]) as picture:
                assert picture.size == (64, 64) and picture.mode == "RGB"


def test_masks_boxes_and_areas_agree(small: SynthReport) -> None:
    polygons = 0
    for annotation in _read(small.train)["annotations"]:
        x, y, width, height = annotation["bbox"]
        assert min(x, y) >= 0 and x + width <= 64.01 and y + height <= 64.01 and min(width, height) > 2
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            polygons += 1
            rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, 64, 64))
        else:
            rle = segmentation
            assert coco_mask.toBbox(rle).tolist() == annotation["bbox"]
        assert coco_mask.area(rle) == pytest.approx(annotation["area"], rel=0.12, abs=8)
        mask = coco_mask.decode(rle)
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert abs(columns[0] - x) <= 1.5 and abs(rows[0] - y) <= 1.5
        assert abs(columns[-1] + 1 - x - width) <= 1.5 and abs(rows[-1] + 1 - y - height) <= 1.5
    assert polygons > 20


def test_masks_of_one_picture_do_not_overlap(small: SynthReport) -> None:
    covered: dict[int, np.ndarray] = {}
    for annotation in _read(small.train)["annotations"]:
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            continue
        mask = coco_mask.decode(segmentation).astype(bool)
        before = covered.setdefault(annotation["image_id"], np.zeros((64, 64), bool))
        assert not (before & mask).any()
        before |= mask
    assert covered


def test_an_object_is_where_its_mask_says(small: SynthReport) -> None:
    """Objects of a plain saturated class have its colour inside their masks, and the ground around has not."""
    document = _read(small.train)
    names = {category["id"]: category["name"] for category in document["categories"]}
    redness = []
    for annotation in document["annotations"]:
        if names[annotation["category_id"]] != "red plain disc":
            continue
        picture = np.asarray(Image.open(small.train.with_suffix("") / f"{annotation['image_id']:06d}.jpg"), float)
        segmentation = annotation["segmentation"]
        if isinstance(segmentation, list):
            segmentation = coco_mask.merge(coco_mask.frPyObjects(segmentation, 64, 64))
        mask = coco_mask.decode(segmentation).astype(bool)
        red = picture[..., 0] - picture[..., 1:].mean(-1)
        redness.append(red[mask].mean() - red[~mask].mean())
    assert len(redness) >= 10 and min(redness) > 25


def test_same_seed_same_bytes_and_other_seed_other(tmp_path: Path, small: SynthReport) -> None:
    again = make_synthetic(tmp_path / "again", **SMALL)
    other = make_synthetic(tmp_path / "other", **SMALL, seed=1)
    for file in sorted(small.train.parent.rglob("*.*")):
        assert file.read_bytes() == (tmp_path / "again" / file.relative_to(small.train.parent)).read_bytes()
    assert again.train.read_bytes() != other.train.read_bytes()
    assert {category["name"] for category in _read(other.train)["categories"]} == set(small.names)


def test_a_picture_depends_on_its_own_key_alone() -> None:
    from tailfin.data.synth_draw import draw_scene

    looks = vocabulary(9)[:3]
    first, _ = draw_scene(np.random.default_rng([5, 0, 3]), looks, 64)
    draw_scene(np.random.default_rng([5, 0, 4]), looks, 64)
    second, drawn = draw_scene(np.random.default_rng([5, 0, 3]), looks, 64)
    assert (first == second).all() and 1 <= len(drawn) <= 3


def test_rare_classes_look_like_frequent_ones() -> None:
    looks = vocabulary(24)
    assert len(set(looks)) == 24
    for rank in range(16, 24):
        twin = looks[rank - 16]
        assert (looks[rank].shape, looks[rank].colour) == (twin.shape, twin.colour)
        assert looks[rank].texture != twin.texture


@pytest.mark.parametrize("classes", [1, 2, 3, 50, 300, MAX_CLASSES])
def test_vocabularies_have_no_doubles(classes: int) -> None:
    assert len({look.name for look in vocabulary(classes)}) == classes


@pytest.mark.parametrize(
    ("classes", "total", "imbalance"), [(24, 2100, 100), (300, 7000, 50), (10, 60, 1), (1, 7, 100), (20, 30, 1000)]
)
def test_exponential_counts(classes: int, total: float, imbalance: float) -> None:
    counts = exponential_counts(classes, total, imbalance)
    assert counts.min() >= 1 and (np.diff(counts) <= 0).all()
    assert abs(counts.sum() - total) <= 0.15 * total + classes
    if counts[-1] > 1 and classes > 1:
        assert counts[0] == round(counts[-1] * imbalance)


def test_federated_labels(tmp_path: Path, small: SynthReport) -> None:
    report = make_synthetic(tmp_path / "fed", **SMALL, federated=True)
    full, part = _read(small.train), _read(report.train)
    assert open_index(report.train).federated and not open_index(report.val).federated
    present: dict[int, dict[int, int]] = {}
    for annotation in full["annotations"]:
        own = present.setdefault(annotation["image_id"], {})
        own[annotation["category_id"]] = own.get(annotation["category_id"], 0) + 1
    labelled: dict[int, dict[int, int]] = {}
    for annotation in part["annotations"]:
        own = labelled.setdefault(annotation["image_id"], {})
        own[annotation["category_id"]] = own.get(annotation["category_id"], 0) + 1
    kept = {annotation["id"] for annotation in part["annotations"]}
    assert kept < {annotation["id"] for annotation in full["annotations"]}
    for image in part["images"]:
        really, said = present[image["id"]], labelled.get(image["id"], {})
        assert len(image["neg_category_ids"]) >= 2
        assert not set(image["neg_category_ids"]) & set(really)
        for category, number in said.items():
            incomplete = number < really[category]
            assert incomplete == (category in image["not_exhaustive_category_ids"])
    rare = {c["id"] for c in full["categories"] if c["frequency"] == "r"}
    assert rare and all(sum(a["category_id"] == c for a in part["annotations"]) > 0 for c in rare), (
        "a rare class keeps its labels"
    )
    for category in part["categories"]:
        assert category["instance_count"] == sum(a["category_id"] == category["id"] for a in part["annotations"])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"classes": 0}, "classes is 0"),
        ({"classes": MAX_CLASSES + 1}, "classes is"),
        ({"imbalance": 0.5}, "imbalance is 0.5"),
        ({"imbalance": float("nan")}, "imbalance is nan"),
        ({"size": 8}, "size is 8"),
        ({"images_val": 0}, "images_val is 0"),
        ({"images_train": 2}, "9 classes need at least one each"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_impossible_settings(tmp_path: Path, change: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        make_synthetic(tmp_path / "set", **{**SMALL, **change})
    assert not list(tmp_path.iterdir())


def test_existing_folder_is_kept_without_overwrite(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        make_synthetic(tmp_path / "set", **SMALL)
    assert [p.name for p in tmp_path.rglob("*")] == ["set", "mine.txt"]
    make_synthetic(tmp_path / "set", **SMALL, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["train", "train.json", "val", "val.json"]


def test_working_directory_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for target in (".", tmp_path.parent):
        with pytest.raises(UserError, match="working directory"):
            make_synthetic(target, **SMALL, overwrite=True)
    assert not list(tmp_path.iterdir())


def test_interruption_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_synthetic(tmp_path / "set", **SMALL, progress=stop)
    assert not list(tmp_path.iterdir())


def test_demo_set_is_made_once_and_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tailfin.data import synth

    real, calls = make_synthetic, []

    def quick(folder: Path, **options: Any) -> SynthReport:
        calls.append(folder)
        return real(folder, **SMALL, **options)

    settings = {**synth._DEMO_SETTINGS, **SMALL}
    monkeypatch.setattr(synth, "make_synthetic", quick)
    monkeypatch.setattr(synth, "_DEMO_SETTINGS", settings)
    folder = tmp_path / "demo"
    train, val = demo_set(folder)
    assert train.is_file() and val.is_file() and len(calls) == 1
    assert demo_set(folder) == (train, val) and len(calls) == 1
    (folder / "val" / "000003.jpg").unlink()
    demo_set(folder)
    assert len(calls) == 2 and (folder / "val" / "000003.jpg").is_file()
    monkeypatch.setattr(synth, "_DEMO_SETTINGS", {**settings, "version": -1})
    demo_set(folder)
    assert len(calls) == 3
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="other files"):
        demo_set(folder)
    assert (folder / "notes.txt").is_file()


def test_default_settings_are_a_long_tail() -> None:
    from tailfin.data.synth import _DEMO_SETTINGS as demo

    counts = exponential_counts(demo["classes"], demo["images_train"] * demo["objects"], demo["imbalance"])
    assert demo["classes"] >= 24 and 3 <= counts[-1] <= 10 and counts[0] == 100 * counts[-1]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tailfin.cli import data_make

    data_make.synth(tmp_path / "set", images=12, val_images=6, classes=6, imbalance=4, size=48, federated=True)
    output = capsys.readouterr().out
    assert "12 pictures" in output and "6 classes" in output and "4 per class" in output
    assert open_index(tmp_path / "set" / "train.json").federated
