"""`tailfin data view`: near duplicates and leaks, odd boxes, and the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from tailfin.cli.data import app
from tailfin.data.index import open_index
from tailfin.data.near_duplicates import near_pairs, picture_hashes
from tailfin.data.odd_boxes import odd_boxes
from tailfin.errors import UserError
from tailfin.report.data_view import write_view


def scene(seed: int) -> Image.Image:
    """A smooth picture that no other seed resembles."""
    cells = np.random.default_rng(seed).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((120, 90), Image.Resampling.BICUBIC)


def test_near_duplicates_are_found_and_others_are_not(tmp_path: Path) -> None:
    files = [tmp_path / f"{number}.png" for number in range(12)]
    for number, file in enumerate(files):
        scene(number).save(file)
    brighter = Image.fromarray((np.asarray(scene(3)) * 0.9 + 15).astype(np.uint8))
    brighter.resize((90, 68)).save(tmp_path / "again.jpg", quality=80)  # smaller, brighter, another format
    Image.new("RGB", (50, 50), (90, 90, 90)).save(tmp_path / "flat.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    extra = [tmp_path / name for name in ("again.jpg", "flat.png", "flat.png", "broken.png")]
    hashes = picture_hashes([*files, *extra])
    assert hashes.usable.tolist() == [True] * 13 + [False] * 3
    assert [pair[:2] for pair in near_pairs(hashes)] == [(3, 12)]
    train, val = picture_hashes(files[:6]), picture_hashes([files[9], extra[0]])
    ((first, second, difference),) = near_pairs(train, val)
    assert (first, second) == (3, 1) and difference < 5
    assert near_pairs(picture_hashes([])) == []


@pytest.fixture
def odd_set(tmp_path: Path) -> Path:
    """One box of every oddity, after thirty ordinary ones."""
    (tmp_path / "train").mkdir()
    images = [{"id": number, "width": 120, "height": 90, "file_name": f"{number}.png"} for number in range(32)]
    for number in range(32):
        scene(number if number != 31 else 5).save(tmp_path / "train" / f"{number}.png")
    boxes = [(number, 1, [10, 10, 20, 20 + number % 5]) for number in range(30)]
    boxes += [
        (30, 1, [100, 50, 30, 20]),  # outside
        (30, 2, [5, 5, 2, 30]),  # tiny, and thin it is not called for that
        (30, 2, [0, 80, 100, 5]),  # thin
        (31, 2, [0, 0, 119, 89]),  # the whole picture
        (3, 1, [10, 10, 20, 23]),  # twice
        (4, 2, [10, 10, 20, 24]),  # of two classes
        (29, 1, [30, 30, 4, 4]),  # odd for its class
    ]
    document = {
        "images": images,
        "annotations": [
            {"id": number, "image_id": image, "category_id": category, "bbox": box}
            for number, (image, category, box) in enumerate(boxes, 1)
        ],
        "categories": [{"id": 1, "name": "bolt"}, {"id": 2, "name": "<script>nut</script>"}],
    }
    path = tmp_path / "train.json"
    path.write_text(json.dumps(document))
    return path


def test_odd_boxes_by_kind(odd_set: Path) -> None:
    index = open_index(odd_set)
    found = {kind: index.annotation_ids[rows].tolist() for kind, rows in odd_boxes(index).items()}
    assert found == {
        "outside": [31],
        "tiny": [32],
        "thin": [33],
        "whole picture": [34],
        "twice": [35],
        "two classes": [36],
        "odd size": [37],
    }


def test_the_page(odd_set: Path, tmp_path: Path, parse_page: Callable) -> None:
    result = CliRunner().invoke(app, ["view", str(odd_set), "--val", str(odd_set), "--pictures", "3"])
    assert result.exit_code == 0, result.output
    written = tmp_path / "train-view.html"
    page = parse_page(written.read_text())
    assert page.open == [] and str(written) in result.output
    ids = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert ids == {"tail", "classes", "duplicates-and-leaks", "odd-boxes"}
    assert "<script>nut</script>" in page.text and page.count("script", src="") == 0
    assert "Duplicates in this file 2 pictures in 1 pairs" in page.text  # scene 5 twice
    assert "leaks) 32 pictures of the other file, 32 of this one" in page.text
    assert "tailfin train" in page.text  # the advice
    thumbnails = [a for tag, a in page.elements if tag == "img"]
    assert all(str(a["src"]).startswith("data:image/jpeg") for a in thumbnails)
    with pytest.raises(UserError, match=r"must be an \.html file"):
        write_view(odd_set, tmp_path / "view.png")


def test_pictures_that_are_gone_are_said(odd_set: Path, tmp_path: Path, parse_page: Callable) -> None:
    (tmp_path / "train" / "3.png").unlink()
    page = parse_page(write_view(odd_set, tmp_path / "v.html", pictures=40).read_text())
    assert "1 pictures could not be read" in page.text and "3.png" in page.text
