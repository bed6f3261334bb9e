"""benchmarks/performance.py: it takes lines that scripts print, and docs/performance.md is what it makes of them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.table import Table

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def performance() -> ModuleType:
    if not FOLDER.is_dir():
        pytest.skip("the benchmarks come with the source tree only")
    sys.path.insert(0, str(FOLDER))  # it has neighbours
    return importlib.import_module("performance")


def test_lines_come_from_what_a_script_prints(performance, monkeypatch, capsys):
    form = importlib.import_module("short_form")
    table = Table("", "tailfin", "peer", "ratio", "range")
    table.add_row("training,\nimages/s", "12.0", "10.0", "1.20", "1.10 .. 1.30")
    table.add_row("alone", "3.0", "", "", "")
    form.table_lines(table, "R18: ", unit="/s", spread=4, who="torchvision")
    print("| recipe | train | 16 | 1,145 | 267 | 3 | 2 | 47.19 G | 2.01 GiB |\n┃ no line ┃\nmore | text")
    printed = capsys.readouterr().out
    monkeypatch.setattr(
        performance.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0, stdout=printed, stderr="")
    )
    few, many, [about] = performance.measured("startup.py")
    assert few == [["R18: training, images/s", "12.0/s", "torchvision 10.0/s", "1.20 (1.10 to 1.30)"],
                   ["R18: alone", "3.0/s", "", ""]]  # fmt: skip
    assert many == [["recipe", "train", "16", "1,145", "267", "3", "2", "47.19 G", "2.01 GiB"]]
    assert len(about) == performance.CELLS[2]
    found = {"startup.py": (few, many, [about]), "loss_speed.py": ([["a loss", "1 ms", "", "0.5"]], [], [about])}
    assert performance.read(performance.page(found)) == found


def test_a_script_that_fails_or_says_nothing_is_told(performance, monkeypatch):
    done = subprocess.CompletedProcess([], 0, "no lines", "")
    monkeypatch.setattr(performance.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(SystemExit, match="startup.py printed no line"):
        performance.measured("startup.py")
    done.returncode, done.stderr = 1, "what went wrong"
    with pytest.raises(SystemExit, match="what went wrong"):
        performance.measured("startup.py")


def test_nothing_on_the_page_is_written_by_hand(performance):
    text = performance.PAGE.read_text(encoding="utf-8")
    found = performance.read(text)
    assert performance.page(found) == text
    assert found and set(found) <= set(performance.COMMANDS)
    assert all((FOLDER / command.split()[0]).is_file() for command in performance.COMMANDS)
