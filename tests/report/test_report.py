"""The report as a whole: what it says, that it is one safe and self-contained file, and where it is written."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tailfin.errors import UserError
from tailfin.report import build_report, write_report
from tailfin.report.page import direction, flat, percent, signed
from tailfin.report.runs import read_runs
from tailfin.report.sections.classes import class_table
from tailfin.report.sections.confusion import swallowed
from tailfin.report.sections.costs import costs
from tailfin.report.sections.errors import errors
from tailfin.report.sections.examples import examples
from tailfin.report.sections.scores import scores

HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "a&amp;b </script>", "%{x} {{ 7*7 }} <b>'")
SECTIONS = (
    "summary",
    "ap-by-frequency-group",
    "ap-against-training-images",
    "classes",
    "errors",
    "what-mistakes-cost",
    "confusion",
    "scores",
    "training",
    "what-the-sampler-fed",
    "example-detections",
    "provenance",
)


def figures(text: str) -> list[dict]:
    """All Plotly figures of a page."""
    blocks = re.findall(r'<script type="application/json">(.*?)</script>', text, re.S)
    return [json.loads(block) for block in blocks]


def pictures(text: str) -> list[Image.Image]:
    """All pictures of a page, decoded."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', text)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_two_finished_runs(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    runs = [make_run("base", data, ap=0.3, found=(1, 2)), make_run("better", data, ap=0.45, masks=True)]
    path = write_report(runs)
    assert path == runs[0].parent / "report.html"
    text = path.read_text()
    assert len(text.encode()) < 12e6
    page = parse_page(text)
    assert page.open == []
    ids = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert ids == {"runs", *SECTIONS}
    every_id = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(every_id) == len(set(every_id))
    assert page.count("h1") == 1 and "base vs better" in page.text
    assert "+15.0" in page.text and "30.0" in page.text  # difference to the first run
    assert page.count("td", **{"class": "best"}) > 5
    for word in (
        "set/base",
        "0123456789ab",
        "2025-03-04 05:06",
        "torch",
        "softmax",
        "rare",
        "tailfin train set",
        "чашка",
    ):
        assert word in page.text
    assert "data.workers" not in page.text  # of the settings only those that differ
    traces = [trace["name"] for figure in figures(text) for trace in figure["data"] if "name" in trace]
    assert {"base", "better", "3 classes better", "0 classes worse"} <= set(traces)
    assert len(pictures(text)) % 3 == 0 and max(max(picture.size) for picture in pictures(text)) <= 480


def test_nothing_comes_from_outside(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    page = parse_page(build_report([make_run("a", make_data())]))
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:", "#")), (tag, key, value)
        assert tag not in ("iframe", "object", "embed", "base")
        assert not any(key.startswith("on") for key in attributes), (tag, attributes)
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy


def test_hostile_names_are_only_text(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data(HOSTILE, file_name="{}<script>'\".png")
    run = make_run("<b>run", data, recipe={"name": "<script>alert(3)</script>"})
    environment = json.loads((run / "environment.json").read_text())
    environment["command"] = "</pre></script><script>alert(4)</script>"
    (run / "environment.json").write_text(json.dumps(environment))
    stage = run / "stages" / "1-train"
    stage.rename(stage.with_name("1-<img src=x>"))
    with (run / "stages" / "1-<img src=x>" / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"iteration": 2000, "loss": 1.0, "<script>part": 1.0}) + "\n")
    reference = make_run("plain", make_data(folder="other"))
    text, plain = build_report([run], title="</title><script>"), build_report([reference])
    page, expected = parse_page(text), parse_page(plain)
    assert page.open == []
    assert page.count("script") == expected.count("script")
    assert page.count("b") == expected.count("b")
    assert all(a.get("src", "").startswith("data:") for tag, a in page.elements if tag == "img")
    assert not any(key.startswith("on") for _, attributes in page.elements for key in attributes)
    for name in HOSTILE:
        assert " ".join(name.split()) in page.text  # shown letter by letter
    assert "49" not in re.findall(r"%\{x\} (\S+)", page.text)
    shown = json.dumps(figures(text), ensure_ascii=False)
    assert "script>" not in shown  # in charts names carry Plotly's own escapes
    assert "a&amp;amp;b &lt;/script&gt;" in shown and "&lt;script&gt;part" in shown
    assert "1<script>'\".png" in page.text


