"""`tailfin predict` at scale: killed and given again, processes, formats, lists, addresses, tiles, flips."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tailfin import ClassStats
from tailfin.checkpoint import save_model
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.predicting import run as predicting
from tailfin.predicting.inputs import find_inputs
from tailfin.predicting.run import predict
from tailfin.predicting.shards import PIECE
from tailfin.predicting.views import Looks, look, windows
from tailfin.report.matching import iou

NAMES = ["red", "green", "blue"]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_recipe) -> Path:
    """Random weights whose scores are spread out."""
    recipe = load_recipe(tiny_recipe)
    stats = ClassStats(
        image_count=[9, 9, 9], instance_count=[9, 9, 9], num_images=9, names=NAMES, category_ids=[3, 5, 9]
    )
    torch.manual_seed(0)
    built, _ = build_detector(recipe, stats, start=False)
    with torch.no_grad():
        built.roi_heads.predictor.cls_score.weight.normal_(0, 2.0)
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    save_model(path, built.eval(), recipe, stats)
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory) -> Path:
    """Pictures of more than three pieces."""
    folder = tmp_path_factory.mktemp("many")
    rng = np.random.default_rng(0)
    for number in range(3 * PIECE + 5):
        side = 32 + 8 * (number % 3)
        cells = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(cells).resize((side, 40), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.png")
    return folder


@pytest.fixture(scope="module")
def at_once(model, many, tmp_path_factory) -> bytes:
    out = tmp_path_factory.mktemp("at_once") / "found.json"
    summary = predict(model, [many], out, score=0.1, device="cpu")
    assert summary.pictures == 3 * PIECE + 5 and summary.detections > 100 and summary.taken_up == 0
    return out.read_bytes()


def pieces_in(folder: Path) -> int:
    return len(list(folder.rglob("*.piece")))


def test_killed_three_times_and_given_again(model, many, at_once, tmp_path):
    """Kills by the operating system at moments after a new piece: the same file, and no piece is done twice."""
    out = tmp_path / "found.json"
    words = ["predict", str(model), str(many), "--out", str(out), "--score", "0.1", "--device", "cpu"]
    folder, kills = tmp_path / ".found.json.pieces", 0
    for _ in range(3):
        before = pieces_in(folder)
        running = subprocess.Popen([sys.executable, "-m", "tailfin", *words], stderr=subprocess.DEVNULL)
        for _ in range(6000):
            if running.poll() is not None or pieces_in(folder) > before:
                break
            time.sleep(0.02)
        if running.poll() is None:
            running.send_signal(signal.SIGKILL)
            kills += 1
        running.wait()
        assert not out.exists() or running.returncode == 0
    assert kills >= 1
    done = pieces_in(folder)
    if not out.exists():
        summary = predict(model, [many], out, score=0.1, device="cpu")
        assert summary.taken_up == min(done * PIECE, 3 * PIECE + 5) > 0
    assert out.read_bytes() == at_once
    assert sorted(path.name for path in tmp_path.iterdir()) == ["found.images.json", "found.json"]


def test_nothing_is_done_twice(model, many, at_once, tmp_path, monkeypatch):
    out, seen = tmp_path / "found.json", []

    def stopped(detector, pictures, *rest, **options):
        seen.append(len(pictures))
        if sum(seen) > PIECE + 20:
            raise KeyboardInterrupt
        return look(detector, pictures, *rest, **options)

    monkeypatch.setattr(predicting, "look", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict(model, [many], out, score=0.1, device="cpu")
    assert not out.exists()
    seen.clear()
    monkeypatch.setattr(predicting, "look", lambda d, p, *r, **o: seen.append(len(p)) or look(d, p, *r, **o))
    with pytest.raises(UserError, match="pieces of a prediction with other options"):
        predict(model, [many], out, score=0.2, device="cpu")
    with pytest.raises(UserError, match="other inputs, listing"):
        predict(model, [many / "0000.png"], out, score=0.1, device="cpu")
    predict(model, [many], out, score=0.1, device="cpu")
    assert sum(seen) == 2 * PIECE + 5 and out.read_bytes() == at_once


def test_several_processes_give_the_same_file(model, many, at_once, tmp_path):
    out = tmp_path / "found.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "tailfin"]
    words = ["predict", str(model), str(many), "--out", str(out), "--score", "0.1", "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *launcher, *words], capture_output=True, text=True, timeout=280, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert out.read_bytes() == at_once and done.stdout.count("detections in") == 1


def test_formats_say_the_same(model, many, tmp_path):
    found = tmp_path / "found.json"
    few = [many / f"{number:04d}.png" for number in range(6)]
    predict(model, few, found, score=0.3, device="cpu")
    entries = json.loads(found.read_text())
    images = json.loads((tmp_path / "found.images.json").read_text())
    assert [Path(image["file_name"]).name for image in images["images"]] == [path.name for path in few]
    assert images["categories"] == [{"id": n, "name": name} for n, name in zip((3, 5, 9), NAMES, strict=True)]
    predict(model, few, tmp_path / "found.csv", score=0.3, device="cpu")
    rows = list(csv.DictReader((tmp_path / "found.csv").open()))
    assert {row["file_name"] for row in rows} == {str(path) for path in few}  # those without detections too
    kept = [row for row in rows if row["score"]]
    assert [(int(r["image_id"]), r["category_name"], float(r["x"])) for r in kept] == [
        (e["image_id"], e["category_name"], e["bbox"][0]) for e in entries
    ]
    predict(model, few, tmp_path / "labels", format_name="yolo", score=0.3, device="cpu")
    assert (tmp_path / "labels" / "classes.txt").read_text().split() == NAMES
    lines = [
        [float(word) for word in line.split()]
        for path in few
        for line in (tmp_path / "labels" / f"{path.stem}.txt").read_text().splitlines()
    ]
    two = [shutil.copy(few[0], (tmp_path / name).mkdir() or tmp_path / name / "same.png") for name in ("a", "b")]
    with pytest.warns(UserWarning, match=r"1 label file has another name.*same_2\.txt of .*b.same\.png"):
        predict(model, two, tmp_path / "named", format_name="yolo", device="cpu")
    assert (tmp_path / "named/same.txt").read_text() == (tmp_path / "named/same_2.txt").read_text()
    sizes = {image["id"]: (image["width"], image["height"]) for image in images["images"]}
    for line, entry in zip(lines, entries, strict=True):
        width, height = sizes[entry["image_id"]]
        x, y, w, h = entry["bbox"]
        assert line == pytest.approx(
            [(3, 5, 9).index(entry["category_id"]), (x + w / 2) / width, (y + h / 2) / height, w / width, h / height,
             entry["score"]], abs=1e-3,
        )  # fmt: skip


def test_parquet(model, many, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    predict(model, [many / "0000.png"], tmp_path / "found.parquet", score=0.1, device="cpu")
    predict(model, [many / "0000.png"], tmp_path / "found.json", score=0.1, device="cpu")
    rows = parquet.read_table(tmp_path / "found.parquet").to_pylist()
    entries = json.loads((tmp_path / "found.json").read_text())
    assert [row["score"] for row in rows] == [entry["score"] for entry in entries]


def test_score_classes_and_points(model, many, tmp_path):
    picture, out = many / "0003.png", tmp_path / "found.json"

    def entries(**options):
        predict(model, [picture], out, overwrite=True, device="cpu", **options)
        return json.loads(out.read_text())

    everything = entries(score=0, max_dets=-1)
    assert min(entry["score"] for entry in everything) < 0.05
    assert entries(max_dets=-1) == [entry for entry in everything if entry["score"] >= 0.05]  # the default
    some = everything[len(everything) // 2]["score"]
    assert entries(score=some, max_dets=-1)[-1]["score"] == some  # from it on
    only = entries(score=0, classes=["blue"], max_dets=-1)
    assert only == [entry for entry in everything if entry["category_name"] == "blue"]


def test_lists_and_addresses(model, many, tmp_path):
    fsspec = pytest.importorskip("fsspec", reason="fsspec is not installed")
    memory = fsspec.filesystem("memory")
    for number in range(3):
        memory.pipe(f"/bucket/deep/{number}.png", (many / f"{number:04d}.png").read_bytes())
    memory.pipe("/bucket/notes.txt", b"no picture")
    names = [f"memory://bucket/deep/{number}.png" for number in range(3)]
    assert find_inputs(["memory://bucket"]) == find_inputs(["memory://bucket/deep/*.png"]) == names
    listing = tmp_path / "pictures.txt"
    listing.write_text(f"# a comment\n{many / '0001.png'}\n\nmemory://bucket/deep/2.png\n")
    assert find_inputs([], [listing]) == [str(many / "0001.png"), names[2]]
    predict(model, ["memory://bucket/deep"], tmp_path / "a.json", score=0.1, device="cpu")
    predict(model, [many / f"{number:04d}.png" for number in range(3)], tmp_path / "b.json", score=0.1, device="cpu")
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert [{**e, "file_name": ""} for e in one] == [{**e, "file_name": ""} for e in two] and len(one) > 2
    for address, message in (
        ("memory://nowhere/x.png", "no picture or video"),
        ("nothing9://bucket/x", "nothing9"),
    ):
        with pytest.raises(UserError, match=message):
            find_inputs([address])
    with pytest.raises(UserError, match="nothing to predict on"):
        find_inputs([])


def test_windows_cover_the_picture():
    for size, tile, overlap in (((100, 250), 64, 0.2), ((64, 64), 64, 0.5), ((30, 500), 64, 0.0)):
        covered = np.zeros(size, bool)
        found = windows(size, tile, overlap)
        for top, left, height, width in found:
            assert top >= 0 and top + height <= size[0] and left >= 0 and left + width <= size[1]
            covered[top : top + height, left : left + width] = True
        assert covered.all()
        lefts = sorted({left for _, left, _, _ in found})
        assert all(b - a <= tile * (1 - overlap) + 1 for a, b in zip(lefts, lefts[1:], strict=False))
    assert windows((100, 250), 0, 0.2) == [(0, 0, 100, 250)]


class Marks:
    """A stand-in for a detector: it "finds" red squares of 10 pixels that lie whole in what it is given."""

    class model:
        class limits:
            nms = 0.5

    def limits(self, score_threshold, max_dets):
        from tailfin.models.detector import Limits

        return Limits(0.0, -1 if max_dets is None else max_dets, 0.5)

    def raw(self, arrays, score_threshold, max_dets):
        results = []
        for array in arrays:
            red = (array[..., 0] > 200) & (array[..., 1] < 50)
            corners = [
                (x, y)
                for y, x in zip(*np.nonzero(red), strict=True)
                if red[y : y + 10, x : x + 10].sum() == 100
                and not (x and red[y, x - 1]) and not (y and red[y - 1, x])
            ]  # fmt: skip
            boxes = torch.tensor([[x, y, x + 10, y + 10] for x, y in corners]).float().view(-1, 4)
            count = len(boxes)
            results.append({"boxes": boxes, "scores": torch.linspace(0.9, 0.5, count) if count else torch.zeros(0),
                            "labels": torch.zeros(count, dtype=torch.int64), "size": array.shape[:2]})  # fmt: skip
        return results


def test_tiles_and_flips_find_each_object_once():
    picture = np.zeros((150, 260, 3), np.uint8)
    places = [(3, 5), (118, 60), (240, 130), (60, 61)]
    for x, y in places:
        picture[y : y + 10, x : x + 10, 0] = 255
    options = {"score_threshold": None, "max_dets": None, "batch": 3}
    for looks in (Looks(64, 0.3), Looks(64, 0.3, True), Looks(0, 0.2, True), Looks(100, 0.2, True, 0.5)):
        [found] = look(Marks(), [picture], looks, **options)
        assert sorted(map(tuple, found["boxes"][:, :2].int().tolist())) == sorted(places), looks
        assert (found["boxes"][:, 2:] - found["boxes"][:, :2] == 10).all()
        assert (found["scores"].diff() <= 0).all()
    assert len(look(Marks(), [picture], Looks(64), **{**options, "max_dets": 2})[0]["scores"]) == 2


def test_suppression_across_classes_and_a_detector_in_tiles(model, many, tmp_path):
    out = tmp_path / "found.json"

    def entries(looks):
        predict(model, [many / "0001.png"], out, score=0.01, looks=looks, overwrite=True, device="cpu", max_dets=-1)
        return json.loads(out.read_text())

    plain, across = entries(Looks()), entries(Looks(across=0.3))
    assert 0 < len(across) < len(plain)
    corners = np.array([[*e["bbox"][:2], e["bbox"][0] + e["bbox"][2], e["bbox"][1] + e["bbox"][3]] for e in across])
    overlap = iou(corners, corners)
    assert (overlap - np.eye(len(corners))).max() <= 0.31
    assert entries(Looks(24, 0.25, True)) != plain


def test_refusals_leave_nothing(model, many, tmp_path):
    out = tmp_path / "found.json"
    for message, options in (
        ("--overlap", {"looks": Looks(64, 1.0)}),
        ('did you mean "yolo"', {"format_name": "yolos"}),
        ("--max-dets", {"max_dets": 0}),
        ('has no class "gren"', {"classes": ["gren"]}),
    ):
        with pytest.raises(UserError, match=message):
            predict(model, [many / "0001.png"], out, device="cpu", **options)
    with pytest.raises(UserError, match="found.xml: its ending is none of .json, .csv, .parquet"):
        predict(model, [many / "0001.png"], tmp_path / "found.xml", device="cpu")
    broken = tmp_path / "broken.png"
    broken.write_bytes((many / "0001.png").read_bytes()[:60])
    with pytest.raises(UserError, match="broken"):
        predict(model, [broken], out, skip_bad=False, device="cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.png"]
