"""The page in headless Chromium: nothing on its console, tables that sort and filter, no sideways scroll.

A script at the end of a copy of the page does what a reader would, and leaves what it saw in the document.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tailfin
from tailfin.report import build_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt install chromium)")
LOOK = """
<script>
addEventListener("load", () => setTimeout(() => {
  const rows = table => [...document.querySelectorAll(`#${table} tbody tr`)].filter(row => row.offsetParent !== null);
  const names = () => rows("class-table").map(row => row.querySelector("th").textContent.trim());
  const seen = {before: names()};
  const head = [...document.querySelectorAll("#class-table thead button")];
  head[0].click(); seen.sorted = names();
  head[0].click(); seen.reversed = names();
  const filter = document.querySelector("[data-filter=confusion-table]");
  filter.value = "bolt"; filter.dispatchEvent(new Event("input", {bubbles: true}));
  seen.filtered = rows("confusion-table").length;
  const rare = document.querySelector("[data-groups=class-table] [data-group=r]");
  rare.click(); seen.rare = names();
  seen.charts = document.querySelectorAll(".main-svg").length;
  const chart = document.querySelector(".js-plotly-plot");
  Plotly.Fx.hover(chart, [{curveNumber: 0, pointNumber: 0}]);
  seen.hover = [...chart.querySelectorAll(".hoverlayer text")].map(text => text.textContent).join(" ");
  seen.width = document.documentElement.scrollWidth;
  seen.window = innerWidth;
  const note = document.createElement("pre"); note.id = "seen"; note.textContent = JSON.stringify(seen);
  document.body.append(note);
}, 1500));
</script>
"""


def opened(text: str, folder: Path, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """What the script saw, and what the page wrote to the console."""
    file = folder / "page.html"
    file.write_text(str(text).replace("</body>", f"{LOOK}</body>"))
    return look(file, folder, *flags)


def look(file: Path, folder: Path, *flags: str) -> tuple[dict[str, Any], list[str]]:
    """What the script of a file left in the document, and what was written to the console."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        "--virtual-time-budget=20000",
        *flags,
    ]
    done = subprocess.run([*command, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=120)
    (seen,) = re.findall(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    return json.loads(html.unescape(seen)), [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.mark.parametrize("flags", [("--window-size=1300,900",), ("--window-size=500,844", "--force-dark-mode")])
def test_the_page_works_in_a_browser(make_data: Callable, make_run: Callable, tmp_path: Path, flags) -> None:
    data = make_data()
    runs = [make_run("base", data), make_run("better", data, ap=0.45, found=(1, 2))]
    seen, console = opened(build_report(runs), tmp_path, *flags)
    assert console == []
    assert seen["before"] == ["чашка", "bolt", "cup", "traffic light"]  # by training images
    assert seen["sorted"] == sorted(data.names) and seen["reversed"] == sorted(data.names)[::-1]
    assert seen["filtered"] == 1 and seen["rare"] == ["bolt"]
    assert seen["charts"] >= 5
    assert seen["width"] <= seen["window"]  # wide tables scroll within their own frame
    assert seen["hover"]


@pytest.mark.usefixtures("quick_training")
def test_the_page_of_two_trained_runs(tmp_path: Path, tiny_set, tiny_recipe) -> None:
    train, val = tiny_set
    short = {"schedule.epochs": 1}
    runs = [
        tailfin.train(tiny_recipe, train=train, val=val, out=tmp_path / loss, overrides={**short, "loss": loss})
        for loss in ("softmax", "seesaw")
    ]
    seen, console = opened(build_report(runs), tmp_path, "--window-size=1300,900")
    assert console == []
    assert seen["before"] and seen["sorted"] == sorted(seen["before"]) and seen["reversed"] == seen["sorted"][::-1]
    assert seen["charts"] >= 5 and seen["hover"] and seen["width"] <= seen["window"]


def test_names_stay_text_in_a_browser(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    data = make_data(names=("<script>document.title='bad'</script>", "bolt"))
    text = build_report([make_run("one", data)])
    seen, console = opened(text, tmp_path, "--window-size=1300,900")
    assert console == [] and seen["before"][0] in data.names and len(seen["sorted"]) == 2


NARROW = """
<!doctype html><html><body><iframe id="page" width="390" height="844"></iframe><script>
const frame = document.getElementById("page");
frame.srcdoc = TEXT;
const boxes = (holder, query) => [...holder.querySelectorAll(query)].map(one => one.getBoundingClientRect())
  .filter(box => box.width);
const touch = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 2;
frame.addEventListener("load", () => setTimeout(() => {
  if (!frame.contentDocument || !frame.contentDocument.querySelector("footer")) return;  // the empty page before it
  const inner = frame.contentDocument, seen = {overlaps: [], charts: 0, width: inner.documentElement.scrollWidth};
  inner.querySelectorAll(".js-plotly-plot").forEach((holder, place) => {
    seen.charts += 1;
    const titles = boxes(holder, ".annotation-text-g text, .annotation text");
    const marks = boxes(holder, ".ytick text, .xtick text");
    const all = [...titles, ...boxes(holder, ".ytick text, .legendtext, .xtitle, .ytitle")];
    all.forEach((one, i) => all.slice(0, i).forEach(other => touch(one, other) && seen.overlaps.push([place, i])));
    titles.forEach(one => marks.forEach(mark => touch(one, mark) && seen.overlaps.push([place, "title"])));
  });
  inner.querySelector("[data-table]").click();
  seen.cells = inner.querySelectorAll(".values td").length;
  inner.querySelector("button[data-curve]").click();
  seen.curve = !inner.getElementById("class-curve").hidden;
  inner.querySelector("a[data-find]").click();
  seen.filter = inner.querySelector("[data-filter=confusion-table]").value;
  const note = document.createElement("pre"); note.id = "seen"; note.textContent = JSON.stringify(seen);
  document.body.append(note);
}, 2500));
</script></body></html>
"""


def test_nothing_overlaps_at_390_pixels(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    data = make_data()
    runs = [make_run("a first run", data), make_run("another, better one", data, ap=0.45, found=(1, 2))]
    text = json.dumps(str(build_report(runs))).replace("</", "<\\/")
    text = text.replace("content-visibility: auto", "content-visibility: visible")  # all sections are looked at
    file = tmp_path / "narrow.html"
    file.write_text(NARROW.replace("TEXT", text))
    seen, console = look(file, tmp_path, "--window-size=1300,900", "--disable-web-security")
    assert console == [] and seen["charts"] >= 8
    assert seen["overlaps"] == [] and seen["width"] <= 390
    assert seen["cells"] > 4 and seen["curve"] and seen["filter"] == "чашка"