def test_the_card_of_a_run_has_every_stage(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    second = {"loss": "fcbl", "schedule": {"epochs": 2, "batch": 8}}
    run = make_run("two", make_data(), finished=False, recipe={"method": "bacl", "second": second})
    (run / "stages" / "1-train").rename(run / "stages" / "2-classifier")
    text = parse_page(write_report([run]).read_text()).text
    assert "loss softmax → fcbl · sampler plain" in text and "4 → 2 epochs · batch 16 → 8 · sgd · lr 0.02" in text
    assert "(classifier), iteration 550, epoch 2.20 of 2" in text


def test_unfinished_run(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    run = make_run("going", make_data(), finished=False)
    path = write_report([run])
    assert path == run / "report.html"
    page = parse_page(path.read_text())
    assert "unfinished" in page.text and "metrics.json is missing" in page.text
    assert "iteration 550, epoch 2.20 of 4" in page.text
    assert "No run has been evaluated yet" in page.text
    ids = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert ids == {"run", "summary", "training", "what-the-sampler-fed", "provenance"}


def test_an_almost_empty_run(tmp_path: Path, parse_page: Callable) -> None:
    (tmp_path / "run" / "stages").mkdir(parents=True)
    page = parse_page(write_report([tmp_path / "run"]).read_text())
    assert "recipe.yaml is missing" in page.text and "No training lines" in page.text


def test_finished_beside_unfinished(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    page = parse_page(build_report([make_run("a", data), make_run("b", data, finished=False)]))
    assert "b: not evaluated yet." in page.text
    assert page.count("article", **{"class": "card"}) == 2


def test_different_protocols_and_files_are_said(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    one, other = make_run("a", data), make_run("b", data)
    for file, change in (("metrics.json", {"protocol": "coco"}), ("environment.json", {"data": {"val": "cc"}})):
        (other / file).write_text(json.dumps({**json.loads((other / file).read_text()), **change}))
    page = parse_page(build_report([one, other]))
    assert "different protocols" in page.text and "measured on different files" in page.text


def test_group_bars_name_the_classes(make_data: Callable, make_run: Callable) -> None:
    run = make_run("a", make_data())
    bars = next(trace for figure in figures(build_report([run])) for trace in figure["data"] if trace["type"] == "bar")
    ticks = dict(zip([re.sub("<br>", " ", re.sub("</?b>", "", tick)) for tick in bars["x"]], bars["text"], strict=True))
    # the one rare class does not occur in the evaluated file
    assert ticks == {
        "all 3 classes 0–240 images": "30.0",
        "rare": "20.0",
        "common 1 class 12 images": "30.0",
        "frequent 1 class 240 images": "40.0",
    }


def test_groups_protocol(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    run = make_run("a", make_data())
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["bbox"] = {"AP": 0.2, "AP50": 0.3, "AP1": 0.1, "AP2": 0.3}
    for entry in metrics["per_category"]:
        entry["frequency"] = "1" if entry["id"] < 20 else "2"
    (run / "metrics.json").write_text(json.dumps(metrics))
    text = build_report([run])
    assert "group 1" in parse_page(text).text
    bars = next(trace for figure in figures(text) for trace in figure["data"] if trace["type"] == "bar")
    assert [tick.split("<br>")[0] for tick in bars["x"]] == ["<b>all</b>", "<b>group 1</b>", "<b>group 2</b>"]


@pytest.mark.parametrize("category", [None, "../../x", [3], 1.5, True], ids=str)
def test_an_id_that_is_no_number_is_one_message(make_data: Callable, make_run: Callable, category: object) -> None:
    run = make_run("a", make_data())
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["per_category"][0]["id"] = category
    (run / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(UserError, match=r"metrics file .*metrics\.json is damaged"):
        build_report([run])


def test_stages_lie_behind_each_other(make_data: Callable, make_run: Callable) -> None:
    run = make_run("a", make_data())
    shutil.copytree(run / "stages" / "1-train", run / "stages" / "2-tuning")
    loss = figures(build_report([run]))
    figure = next(f for f in loss if f["layout"].get("yaxis", {}).get("title", {}).get("text") == "loss")
    assert figure["layout"]["annotations"][0]["text"] == "tuning"
    assert figure["layout"]["shapes"][0]["x0"] == 1000


def test_class_table_rows(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    section = class_table(read_runs([make_run("a", data, ap=0.3), make_run("b", data, ap=0.25, masks=True)]))
    assert section is not None
    page = parse_page(str(section.html))
    rows = [attributes["data-group"] for tag, attributes in page.elements if tag == "tr" and "data-group" in attributes]
    assert rows == ["", "r", "c", "f"]  # by ascending number of training images
    assert page.text.count("−5.0") == 3 and "mask AP" in page.text


def test_examples_show_misses_hits_and_disagreement(
    make_data: Callable, make_run: Callable, parse_page: Callable
) -> None:
    data = make_data()
    runs = read_runs([make_run("a", data, found=(1, 2)), make_run("b", data, found=(0, 1, 2))])
    section = examples(runs)
    assert section is not None and section == examples(read_runs([run.path for run in runs]))  # deterministic
    page = parse_page(str(section.html))
    badges = [a["class"] for tag, a in page.elements if tag == "span" and (a.get("class") or "").startswith("badge")]
    assert badges == ["badge differs"] * 6 + ["badge missed"] * 6  # six pictures with bolts, six with the last class
    assert page.text.count("bolt taken for cup (0.90)") == 6 and page.text.count("2 of 2 found") == 6
    assert len(pictures(str(section.html))) == 36  # ground truth and two runs
    assert parse_page(str(examples(runs[1:]).html)).count("span", **{"class": "badge found"}) == 6


def test_examples_without_their_data_say_so(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    run = make_run("a", data)
    (data.root / "val" / "3.png").unlink()
    page = parse_page(build_report([run]))
    assert "could not be read" in page.text and "3.png" in page.text
    assert page.count("article", **{"class": "example"}) == 11
    (data.root / "val.json").unlink()
    page = parse_page(build_report([run]))
    assert "No examples: annotation file" in page.text and page.count("article", **{"class": "example"}) == 0


def test_a_run_on_another_file_is_left_out_of_the_examples(
    make_data: Callable, make_run: Callable, parse_page: Callable
) -> None:
    data, copy = make_data(), make_data(folder="copy")
    other = make_data(("x", "y"), folder="other")
    runs = [make_run("a", data), make_run("b", copy), make_run("c", other)]
    page = parse_page(build_report(runs))
    assert "c was evaluated on another file" in page.text and "b was evaluated" not in page.text
    assert page.count("article", **{"class": "example"}) == 12


def test_results_that_do_not_fit_are_said(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    run = make_run("a", make_data())
    detection = {"image_id": 1, "category_id": 6, "bbox": [0, 0, 9, 9], "score": 0.9}
    (run / "results.bbox.json").write_text(json.dumps([detection]))
    assert "No examples: the results hold category ids" in parse_page(build_report([run])).text


def test_unjudged_detections_are_not_wrong(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    document = json.loads((data.root / "val.json").read_text())
    for image in document["images"]:
        image["neg_category_ids"] = []
    (data.root / "val.json").write_text(json.dumps(document))
    run = make_run("a", data, found=(1, 2, 3))
    text = parse_page(build_report([run])).text
    assert "0 of 2 found" not in text and "1 of 2 found" in text
    assert "1 wrong" not in text  # "bolt" taken for "cup", where nobody looked for cups


def test_where_the_report_goes(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    data = make_data()
    one, other = make_run("x/a", data), make_run("y/b", data)
    assert write_report([one, other]) == tmp_path / "runs" / "report.html"
    target = tmp_path / "new" / "page.html"
    assert write_report([one], target, title="My title") == target and "My title" in target.read_text()
    assert sorted(path.name for path in target.parent.iterdir()) == ["page.html"]
    with pytest.raises(UserError, match="is a folder"):
        write_report([one], tmp_path)
    with pytest.raises(UserError, match="cannot be written"):
        write_report([one], target / "below.html")
    with pytest.raises(UserError, match="no run directory given"):
        write_report([])


def test_numbers_as_text() -> None:
    assert [percent(value) for value in (0.12345, -1, None, float("nan"), True)] == ["12.3", "–", "–", "–", "–"]
    assert [signed(value) for value in (0.0123, -0.0123, -0.0002, 0.0)] == ["+1.2", "−1.2", "±0.0", "±0.0"]
    assert [direction(value) for value in (0.0123, -0.0123, -0.0002)] == ["up", "down", "same"]
    assert flat({"a": {"b": [1, 2], "c": None}, "d": {}}) == [("a.b", "1, 2"), ("a.c", "null"), ("d", "{}")]


def test_errors_and_confusion_are_those_of_the_detections(make_data: Callable, make_run: Callable) -> None:
    """One run finds every object; the other takes those of classes 0 and 3 for the next class."""
    data = make_data()
    runs = read_runs([make_run("right", data), make_run("wrong", data, found=(1, 2))])
    text = str(errors(runs).html)
    (figure,) = figures(text)
    shares = {
        trace["name"]: dict(zip(zip(*trace["x"], strict=True), trace["y"], strict=True)) for trace in figure["data"]
    }
    assert shares["correct"]["all", "right"] == 100 and shares["classification"]["all", "right"] == 0
    assert shares["correct"]["common", "wrong"] < 100 and shares["correct"]["frequent", "wrong"] == 100
    text = str(swallowed(runs).html)
    table = text[: text.index("</table>")]
    assert f"{data.names[1]} 100" in table and f"{data.names[0]} 100" in table
    (matrix,) = figures(text)
    assert matrix["data"][0]["type"] == "heatmap"


def test_what_a_cut_leaves_is_said(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    """Of two objects a picture all are found at 0.9 by one run, and half of them, with the other half wrong, by the
    other."""
    data = make_data()
    runs = read_runs([make_run("right", data), make_run("wrong", data, found=(1, 2))])
    text = parse_page(str(scores(runs).html)).text
    assert "right precision 100.0" in text and "recall 100.0" in text
    assert "wrong precision 50.0" in text and "boxes per picture 2.0" in text
    text = parse_page(str(costs(runs).html)).text
    assert "all right 100.0 0.0" in text and "all wrong 41.4 58.6 0.0" in text and "rare wrong 0.0 100.0" in text


def test_names_in_errors_and_confusion_stay_text(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data(names=HOSTILE)
    runs = read_runs([make_run("one", data, found=())])
    for section in (errors(runs), swallowed(runs), costs(runs), scores(runs)):
        page = parse_page(str(section.html))
        shown = [str(attributes["src"]) for tag, attributes in page.elements if tag == "img"]
        assert all(source.startswith("data:image/jpeg;base64,") for source in shown) and page.open == []
    assert HOSTILE[0] in parse_page(str(swallowed(runs).html)).text


def test_results_whose_annotations_are_gone_are_said(make_data: Callable, make_run: Callable) -> None:
    data = make_data()
    runs = read_runs([make_run("one", data)])
    (data.root / "val.json").unlink()
    assert "val.json is not there any more" in str(errors(runs).html)
    assert swallowed(runs) is None
