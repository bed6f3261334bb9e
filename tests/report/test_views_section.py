"""The report's section about pre-training: pictures with paired boxes, reconstructions, similarities."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tailfin.report import build_report
from tailfin.report.runs import read_runs
from tailfin.report.sections.views import pretraining


def arrays(reconstruction: bool = True, similarities: bool = True) -> dict[str, np.ndarray]:
    """What a stage writes for two pictures of 40 x 60 and 50 x 64 in a batch of 64 x 64."""
    rng = np.random.default_rng(0)
    view1 = np.full((2, 3, 64, 64), 40, dtype=np.uint8)
    boxes = np.array([[[5, 5, 30, 30], [10, 8, 50, 38]], [[2, 2, 40, 44], [np.nan] * 4]], dtype=np.float32)
    values = {
        "view1": view1,
        "view2": np.full((2, 3, 64, 64), 200, dtype=np.uint8),
        "size1": np.array([[40, 60], [50, 64]]),
        "size2": np.array([[64, 48], [64, 64]]),
        "boxes1": boxes,
        "boxes2": boxes * 0.7,
    }
    if reconstruction:
        values["reconstruction"] = np.full((2, 3, 64, 64), 120, dtype=np.uint8)
        values["masks"] = np.array([[8, 8, 18, 18], [0, 0, 0, 0]])
    if similarities:
        values |= {"positive": np.array([0.9, 0.8]), "negative": rng.uniform(-0.3, 0.3, (2, 64))}
        values |= {"box_positive": rng.uniform(0.5, 1, 3), "box_negative": rng.uniform(-0.2, 0.2, (3, 64))}
    return {name: value.astype(np.float32) if value.dtype == np.float64 else value for name, value in values.items()}


def write(run: Path, values: dict[str, np.ndarray]) -> None:
    folder = run / "stages" / "1-pretrain"
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "pictures.npz", **values)


def pictures_of(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(text))) for text in found]


def test_panels_and_charts(make_data, make_run, parse_page):
    run = make_run("drcl", make_data())
    assert pretraining(read_runs([run])) is None
    write(run, arrays())
    section = pretraining(read_runs([run]))
    assert section is not None and section.title == "Pre-training"
    page = parse_page(str(section.html))
    assert page.count("article", **{"class": "example"}) == 2 and page.count("img") == 6
    assert "2 pairs of boxes" in page.text and "1 pair of boxes" in page.text
    assert page.text.count("masked, then encoded again") == 1  # the second picture has no mask
    shown = pictures_of(str(section.html))
    sizes = [picture.size for picture in shown[:3]]
    assert [max(size) for size in sizes] == [320] * 3
    assert abs(sizes[0][0] / sizes[0][1] - 1.5) < 0.02 and sizes[1][0] < sizes[1][1]  # the padding is cut off
    first = np.asarray(shown[0].convert("RGB")).astype(int)
    assert (np.abs(first - 40).max(axis=2) > 60).any()  # boxes are drawn
    assert "Pictures" in page.text and "Boxes" in page.text
    whole = parse_page(build_report([run]))
    assert "Pre-training" in whole.text
    assert not any((dict(attrs).get("src") or "").startswith("http") for tag, attrs in whole.elements if tag == "img")


def test_what_was_not_trained_is_left_out(make_data, make_run, parse_page):
    run = make_run("moco", make_data())
    write(run, arrays(reconstruction=False, similarities=False))
    section = pretraining(read_runs([run]))
    assert section is not None
    page = parse_page(str(section.html))
    assert page.count("img") == 4 and "reconstruction" not in page.text and "Similarity" not in page.text


def test_the_histogram_holds_all_similarities(make_data, make_run):
    run = make_run("drcl", make_data())
    write(run, arrays())
    html = str(pretraining(read_runs([run])).html)
    packed = re.findall(r'"y":\{"dtype":"f8","bdata":"([^"]+)"', html)
    assert len(packed) == 4
    for text in packed:  # per cent of the similarities in each bin
        assert np.frombuffer(base64.b64decode(text)).sum() == pytest.approx(100)


def test_several_runs_with_hostile_names_and_a_broken_file(make_data, make_run, parse_page):
    data = make_data()
    runs = [make_run("<script>alert(1)<", data), make_run("b", data), make_run("c", data)]
    for run in runs[:2]:
        write(run, arrays())
    folder = runs[2] / "stages" / "1-pretrain"
    folder.mkdir()
    (folder / "pictures.npz").write_bytes(b"PK broken")
    section = pretraining(read_runs(runs))
    html = str(section.html)
    assert "<script>alert" not in html
    page = parse_page(html)
    assert page.count("img") == 12 and "c: pictures.npz of stage 1-pretrain cannot be shown" in page.text
    write(runs[2], {"view1": np.zeros((1, 3, 8, 8), dtype=np.uint8)})
    assert "cannot be shown" in parse_page(str(pretraining(read_runs(runs)).html)).text
