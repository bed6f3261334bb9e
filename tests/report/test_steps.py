"""The report's section about step-wise learning: a table of steps, annotations per class, exemplars."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tailfin.data import smooth_tail
from tailfin.data.index import open_index
from tailfin.report import build_report
from tailfin.report.runs import read_runs
from tailfin.report.sections.steps import steps


@pytest.fixture
def run(make_data, make_run) -> Path:
    """A run with two steps behind its base, whose exemplars are those of the set."""
    data = make_data(names=("bolt", "cup", "<b>light</b>", "чашка"))
    folder = make_run("steps", data, ap=0.3)
    index = open_index(data.root / "val.json")
    rows = np.arange(len(index.labels))
    scores = (0.9 - 0.01 * rows).astype(np.float32)
    ranked = smooth_tail.rank_exemplars(index, rows, scores)
    facts = {"threshold": 0.5, "distinct_images": True}
    smooth_tail.write_exemplars(folder / "exemplars.json", ranked, index, np.array([0, 0, 1, 1]), facts)
    numbers = {"1-base": (0.2, 0.1), "2-head": (0.25, 0.05), "3-tail": (0.3, 0.2)}
    for name, (ap, rare) in numbers.items():
        stage = folder / "stages" / name
        stage.mkdir(exist_ok=True)
        (stage / "metrics.json").write_text(json.dumps({"bbox": {"AP": ap, "APr": rare, "APc": -1}}))
    for name, counts in (("2-head", [5, 5, 1, 1]), ("3-tail", [2, 2, 6, 6])):
        about = {"annotations": counts, "images": 9, "epoch": 11, "iterations": 44, "trains": [], "reads": {}}
        (folder / "stages" / name / "step.json").write_text(json.dumps({"step": name, **about}))
    return folder


def test_table_curves_and_exemplars(run, parse_page):
    section = steps(read_runs([run]))
    assert section is not None and section.title == "Steps and exemplars"
    page = parse_page(str(section.html))
    assert "base all – – – 20.0 10.0" in page.text
    assert "head 12 9 11 44 class-specific parts 25.0 (+5.0) 5.0 (−5.0)" in page.text
    assert "tail 16 9 11 44 class-specific parts 30.0 (+5.0) 20.0 (+15.0)" in page.text
    assert "APc" not in page.text and "First come scores above 0.5, each from another image." in page.text
    assert "<b>light</b> tail, 6 images, 6 exemplars" in page.text  # the name is text, not markup
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', str(section.html))
    assert len(pictures) == 4 * 6 and page.text.count("0.9") >= 1
    sizes = [Image.open(io.BytesIO(base64.b64decode(text))).size for text in pictures]
    assert all(max(size) == 140 for size in sizes)
    figure = str(section.html)
    assert "head (12)" in figure and "tail (16)" in figure and "all (24)" in figure
    assert "Steps and exemplars" in parse_page(build_report([run])).text


def test_what_is_missing_is_left_out_or_said(run, make_data, make_run, parse_page):
    plain = make_run("plain", make_data(folder="other"))
    assert steps(read_runs([plain])) is None
    document = json.loads((run / "exemplars.json").read_text())
    (run / "exemplars.json").write_text(json.dumps({**document, "fingerprint": "other"}))
    section = steps(read_runs([run, plain]))
    page = parse_page(str(section.html))
    assert "no exemplars are drawn" in page.text and page.count("img") == 0 and "head 12" in page.text
    (run / "exemplars.json").unlink()
    page = parse_page(str(steps(read_runs([run])).html))
    assert "head 12" in page.text and "Exemplars" not in page.text
    (run / "stages" / "2-head" / "step.json").write_text('{"annotations": [1, 2]}')
    assert "its steps cannot be shown" in parse_page(str(steps(read_runs([run])).html)).text
    (run / "stages" / "2-head" / "step.json").write_text("{")
    assert "its steps cannot be shown" in parse_page(str(steps(read_runs([run])).html)).text
