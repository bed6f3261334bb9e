"""Class and picture names that are code for a page, a terminal or a spreadsheet go through every command as text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tailfin.report.page import label

SCRIPT = "<script>alert(1)</script>"
NAMES = {
    "red": SCRIPT,
    "green": "[/red] [bold]",
    "blue": "\x1b[31mred\x1b]0;title\x07",
    "a": "two\nlines\tand a tab",
    "b": '=HYPERLINK("http://evil.example")',
    "c": "\u202egnp.exe\u202c",
    "d": '"><img src=x onerror=alert(1)>',
    "e": "{{ 7 * 7 }} {% raw %} %s %n",
    "f": "+1 -1 @SUM(A1)",
    "g": "\u2066\u200f",
}
OBEYED = ("\x1b", "\x07", "\u202e", "\u202c", "\u2066", "\u200f")
TAGS = ("<script>alert", "<img src=x", *OBEYED)


@pytest.fixture(scope="module")
def hostile_set(tmp_path_factory: pytest.TempPathFactory, tiny_set: tuple[Path, Path]) -> tuple[Path, Path]:
    """The tiny set with hostile names of its classes, of classes without annotations, and of one picture."""
    folder = tmp_path_factory.mktemp("hostile")
    made = []
    for source in tiny_set:
        document = json.loads(source.read_text())
        for number, (old, name) in enumerate(NAMES.items()):
            known = [category for category in document["categories"] if category["name"] == old]
            if known:
                known[0]["name"] = name
            else:
                document["categories"].append({"id": 20 + number, "name": name})
        path = folder / source.name
        shutil.copytree(source.with_suffix(""), path.with_suffix(""))
        image = document["images"][0]
        strange = "\x1b[31m<b>\u202e.png"
        path.with_suffix("").joinpath(image["file_name"]).rename(path.with_suffix("") / strange)
        image["file_name"] = strange
        path.write_text(json.dumps(document))
        made.append(path)
    return made[0], made[1]


def quiet(outcome: Any) -> Any:
    """Nothing that a terminal obeys was printed, and the command did its work."""
    assert outcome.code == 0, outcome.err
    for mark in OBEYED:
        assert mark not in outcome.out and mark not in outcome.err, repr(mark)
    return outcome


def harmless(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    for tag in TAGS:
        assert tag not in text, repr(tag)
    return text


def test_every_command_takes_names_as_text(tailfin, hostile_set, tiny_recipe, tmp_path):
    train, val = hostile_set
    run = tmp_path / "run"
    quiet(tailfin("data", "check", train, "--decode"))
    plot = tmp_path / "stats.html"
    shown = quiet(tailfin("data", "stats", train, "--plot", plot, "--all-classes"))
    assert "[/red] [bold]" in shown.out and "\\x1b[31mred" in shown.out
    harmless(plot)
    common = ["--train", train, "--val", val, "schedule.epochs=1", "schedule.warmup=500", "sampler.threshold=1e-9"]
    plan = quiet(tailfin("train", tiny_recipe, *common, "--dry-run", "--out", tmp_path / "plan"))
    assert "repeats no picture" in " ".join(plan.out.split())
    quiet(tailfin("train", tiny_recipe, *common, "--out", run))
    page = harmless(run / "report.html")
    assert label(NAMES["c"]) == "\\u202egnp.exe\\u202c"  # in charts
    assert "&lt;script&gt;" in page
    table = quiet(tailfin("evaluate", run, "--per-category")).out
    assert "=HYPERLINK" in table and "[/red] [bold]" in table and "two\\nlines" in table
    results = tmp_path / "found.json"
    quiet(tailfin("predict", run, val.with_suffix(""), "--out", results, "--draw", tmp_path / "drawn", "--score", "0"))
    named = {entry["category_name"] for entry in json.loads(results.read_text()) if "category_name" in entry}
    assert named <= set(NAMES.values())  # in files they are as they were


def test_errors_show_names_as_text(tailfin, hostile_set, edited, tiny_recipe):
    def broken(document: dict[str, Any]) -> None:
        document["annotations"][0]["bbox"] = [1, 2, -3, 4]
        document["images"][0]["file_name"] = "\x1b[2J\u202egone.png"

    path = edited(hostile_set[0], broken)
    for words in (("data", "check", path, "--all"), ("train", tiny_recipe, "--train", path)):
        outcome = tailfin(*words)
        assert outcome.code == 2
        assert not [mark for mark in OBEYED if mark in outcome.err + outcome.out]


def test_voc_and_yolo_with_such_names(tailfin, tmp_path):
    from PIL import Image

    folder = tmp_path / "voc"
    (folder / "Annotations").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    Image.new("RGB", (40, 30)).save(folder / "JPEGImages" / "a.png")
    name = "&lt;script&gt;=1+1&#x202e;"
    (folder / "Annotations" / "a.xml").write_text(
        f"<annotation><filename>a.png</filename><size><width>40</width><height>30</height></size><object>"
        f"<name>{name}</name><bndbox><xmin>5</xmin><ymin>6</ymin><xmax>20</xmax><ymax>20</ymax></bndbox></object>"
        "</annotation>"
    )
    outcome = quiet(tailfin("data", "convert", folder, tmp_path / "out.json"))
    assert outcome.code == 0
    (category,) = json.loads((tmp_path / "out.json").read_text())["categories"]
    assert category["name"] == "<script>=1+1\u202e"
