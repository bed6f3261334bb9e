"""Seeds of one recipe as one row, differences that may be chance in grey, and the labels worth a look."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tailfin.errors import UserError
from tailfin.report import write_labels
from tailfin.report.runs import read_runs
from tailfin.report.sections.classes import class_table
from tailfin.report.sections.labels import labels
from tailfin.report.sections.summary import summary
from tailfin.report.seeds import columns, difference


def seeded(make_run: Callable, data: object, name: str, seed: int, **options: object) -> Path:
    return make_run(f"{name}-{seed}", data, recipe={"name": f"set/{name}", "seed": seed}, **options)


def test_seeds_are_one_row_with_their_range(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    paths = [seeded(make_run, data, "base", seed, ap=0.3 + 0.02 * seed) for seed in (0, 1)]
    paths += [seeded(make_run, data, "better", 0, ap=0.4, found=(1, 2))]
    runs = read_runs(paths)
    first, other = columns(runs)
    assert (first.name, first.seeds, other.name) == ("base, 2 seeds", 2, "better-0")
    twice = columns([*runs, runs[0]])  # one seed again is no further seed
    assert [column.seeds for column in twice] == [2, 1, 1]
    assert first.mean("bbox", "AP") == pytest.approx(0.31) and first.values("bbox", "AP") == [0.3, 0.32]
    text = parse_page(str(summary(runs).html)).text
    assert "base, 2 seeds 31.0 30.0–32.0" in text and "better-0 40.0 +9.0" in text
    table = parse_page(str(class_table(runs).html)).text
    assert "cup common 12 24 31.0 40.0" in table  # AP, of two columns


def test_a_difference_within_its_interval_is_grey(make_data: Callable, make_run: Callable) -> None:
    data = make_data()
    runs = read_runs([make_run("base", data), make_run("same", data, ap=0.35), make_run("worse", data, found=(1, 2))])
    base, same, worse = columns(runs)
    equal, loss = difference(base, same), difference(base, worse)
    assert equal is not None and not equal.metrics["AP"].beyond and equal.metrics["AP"].low == 0
    assert loss is not None and loss.metrics["AP"].beyond and loss.metrics["AP"].high < 0
    assert loss.classes["bolt"].beyond and not loss.classes["traffic light"].beyond
    html = str(summary(runs).html)
    assert '<small class="same" title="±0.0 to ±0.0">+5.0' in html  # of AP, whatever the files of numbers say
    assert "paired bootstrap" in html


def test_other_files_have_no_interval(make_data: Callable, make_run: Callable) -> None:
    data, other = make_data(), make_data(names=("bolt", "cup"), folder="other")
    base, away = columns(read_runs([make_run("base", data), make_run("away", other)]))
    assert difference(base, away) is None
    unfinished = columns(read_runs([make_run("at work", data, finished=False)]))[0]
    assert difference(base, unfinished) is None


def test_labels_worth_a_look(make_data: Callable, make_run: Callable, parse_page: Callable, tmp_path: Path) -> None:
    data = make_data(names=("<script>alert(1)</script>", "cup", "nut"))
    run = make_run("one", data, found=(1, 2))
    results = json.loads((run / "results.bbox.json").read_text())
    results.append({"image_id": 4, "category_id": 15, "bbox": [40, 50, 12, 12], "score": 0.8})  # on nothing
    results = [row for row in results if row["image_id"] != 7]  # two objects that nobody finds
    (run / "results.bbox.json").write_text(json.dumps(results))
    section = labels(read_runs([run]))
    page = parse_page(str(section.html))
    assert page.open == [] and page.count("script") == 1
    assert "Detections on nothing 1" in page.text and "Annotations that no run finds 2" in page.text
    wrong = sum(label == 0 and image != 7 for image, label, _ in data.objects)
    assert f"Annotated as another class {wrong}" in page.text and "annotated: <script>alert(1)</script>" in page.text
    assert page.count("img") == 3 + min(wrong, 18)
    out = write_labels([run], tmp_path / "look.json")
    document = json.loads(out.read_text())
    assert len(document["annotations"]) == 3 + wrong and {"images", "categories"} < set(document)
    (case,) = [row for row in document["annotations"] if row["kind"] == "unlabelled"]
    assert case["bbox"] == [40, 50, 12, 12] and case["image_id"] == 4 and case["score"] == 0.8
    known = {row["id"]: row for row in document["images"]}
    assert all(row["image_id"] in known for row in document["annotations"]) and known[4]["file_name"] == "4.png"


def test_labels_of_no_run(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    run = make_run("at work", make_data(), finished=False)
    assert labels(read_runs([run])) is None
    with pytest.raises(UserError, match="no run has detections"):
        write_labels([run], tmp_path / "look.json")
