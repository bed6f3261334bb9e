"""The annotation index: columns equal to the file, caching, memory, pickling, masks, both LVIS versions."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools.coco import COCO

from tailfin.data import cache
from tailfin.data.index import AnnotationIndex, image_folder, open_index
from tailfin.errors import UserError


def write(path: Path, value: Any) -> Path:
    path.write_text(json.dumps(value))
    return path


def small() -> dict[str, Any]:
    """Ids with gaps and out of order, an empty image, a crowd, boxes over the border and without area."""
    return {
        "images": [
            {"id": 20, "width": 100, "height": 80, "file_name": "b/ü.jpg"},
            {"id": 5, "width": 50, "height": 40, "file_name": "a.jpg"},
            {"id": 9, "width": 10, "height": 10, "file_name": "c.png"},
        ],
        "categories": [
            {"id": 7, "name": "seven"},
            {"id": 2, "name": "two", "frequency": "r"},
            {"id": 4, "name": "four"},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 7, "bbox": [1.25, 2, 10, 10.5], "area": 50},
            {"id": 2, "image_id": 20, "category_id": 2, "bbox": [90, 70, 20, 20], "iscrowd": 0},
            {"id": 3, "image_id": 5, "category_id": 2, "bbox": [3, 3, 0, 5]},
            {"id": 4, "image_id": 20, "category_id": 2, "bbox": [0, 0, 100, 80], "iscrowd": 1, "area": None},
        ],
    }


def test_columns_are_those_of_the_file(tmp_path: Path) -> None:
    index = open_index(write(tmp_path / "train.json", small()))
    assert len(index) == 3
    assert index.image_ids.tolist() == [20, 5, 9]
    assert index.offsets.tolist() == [0, 2, 4, 4]
    assert index.annotation_ids.tolist() == [2, 4, 1, 3]  # by image, file order within
    assert index.image_of.tolist() == [0, 0, 1, 1]
    assert index.names == ("two", "four", "seven")
    assert index.category_ids.tolist() == [2, 4, 7]
    assert index.labels.tolist() == [0, 0, 2, 0]
    assert index.boxes[2].tolist() == [1.25, 2, 10, 10.5]
    assert index.areas.tolist() == [400, 8000, 50, 0]
    assert index.crowd.tolist() == [False, True, False, False]
    assert [index.file_name(i) for i in range(3)] == ["b/ü.jpg", "a.jpg", "c.png"] and index.file_name(-1) == "c.png"
    assert not index.federated and index.exhaustive.all()
    assert index.categories[0].frequency == "r" and index.categories[1].frequency is None
    dtypes = {name: getattr(index, name).dtype.name for name in ("image_ids", "widths", "offsets", "labels", "boxes")}
    expected = {"image_ids": "int64", "widths": "int32", "offsets": "int64", "labels": "int32", "boxes": "float64"}
    assert dtypes == expected
    with pytest.raises(IndexError):
        index.file_name(3)


def test_training_view_clips_drops_and_counts(tmp_path: Path) -> None:
    clean = open_index(write(tmp_path / "train.json", small())).clean()
    assert clean.boxes.tolist() == [[90, 70, 100, 80], [1.25, 2, 11.25, 12.5]]
    assert clean.boxes.dtype == np.float32
    assert clean.rows.tolist() == [0, 2] and clean.offsets.tolist() == [0, 1, 2, 2]
    assert (clean.dropped, clean.clipped, clean.crowd) == (1, 1, 1)


@pytest.mark.parametrize("name", ["coco-sample/train", "fod31-lt/val", "lvis-sample/val_100_annotations_only"])
def test_real_files_agree_with_json(data_dir: Path, name: str) -> None:
    path = data_dir / f"{name}.json"
    index, document = open_index(path), json.loads(path.read_text())
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in document["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    order = [annotation for image in document["images"] for annotation in by_image.get(image["id"], [])]
    ids = sorted(category["id"] for category in document["categories"])
    assert index.annotation_ids.tolist() == [annotation["id"] for annotation in order]
    assert index.boxes.tolist() == [annotation["bbox"] for annotation in order]
    assert index.areas.tolist() == [annotation["area"] for annotation in order]
    assert [ids[label] for label in index.labels] == [annotation["category_id"] for annotation in order]
    assert index.widths.tolist() == [image["width"] for image in document["images"]]
    assert [index.file_name(i) for i in range(len(index))] == [image["file_name"] for image in document["images"]]
    for i, image in enumerate(document["images"]):
        negatives = index.neg_labels[index.neg_offsets[i] : index.neg_offsets[i + 1]]
        assert [ids[label] for label in negatives] == image.get("neg_category_ids", [])
        partial = index.not_exhaustive_labels[index.not_exhaustive_offsets[i] : index.not_exhaustive_offsets[i + 1]]
        assert [ids[label] for label in partial] == image.get("not_exhaustive_category_ids", [])
    assert index.federated == ("lvis" in name)


def test_lvis_image_without_file_name_uses_its_url(tmp_path: Path) -> None:
    document = small()
    for image in document["images"]:
        del image["file_name"]
        image["coco_url"] = f"http://images.cocodataset.org/train2017/{image['id']:012d}.jpg"
    document["images"][1]["neg_category_ids"] = [7, 2]
    index = open_index(write(tmp_path / "lvis.json", document))
    assert index.file_name(0) == "train2017/000000000020.jpg"
    assert index.federated and index.exhaustive.tolist() == [True, False, True]
    assert index.neg_labels.tolist() == [2, 0] and index.neg_offsets.tolist() == [0, 0, 2, 2]


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    image_ids = draw(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6, unique=True))
    category_ids = draw(st.lists(st.integers(0, 2000), min_size=1, max_size=5, unique=True))
    number = st.floats(-50, 150, width=32)
    size = st.floats(0, 150, width=32)
    rows = draw(
        st.lists(
            st.tuples(
                st.sampled_from(image_ids), st.sampled_from(category_ids), number, number, size, size, st.booleans()
            ),
            max_size=12,
        )
    )
    return {
        "box_form": "xywh",  # however odd they look
        "images": [{"id": i, "width": 100, "height": 60, "file_name": f"{i}.jpg"} for i in image_ids],
        "categories": [{"id": c, "name": f"n{c}"} for c in category_ids],
        "annotations": [
            {"id": k, "image_id": i, "category_id": c, "bbox": [x, y, w, h], "iscrowd": int(crowd)}
            for k, (i, c, x, y, w, h, crowd) in enumerate(rows)
        ],
    }


@settings(max_examples=60, deadline=None)
@given(document=documents())
def test_any_valid_file_opens_and_its_training_view_is_sound(
    document: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = write(tmp_path_factory.mktemp("any") / "any.json", document)
    index = open_index(path, cache=False)
    by_id = {annotation["id"]: annotation for annotation in document["annotations"]}
    assert sorted(index.annotation_ids.tolist()) == sorted(by_id)
    for row, number in enumerate(index.annotation_ids.tolist()):
        annotation = by_id[number]
        assert index.image_ids[index.image_of[row]] == annotation["image_id"]
        assert index.category_ids[index.labels[row]] == annotation["category_id"]
        assert index.boxes[row].tolist() == annotation["bbox"]
        assert index.offsets[index.image_of[row]] <= row < index.offsets[index.image_of[row] + 1]
    clean = index.clean()
    assert len(clean.rows) + clean.dropped + clean.crowd == len(by_id)
    assert (clean.boxes[:, 2:] > clean.boxes[:, :2]).all()
    assert (clean.boxes >= 0).all() and (clean.boxes[:, [0, 2]] <= 100).all() and (clean.boxes[:, [1, 3]] <= 60).all()
    assert not index.crowd[clean.rows].any()
    assert np.array_equal(np.diff(clean.offsets), np.bincount(index.image_of[clean.rows], minlength=len(index)))


# ---- cache -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TAILFIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_reopen_maps_and_does_not_parse(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "train.json", small())
    first = open_index(path)
    assert first._bundle.file is not None and first._bundle.file.parent == own_cache
    monkeypatch.setattr("tailfin.data.index.parse", lambda path: pytest.fail("parsed again"))
    again = open_index(path)
    assert again.boxes.tolist() == first.boxes.tolist() and again.categories == first.categories
    assert again.fingerprint == first.fingerprint
    with pytest.raises(ValueError):
        again.boxes[0] = 1  # mapped read-only: workers share it


def test_changed_file_is_parsed_again_and_old_columns_go(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "train.json", small())
    before = open_index(path)
    status = path.stat()
    changed = path.read_text().replace('"bbox": [90, 70', '"bbox": [91, 70')
    path.write_text(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # same size, same time: the samples tell
    after = open_index(path)
    assert after.boxes[0, 0] == 91 and after.fingerprint != before.fingerprint
    assert before.boxes[0, 0] == 90  # still mapped
    assert len(list(own_cache.glob("*.index"))) == 1


def test_damaged_columns_are_made_anew(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "train.json", small())
    file = open_index(path)._bundle.file
    assert file is not None
    whole = file.read_bytes()
    for broken in (b"", whole[:20], whole[:-8], b"\xff" * 64):
        file.write_bytes(broken)
        assert open_index(path).labels.tolist() == [0, 0, 2, 0]
    assert len(file.read_bytes()) == len(whole)


def test_unwritable_cache_works_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    monkeypatch.setenv("TAILFIN_CACHE", str(blocked))
    index = open_index(write(tmp_path / "train.json", small()))
    assert index._bundle.file is None and len(index.labels) == 4
    copy = pickle.loads(pickle.dumps(index))
    assert copy.boxes.tolist() == index.boxes.tolist() and copy.file_name(0) == "b/ü.jpg"


def test_same_content_has_the_same_fingerprint(tmp_path: Path) -> None:
    first = open_index(write(tmp_path / "one.json", small()))
    assert open_index(write(tmp_path / "two.json", small())).fingerprint == first.fingerprint


def test_pickle_carries_no_columns(data_dir: Path) -> None:
    index = open_index(data_dir / "fod31-lt" / "train.json")
    clean = index.clean()
    assert len(pickle.dumps(index)) < 1000 and len(pickle.dumps(clean)) < 1500
    assert len(pickle.dumps(open_index(data_dir / "coco-sample/train.json").segmentations())) < 1000
    copy, clean_copy = pickle.loads(pickle.dumps((index, clean)))
    assert np.array_equal(copy.boxes, index.boxes) and np.array_equal(clean_copy.rows, clean.rows)


def test_unpickling_after_the_columns_are_gone(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "train.json", small())
    packed = pickle.dumps(open_index(path))
    for file in own_cache.iterdir():
        file.unlink()
    assert pickle.loads(packed).labels.tolist() == [0, 0, 2, 0]
    for file in own_cache.iterdir():
        file.unlink()
    write(path, {**small(), "annotations": []})
    with pytest.raises(UserError, match="has changed while it was in use"):
        pickle.loads(packed)


def test_processes_may_race(tmp_path: Path, own_cache: Path) -> None:
    path = write(tmp_path / "train.json", small())
    script = (
        "import sys; from tailfin.data.index import open_index; "
        "print(*[open_index(sys.argv[1]).boxes.sum() for _ in range(5)])"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    outputs = {run.communicate(timeout=120)[0] for run in runs}
    assert all(run.returncode == 0 for run in runs)
    assert len(outputs) == 1 and outputs.pop().split() == [str(open_index(path).boxes.sum())] * 5
    assert [file.suffix for file in own_cache.iterdir()] == [".index"]  # no temporary file stays behind


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAILFIN_CACHE", "/somewhere/own")
    assert cache.folder() == Path("/somewhere/own")
    monkeypatch.delenv("TAILFIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/shared")
    assert cache.folder() == Path("/somewhere/shared/tailfin")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache.folder() == Path("/home/someone/.cache/tailfin")


# ---- categories, folders, masks --------------------------------------------------------------------------------------


def test_same_categories_is_by_name_and_order(tmp_path: Path) -> None:
    document = small()
    index = open_index(write(tmp_path / "a.json", document))
    shifted = {
        **document,
        "categories": [{"id": c["id"] + 1, "name": c["name"]} for c in document["categories"]],
        "annotations": [],
    }
    assert index.same_categories(open_index(write(tmp_path / "b.json", shifted)))
    assert index.same_categories(["two", "four", "seven"])
    assert not index.same_categories(["two", "seven", "four"])
    assert not index.same_categories(["two", "four"])


def test_image_folder_rule(tmp_path: Path) -> None:
    path = write(tmp_path / "train.json", small())
    assert image_folder(path) == tmp_path
    (tmp_path / "train").mkdir()
    assert image_folder(path) == tmp_path / "train"
    assert image_folder(path, tmp_path) == tmp_path
    with pytest.raises(UserError, match="nowhere does not exist"):
        image_folder(path, tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train\.json is a file"):
        image_folder(path, path)


@pytest.mark.parametrize("name", ["coco-sample/train", "lvis-sample/val", "road12-masks-lt/val"])
def test_masks_equal_pycocotools(data_dir: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = data_dir / f"{name}.json"
    index, reference = open_index(path), COCO(str(path))
    capsys.readouterr()
    parts = index.segmentations()
    for image in range(min(len(index), 60)):
        masks = parts.image_masks(image)
        assert masks.shape == (np.diff(index.offsets)[image], index.heights[image], index.widths[image])
        assert masks.dtype == np.uint8 and masks.flags.c_contiguous
        for mask, row in zip(masks, range(index.offsets[image], index.offsets[image + 1]), strict=True):
            assert np.array_equal(mask, reference.annToMask(reference.anns[int(index.annotation_ids[row])]))


def test_masks_of_every_kind(tmp_path: Path) -> None:
    document = small()
    first, second, third, fourth = document["annotations"]
    first["segmentation"] = {"size": [40, 50], "counts": [0, 40, 1960]}  # the first column
    second["segmentation"] = [[0, 0, 10, 0, 10, 10, 0, 10], [5, 5, 6, 6]]  # the second part has no area
    third["segmentation"] = []
    index = open_index(write(tmp_path / "train.json", document))
    parts = index.segmentations()
    assert parts.kinds.tolist() == [1, 0, 2, 0]
    assert [part.tolist() for part in parts.polygons(0)] == [[0, 0, 10, 0, 10, 10, 0, 10]]
    assert parts.masks([0])[0, :10, :10].all() and parts.masks([0]).sum() == 100
    column = parts.masks([2, 3])
    assert column.shape == (2, 40, 50) and column[0, :, 0].all() and column.sum() == 40
    assert parts.masks([], image=2).shape == (0, 10, 10)
    with pytest.raises(ValueError, match="several images"):
        parts.masks([0, 2])


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ("polygon", "a list of polygons"),
        ([1, 2, 3, 4, 5, 6], "a list of polygons"),
        ([[1, 2, 3, 4, 5, 6, 7]], "odd number of coordinates"),
        ({"size": [40, 51], "counts": [2040]}, "size"),
        ({"size": [40, 50], "counts": [1, 2]}, "do not add up"),
        ({"size": [40, 50], "counts": [3000, -1000]}, "do not add up"),
        ({"size": [40, 50], "counts": "oooooooo"}, "do not add up"),
        ({"size": [40, 50], "counts": "é"}, "no COCO RLE"),
    ],
)
def test_malformed_segmentation_names_the_annotation(tmp_path: Path, segmentation: Any, message: str) -> None:
    document = small()
    document["annotations"][0]["segmentation"] = segmentation
    index = open_index(write(tmp_path / "train.json", document))  # boxes alone do not care
    with pytest.raises(UserError, match=rf"train\.json: annotation 1: segmentation: .*{message}"):
        index.segmentations()


@settings(max_examples=60, deadline=None)
@given(
    mask=st.lists(st.booleans(), min_size=1, max_size=120),
    height=st.integers(1, 12),
)
def test_compressed_run_lengths_add_up(mask: list[bool], height: int) -> None:
    from pycocotools import mask as coco_mask

    from tailfin.data.masks import _run_lengths

    width = -(-len(mask) // height)
    pixels = np.zeros(height * width, np.uint8)
    pixels[: len(mask)] = mask
    encoded = coco_mask.encode(np.asfortranarray(pixels.reshape(height, width)))
    lengths = _run_lengths(encoded["counts"])
    assert lengths is not None and sum(lengths) == height * width and min(lengths) >= 0
    assert sum(lengths[1::2]) == pixels.sum()


def test_repr_is_short(tmp_path: Path) -> None:
    text = repr(open_index(write(tmp_path / "train.json", small())))
    assert "3 images, 4 annotations, 3 categories" in text and AnnotationIndex.__name__ in text
