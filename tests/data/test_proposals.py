"""Sources of proposals: files of any program, the annotations, detectors; and the command that writes them."""

from __future__ import annotations

import json
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import box_iou
from typer.testing import CliRunner

from tailfin.cli.main import app
from tailfin.data import proposal_files
from tailfin.data import proposals as proposals_module
from tailfin.data.dataset import Source, open_source
from tailfin.data.index import open_index
from tailfin.data.proposal_files import read_proposals, write_proposals
from tailfin.data.proposals import jittered_truth, open_proposals, selective_search, usable
from tailfin.errors import UserError
from tailfin.propose import Found, average_recall, propose
from tailfin.schema.data import DataFiles
from tailfin.schema.pretraining import Proposals

PICTURE = torch.zeros((3, 60, 80), dtype=torch.uint8)
TRUTH = np.array([[5, 5, 30, 25], [40, 20, 70, 55]], dtype=np.float32)


@pytest.fixture
def source(tiny_set) -> Source:
    return open_source(DataFiles(annotations=str(tiny_set[0])), "", "train")


def columns(index, per_image: int = 12, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Random boxes for every image but the first: image ids, offsets, boxes, scores (descending)."""
    rng = np.random.default_rng(seed)
    ids = np.sort(index.image_ids)[1:]
    sides = np.stack([index.widths, index.heights], axis=1)[np.argsort(index.image_ids)][1:].repeat(per_image, 0)
    corners = np.sort(rng.random((len(sides), 2, 2)), axis=1) * sides[:, None]
    scores = -np.sort(-rng.random((len(ids), per_image)), axis=1)
    offsets = np.arange(len(ids) + 1) * per_image
    return ids, offsets, corners.reshape(-1, 4).astype(np.float32), scores.reshape(-1).astype(np.float32)


# ---- the annotations -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), objects=st.integers(0, 20), jitter=st.sampled_from([0.0, 0.25, 0.8]))
@settings(max_examples=60, deadline=None)
def test_jittered_annotations(seed, objects, jitter):
    rng = np.random.default_rng(seed)
    corners = rng.random((objects, 2)) * (50, 30)
    truth = np.concatenate([corners, corners + 8 + rng.random((objects, 2)) * 20], axis=1).astype(np.float32)
    config = Proposals(source="gt_jitter", jitter=jitter, random=0.25)
    boxes = jittered_truth(truth, (60, 80), config, np.random.default_rng([seed, 1]))
    again = jittered_truth(truth, (60, 80), config, np.random.default_rng([seed, 1]))
    assert np.array_equal(boxes, again) and boxes.dtype == np.float32
    assert len(boxes) >= (8 if jitter < 0.5 else 4)
    assert (boxes >= 0).all() and (boxes[:, 2:] <= (80, 60)).all() and (boxes[:, 2:] - boxes[:, :2] >= 1).all()
    if jitter == 0 and objects:
        copies = boxes[: 2 * max(8, objects) - round(0.5 * max(8, objects))]
        distance = np.abs(copies[:, None] - truth[None]).max(axis=2).min(axis=1)
        assert np.sort(distance)[: len(copies) // 2].max() < 1e-3


def test_sources_without_a_file(source):
    rng = np.random.default_rng
    gt = open_proposals(Proposals(source="gt"), source).boxes(0, TRUTH, PICTURE, rng(0))
    assert np.array_equal(gt, TRUTH)
    jittered = open_proposals(Proposals(source="gt_jitter"), source)
    one, two = (jittered.boxes(0, TRUTH, PICTURE, rng(seed)) for seed in (1, 2))
    assert len(one) == len(two) == 8 and not np.array_equal(one, two)
    assert np.array_equal(one, jittered.boxes(0, TRUTH, PICTURE, rng(1)))
    assert len(jittered.boxes(0, TRUTH[:0], PICTURE, rng(0))) == 8  # a picture without objects: random places
    few = open_proposals(Proposals(source="gt", per_image=1), source).boxes(0, TRUTH, PICTURE, rng(0))
    assert len(few) == 1 and few[0].tolist() in TRUTH.tolist()


def test_fallback(source):
    def count(**options) -> int:
        return len(open_proposals(Proposals(source="gt", **options), source).boxes(0, TRUTH, PICTURE, rng()))

    rng = lambda: np.random.default_rng(0)  # noqa: E731
    assert count() == 2
    assert count(fallback_below=3) == 8
    assert count(fallback_below=3, fallback="none") == 2
    none = open_proposals(Proposals(source="gt", fallback="none"), source).boxes(0, TRUTH[:0], PICTURE, rng())
    assert none.shape == (0, 4)


def test_bounds():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 40, 10], [0, 0, 80, 60], [0, 0, 30, 3]], dtype=np.float32)

    def kept(**options) -> list[int]:
        left = usable(boxes, (60, 80), Proposals(**options))
        return [int(np.flatnonzero((boxes == box).all(axis=1))[0]) for box in left]

    assert kept() == [0, 1, 2, 3]
    assert kept(min_side=5) == [0, 1, 2]
    assert kept(max_aspect=3) == [0, 2]
    assert kept(size=(0.2, 0.8)) == [1]
    with pytest.raises(ValueError, match="at least 1"):
        Proposals(max_aspect=0.5)
    with pytest.raises(ValueError, match="smaller, larger"):
        Proposals(size=(0.8, 0.3))


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["npz", "json"])
def test_files_round_trip(source, tmp_path, suffix):
    index = source.index
    ids, offsets, boxes, scores = columns(index)
    path = tmp_path / f"p.{suffix}"
    write_proposals(path, ids, offsets, boxes, scores, "localizer abc")
    for _ in range(2):  # parsed, then mapped
        stored = read_proposals(path, index)
        assert stored.made_by == ("localizer abc" if suffix == "npz" else "")
        for number, image_id in enumerate(ids.tolist()):
            row = int(np.flatnonzero(index.image_ids == image_id)[0])
            assert np.abs(stored.of(row) - boxes[offsets[number] : offsets[number + 1]]).max() < 2e-3
        assert len(stored.of(int(np.flatnonzero(index.image_ids == index.image_ids.min())[0]))) == 0
    copy = pickle.loads(pickle.dumps(stored))
    assert all(np.array_equal(copy.of(row), stored.of(row)) for row in range(len(index)))


def test_a_file_in_any_order_is_sorted_by_image_and_score(source, tmp_path):
    index = source.index
    ids, offsets, boxes, scores = columns(index)
    path = tmp_path / "p.json"
    write_proposals(path, ids, offsets, boxes, scores, "")
    entries = json.loads(path.read_text())
    np.random.default_rng(0).shuffle(entries)
    shuffled = tmp_path / "q.json"
    shuffled.write_text(json.dumps(entries))
    one, two = read_proposals(path, index), read_proposals(shuffled, index)
    assert all(np.array_equal(one.of(row), two.of(row)) for row in range(len(index)))
    best = Proposals(source="file", file=str(shuffled), top=3)
    drawn = open_proposals(best, source).boxes(4, TRUTH, PICTURE, np.random.default_rng(0))
    assert np.array_equal(drawn, one.of(4)[:3])


def test_images_that_a_file_lacks_take_the_fallback(source, tmp_path):
    path = tmp_path / "p.npz"
    write_proposals(path, *columns(source.index), "localizer abc")
    given_file = open_proposals(Proposals(source="file", file=path.name), source, tmp_path)
    lacking = int(np.argmin(source.index.image_ids))
    assert len(given_file.boxes(lacking, TRUTH, PICTURE, np.random.default_rng(0))) == 8
    assert len(given_file.boxes(3, TRUTH, PICTURE, np.random.default_rng(0))) == 8
    assert open_proposals(Proposals(source="rpn", file=str(path)), source).stored is not None


def entry(**changes) -> dict:
    return {"image_id": 101, "category_id": 1, "bbox": [1, 2, 10, 10], "score": 0.5, **changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("[{", "is not valid JSON"),
        ([entry(bbox=[1, 2, 3])], "bbox"),
        ([entry(bbox=[1, 2, 3, 4, 5])], "bbox has more than four numbers"),
        ([entry(bbox=[1, 2, -3, 4])], "negative width or height"),
        ([entry(bbox=[1, 2, None, 4])], "not a finite number"),
        ([{"bbox": [1, 2, 3, 4]}], "image_id"),
        ([entry(image_id=7)], "holds proposals of other pictures: its first image id 7 is not in"),
        ([], "holds no proposal"),
        ([entry(bbox=[1, 2, 500, 10])], "image id 101 has a box [1.0, 2.0, 501.0, 12.0] (left, top, right, bottom)"),
    ],
)
def test_unusable_json(source, tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as error:
        read_proposals(path, source.index)
    assert message in str(error.value) and str(path) in str(error.value)


def test_json_whose_file_names_contradict_its_ids_is_refused(source, tmp_path):
    path, index = tmp_path / "p.json", source.index
    names = [index.file_name(row) for row in range(2)]
    for name, right in ((f"elsewhere/{names[0]}", True), (names[1], False)):
        entry = {"image_id": int(index.image_ids[0]), "bbox": [1, 1, 4, 4], "score": 0.5, "file_name": name}
        path.write_text(json.dumps([entry]))
        for _ in range(2):  # the second time from the cache
            if right:
                assert read_proposals(path, index).counts.tolist()[0] == 1
                continue
            with pytest.raises(UserError, match=f"is {names[0]} in .*, the entry says {names[1]}: the ids are those"):
                read_proposals(path, index)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "lacks the array scores"),
        ({"offsets": np.array([0, 2])}, "offsets from 0 to N"),
        ({"boxes": np.zeros((3, 5))}, "boxes [N, 4]"),
        ({"boxes": np.full((3, 4), np.nan)}, "not a finite number"),
        ({"boxes": np.tile([9.0, 9, 2, 2], (3, 1))}, "box 0 has a negative width or height"),
    ],
)
def test_unusable_npz(source, tmp_path, changes, message):
    values = {
        "image_ids": np.array([101]),
        "offsets": np.array([0, 3]),
        "boxes": np.tile([1.0, 1, 5, 5], (3, 1)),
        "scores": np.ones(3),
        **changes,
    }
    path = tmp_path / "p.npz"
    np.savez(path, **{name: value for name, value in values.items() if value is not None})
    with pytest.raises(UserError, match=str(path)) as error:
        read_proposals(path, source.index)
    assert message in str(error.value)


# ---- instances of the dynamic sampler --------------------------------------------------------------------------------


def counted_one_by_one(index, stored, config: Proposals) -> np.ndarray:
    """Proposals per class, picture by picture and with torchvision's IoU."""
    clean, found = index.clean(), np.zeros(len(index.categories), dtype=np.int64)
    labels = index.labels[clean.rows]
    for row in range(len(index)):
        own = slice(clean.offsets[row], clean.offsets[row + 1])
        boxes = usable(stored.of(row), (index.heights[row], index.widths[row]), config)
        boxes = boxes[: config.top] if config.top else boxes
        if len(boxes) < config.fallback_below and config.fallback != "none":
            found += np.bincount(labels[own], minlength=len(found))
        elif len(boxes) and own.stop > own.start:
            both = (torch.from_numpy(values.astype(np.float64)) for values in (boxes, clean.boxes[own]))
            iou = box_iou(*both)
            best, place = iou.max(1)
            found += np.bincount(labels[own][place[best >= 0.5].numpy()], minlength=len(found))
    return np.maximum(found, np.bincount(labels, minlength=len(found)) > 0)


def test_an_npz_lies_where_it_is(source, tmp_path, monkeypatch):
    """Boxes and scores are mapped from the file itself: nothing grows with it, neither memory nor cache."""
    path = tmp_path / "p.npz"
    ids, offsets, boxes, scores = columns(source.index)
    write_proposals(path, ids, offsets, boxes, scores, "localizer abc")
    for _ in range(2):
        stored = read_proposals(path, source.index)
        assert isinstance(stored.boxes, np.memmap) and Path(stored.boxes.filename) == path
        assert np.array_equal(stored.boxes, boxes) and stored.made_by == "localizer abc"
    again = pickle.loads(pickle.dumps(stored))  # what a loader's process gets
    assert isinstance(again.boxes, np.memmap) and np.array_equal(again.boxes, boxes)
    content = bytearray(path.read_bytes())
    content[content.index(boxes.tobytes()) + 5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="damaged"):
        read_proposals(path, source.index)


def test_checks_in_parts_are_those_of_the_whole(source, tmp_path, monkeypatch):
    path = tmp_path / "p.npz"
    ids, offsets, boxes, scores = columns(source.index)
    monkeypatch.setattr(proposal_files, "PART", 3)
    write_proposals(path, ids, offsets, boxes, scores, "")
    assert isinstance(read_proposals(path, source.index).boxes, np.memmap)
    wide = boxes.copy()
    wide[-1, 2] = 1e4
    write_proposals(path, ids, offsets, wide, scores, "")
    with pytest.raises(UserError, match="outside its picture"):
        read_proposals(path, source.index)
    infinite = boxes.copy()
    infinite[-1, 2] = np.inf
    write_proposals(path, ids, offsets, infinite, scores, "")
    with pytest.raises(UserError, match="not a finite number"):
        read_proposals(path, source.index)
    rising = scores[::-1].copy()
    write_proposals(path, ids, offsets, boxes, rising, "")
    stored = read_proposals(path, source.index)
    assert not isinstance(stored.boxes, np.memmap)  # sorted, from the cache
    assert all((np.diff(stored.scores[a:b]) <= 0).all() for a, b in zip(offsets[:-1], offsets[1:], strict=True))


@pytest.mark.parametrize("pairs", [1, 50, 2_000_000])
@pytest.mark.parametrize(
    "options",
    [{}, {"fallback": "none"}, {"top": 3, "fallback_below": 2}, {"min_side": 12, "max_aspect": 2, "size": (0.1, 0.7)}],
)
def test_proposals_as_instances(source, tmp_path, monkeypatch, options, pairs):
    monkeypatch.setattr(proposals_module, "PAIRS", pairs)
    clean = source.index.clean()
    ids, offsets, boxes, scores = columns(source.index, per_image=12)
    order = np.argsort(source.index.image_ids)[1:]  # a third of the boxes lies near an annotation
    rng = np.random.default_rng(5)
    for place, row in enumerate(order):
        truth = clean.boxes[clean.offsets[row] : clean.offsets[row + 1]]
        if len(truth):
            boxes[12 * place : 12 * place + 4] = truth[rng.integers(len(truth), size=4)]
            boxes[12 * place : 12 * place + 4, 2:] -= rng.random((4, 2), dtype=np.float32) * 8
    path = tmp_path / "proposals.npz"
    write_proposals(path, ids, offsets, boxes, scores, "localizer")
    config = Proposals(file=str(path), **options)
    opened = open_proposals(config, source)
    found = opened.instances(source.index)
    assert found.dtype == np.int64 and found.sum() > 30
    np.testing.assert_array_equal(found, counted_one_by_one(source.index, opened.stored, config))


def test_annotations_as_proposals_are_their_own_instances(source):
    index = source.index
    found = open_proposals(Proposals(source="gt"), source).instances(index)
    np.testing.assert_array_equal(found, np.bincount(index.labels[index.clean().rows], minlength=3))
    few = open_proposals(Proposals(source="gt", min_side=1000, fallback="none"), source).instances(index)
    assert few.tolist() == [1, 1, 1]  # no share is 0
    with pytest.raises(ValueError, match="gt_jitter are not known"):
        open_proposals(Proposals(source="gt_jitter"), source).instances(index)


def test_damaged_missing_and_foreign_files(source, tmp_path):
    path = tmp_path / "p.npz"
    path.write_bytes(b"PK not really")
    with pytest.raises(UserError, match=r"is damaged or no \.npz file"):
        read_proposals(path, source.index)
    with pytest.raises(UserError, match="does not exist"):
        read_proposals(tmp_path / "q.npz", source.index)
    with pytest.raises(UserError, match="proposals.file names no file: write one with"):
        open_proposals(Proposals(), source)
    json_file = tmp_path / "p.json"
    json_file.write_text(json.dumps([entry()]))
    with pytest.raises(UserError, match="no detector of tailfin wrote this file"):
        open_proposals(Proposals(source="rpn", file=str(json_file)), source)


# ---- selective search ------------------------------------------------------------------------------------------------


def test_selective_search_says_what_it_needs(source, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-contrib-python-headless"):
        open_proposals(Proposals(source="selective_search"), source)
    monkeypatch.setitem(sys.modules, "cv2", types.SimpleNamespace())  # OpenCV without its contributed modules
    with pytest.raises(UserError, match="pip install"):
        open_proposals(Proposals(source="selective_search"), source)


def test_selective_search_boxes_do_not_depend_on_its_ranking(source, monkeypatch):
    """OpenCV ranks with a random factor of its own: only the set of boxes may count."""
    found = [[0, 0, 10, 20], [3, 4, 30, 20], [0, 0, 10, 20], [5, 5, 8, 8]]
    calls = []

    class Search:
        def setBaseImage(self, image):
            calls.append(image)

        def switchToSelectiveSearchFast(self):
            pass

        def process(self):
            return np.random.default_rng(len(calls)).permutation(found)

    inner = types.SimpleNamespace(createSelectiveSearchSegmentation=Search)
    fake = types.SimpleNamespace(ximgproc=types.SimpleNamespace(segmentation=inner))
    monkeypatch.setitem(sys.modules, "cv2", fake)
    picture = PICTURE.clone()
    picture[0] = 200  # red
    boxes = [selective_search(picture) for _ in range(3)]
    assert all(np.array_equal(own, boxes[0]) for own in boxes)
    assert boxes[0].tolist() == [[3, 4, 33, 24], [0, 0, 10, 20], [5, 5, 13, 13]]
    assert calls[0].shape == (60, 80, 3) and calls[0][0, 0].tolist() == [0, 0, 200]  # BGR
    provider = open_proposals(Proposals(source="selective_search", max_aspect=1.5), source)
    assert len(provider.boxes(0, TRUTH, picture, np.random.default_rng(0))) == 2


def test_selective_search_of_opencv():
    pytest.importorskip("cv2.ximgproc", reason="opencv-contrib is not installed")
    picture = torch.full((3, 60, 80), 30, dtype=torch.uint8)
    picture[:, 10:40, 20:60] = 220
    assert (np.abs(selective_search(picture) - [20, 10, 60, 40]).max(axis=1) <= 2).any()


# ---- recall ----------------------------------------------------------------------------------------------------------


def found_of(index, boxes_by_row: dict[int, list]) -> Found:
    rows = sorted(boxes_by_row, key=lambda row: index.image_ids[row])
    boxes = [np.array(boxes_by_row[row], dtype=np.float32).reshape(-1, 4) for row in rows]
    offsets = np.concatenate([[0], np.cumsum([len(own) for own in boxes])])
    scores = np.concatenate([np.linspace(1, 0, len(own)) for own in boxes]).astype(np.float32)
    return Found(index.image_ids[rows], offsets, np.concatenate(boxes), scores)


def test_recall_of_the_objects_themselves_and_of_nothing(source):
    index = source.index
    clean = index.clean()
    own = {
        row: clean.boxes[clean.offsets[row] : clean.offsets[row + 1]].tolist()
        for row in np.flatnonzero(np.diff(clean.offsets)).tolist()
    }
    whole = average_recall(found_of(index, own), index, [1, 10])
    assert whole["AR@10"] == whole["R50@10"] == 1
    first = sum(1 for _ in own) / len(clean.boxes)
    assert whole["AR@1"] == pytest.approx(first)
    half = {row: boxes for number, (row, boxes) in enumerate(own.items()) if number % 2}
    share = sum(len(boxes) for boxes in half.values()) / len(clean.boxes)
    assert average_recall(found_of(index, half), index, [10])["AR@10"] == pytest.approx(share)


def test_recall_counts_a_proposal_once_and_by_its_iou(tmp_path):
    def annotation(number, box):
        return {"id": number, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}

    document = {
        "images": [{"id": 1, "file_name": "a.png", "width": 200, "height": 200}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [annotation(1, [0, 0, 100, 100]), annotation(2, [0, 0, 100, 90])],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document))
    index = open_index(path)
    one = average_recall(found_of(index, {0: [[0, 0, 100, 90]]}), index, [10])
    assert one["AR@10"] == pytest.approx(0.5)  # equal to the second object; the first one is left without
    two = average_recall(found_of(index, {0: [[0, 0, 100, 90], [0, 0, 100, 62]]}), index, [10])
    assert two["AR@10"] == pytest.approx((10 + 3) / 20)  # IoU 0.62: 0.5, 0.55, 0.6
    assert two["R50@10"] == 1
    assert (two["ARs@10"], two["ARm@10"], two["ARl@10"]) == (-1, 1, pytest.approx(0.3))


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_recipe) -> dict[str, Path]:
    """A localizer and a Faster R-CNN with random weights, as model files."""
    from tailfin.checkpoint import save_model
    from tailfin.config import check_recipe, load_recipe
    from tailfin.models import build_detector
    from tailfin.stats import ClassStats

    folder = tmp_path_factory.mktemp("models")
    stats = ClassStats(names=["x", "y"], image_count=[3, 2], instance_count=[3, 2], num_images=5)  # not the set's
    plain = load_recipe(tiny_recipe, ())
    values = plain.model_dump(mode="json")
    keep = (
        "norm",
        "frozen_layers",
        "fpn_channels",
        "fpn_layers",
        "fpn_pool",
        "anchor_sizes",
        "roi_size",
        "head_channels",
    )
    values["detector"] = {"name": "localizer", "rpn_proposals": 80} | {key: values["detector"][key] for key in keep}
    result = {}
    for name, recipe in (("faster_rcnn", plain), ("localizer", check_recipe(values, "test"))):
        torch.manual_seed(0)
        result[name] = folder / f"{name}.safetensors"
        save_model(result[name], build_detector(recipe, stats)[0], recipe, stats)
    return result


@pytest.mark.parametrize("name", ["faster_rcnn", "localizer"])
def test_proposals_of_a_detector(models, tiny_set, tmp_path, name, monkeypatch):
    from tailfin import propose as module

    monkeypatch.setattr(module, "CHUNK", 4)
    out = tmp_path / "p.npz"
    found, index = module.propose(models[name], tiny_set[1], out, top=15, nms_iou=0.6, device="cpu")
    stored = read_proposals(out, index)
    assert stored.made_by.startswith(name) and np.diff(found.offsets).max() <= 15
    assert not list(tmp_path.glob(".*"))  # no shards are left
    for row in range(len(index)):
        boxes = torch.from_numpy(np.array(stored.of(row)))
        assert 0 < len(boxes) <= 15
        overlap = box_iou(boxes, boxes).fill_diagonal_(0)
        assert overlap.max() <= 0.61
    again = tmp_path / "q.json"
    module.propose(models[name], tiny_set[1], again, top=15, nms_iou=0.6, device="cpu")
    other = read_proposals(again, index)
    assert all(np.abs(other.of(row) - stored.of(row)).max() < 2e-3 for row in range(len(index)))
    samples = open_proposals(Proposals(source="rpn", file=str(out)), Source(index, tiny_set[1].with_suffix("")))
    assert len(samples.boxes(0, TRUTH[:0], PICTURE, np.random.default_rng(0))) == 8


def test_an_interrupted_command_goes_on(models, tiny_set, tmp_path, monkeypatch):
    from tailfin import propose as module

    monkeypatch.setattr(module, "CHUNK", 3)
    straight = tmp_path / "straight.npz"
    module.propose(models["localizer"], tiny_set[1], straight, top=10, device="cpu")
    done, work = [], module._propose_chunk

    def failing(*arguments) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(1)
        work(*arguments)

    out = tmp_path / "p.npz"
    monkeypatch.setattr(module, "_propose_chunk", failing)
    with pytest.raises(KeyboardInterrupt):
        module.propose(models["localizer"], tiny_set[1], out, top=10, device="cpu")
    assert not out.exists()
    counted = []
    monkeypatch.setattr(module, "_propose_chunk", lambda *arguments: (counted.append(1), work(*arguments)))
    module.propose(models["localizer"], tiny_set[1], out, top=10, device="cpu")
    assert len(counted) == 1  # of three chunks two were there
    with np.load(straight) as one, np.load(out) as two:
        assert all(np.array_equal(one[key], two[key]) for key in one.files)


def test_other_options_start_anew(models, tiny_set, tmp_path, monkeypatch):
    from tailfin import propose as module

    out = tmp_path / "p.npz"
    parts = tmp_path / ".p.npz.parts"
    (parts / "00000").mkdir(parents=True)
    (parts / "00000" / "rank-00000.shard").write_bytes(b"of another question")
    (parts / "asked.json").write_text("{}")
    found, _ = module.propose(models["localizer"], tiny_set[1], out, top=5, device="cpu")
    assert len(found.boxes) and not parts.exists()


def test_the_command(models, tiny_set, tmp_path):
    out, recall = tmp_path / "p.npz", tmp_path / "r.json"
    words = ("data", "proposals", models["localizer"], "--annotations", tiny_set[1], "--out", out)
    options = ("--evaluate", "--json", recall, "--top", 20, "--device", "cpu")
    done = CliRunner().invoke(app, [str(word) for word in (*words, *options)])
    assert done.exit_code == 0, done.output
    assert f"wrote {out}: " in done.output and "AR@20" in done.output
    assert set(json.loads(recall.read_text())) >= {"AR@10", "AR@20", "R50@10", "ARs@20"}
    before = out.read_bytes()
    with pytest.raises(UserError, match="--overwrite replaces it"):
        propose(models["localizer"], tiny_set[1], out, device="cpu")
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"out": "p.txt"}, "proposals are written as .npz or .json"),
        ({"model": "absent.safetensors"}, "model absent.safetensors does not exist"),
        ({"annotations": "absent.json"}, "does not exist"),
    ],
)
def test_mistakes_of_the_command(models, tiny_set, tmp_path, options, message):
    values = {"model": models["localizer"], "annotations": tiny_set[1], "out": "p.npz", **options}
    values["out"] = tmp_path / values["out"]
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        propose(**values, device="cpu")
    assert not list(tmp_path.iterdir())
