"""Reading run directories: unfinished, cut off, resumed and broken ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tailfin.errors import UserError
from tailfin.report.runs import read_run, read_runs, signature
from tailfin.report.sections.overview import duration, training_seconds


def test_finished_run(make_data: Callable, make_run: Callable) -> None:
    run = read_run(make_run("a", make_data()))
    assert run.status == "finished" and run.missing == []
    stage = run.stages[0]
    assert stage.name == "train" and len(stage.evaluations) == 4 and stage.broken_lines == 0
    assert stage.parts == ["classification", "box", "rpn_objectness", "rpn_box"]
    assert stage.training["iteration"].tolist() == list(range(10, 1001, 10))
    assert training_seconds(run) == 300


def test_unfinished_run_with_a_cut_line(make_data: Callable, make_run: Callable) -> None:
    run = read_run(make_run("a", make_data(), finished=False))
    assert run.status == "unfinished" and run.metrics is None
    assert len(run.stages[0].training["loss"]) == 55 and run.stages[0].broken_lines == 0
    assert any("metrics.json" in sentence for sentence in run.missing)
    assert any("results.bbox.json" in sentence for sentence in run.missing)


def test_lines_written_again_after_a_resume_count_once(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "stages" / "1-a"
    stage.mkdir(parents=True)
    lines = [{"iteration": i, "loss": float(attempt)} for attempt, last in ((1, 6), (2, 9)) for i in range(3, last)]
    (stage / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    training = read_run(tmp_path / "run").stages[0].training
    assert training["iteration"].tolist() == [3, 4, 5, 6, 7, 8] and set(training["loss"]) == {2.0}


def test_odd_lines(tmp_path: Path) -> None:
    stage = tmp_path / "run" / "stages" / "1-a"
    stage.mkdir(parents=True)
    text = (
        '{"iteration": 1, "loss": NaN}\nnot json\n[1]\n\n{"iteration": 2, "loss": 1.0, "extra": true}\n{"iteration": 3'
    )
    (stage / "metrics.jsonl").write_text(text)
    read = read_run(tmp_path / "run").stages[0]
    assert read.broken_lines == 2 and set(read.training) == {"iteration", "loss"}
    assert np.array_equal(read.training["loss"], [np.nan, 1.0], equal_nan=True)


def test_stages_follow_their_numbers(tmp_path: Path) -> None:
    for name in ("10-last", "2-second", "1-first"):
        (tmp_path / "run" / "stages" / name).mkdir(parents=True)
    assert [stage.name for stage in read_run(tmp_path / "run").stages] == ["first", "second", "last"]


def test_names_that_clash_get_their_folders(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    data = make_data()
    runs = [make_run(f"{parent}/last", data) for parent in ("x", "y")] + [make_run("z", data)]
    assert [run.name for run in read_runs(runs)] == ["x/last", "y/last", "z"]
    assert [run.name for run in read_runs([runs[2], runs[2]])] == ["z", "z (2)"]


def test_a_recipe_of_another_version_keeps_its_text(make_data: Callable, make_run: Callable) -> None:
    path = make_run("a", make_data())
    (path / "recipe.yaml").write_text("no_such_key: 1\n")
    run = read_run(path)
    assert run.recipe is None and run.recipe_text == "no_such_key: 1\n"
    assert any("no_such_key" in sentence for sentence in run.missing)


def test_mistakes_name_the_path_and_the_nearest(make_data: Callable, make_run: Callable, tmp_path: Path) -> None:
    path = make_run("baseline", make_data())
    with pytest.raises(UserError, match='baselin does not exist.*did you mean "baseline"'):
        read_run(path.parent / "baselin")
    with pytest.raises(UserError, match="is a file: give the run directory"):
        read_run(path / "recipe.yaml")
    with pytest.raises(UserError, match="runs is not a run directory: it has no recipe.yaml.*baseline"):
        read_run(path.parent)
    (path / "metrics.json").write_text("{")
    with pytest.raises(UserError, match="metrics.json is not valid JSON"):
        read_run(path)


def test_signature_follows_the_files(make_data: Callable, make_run: Callable) -> None:
    path = make_run("a", make_data(), finished=False)
    before = signature([path])
    assert signature([path]) == before
    with (path / "stages" / "1-train" / "metrics.jsonl").open("a") as file:
        file.write("\n")
    changed = signature([path])
    (path / "metrics.json").write_text("{}")
    assert len({before, changed, signature([path])}) == 3


def test_durations() -> None:
    assert [duration(s) for s in (0, 12.4, 250, 7500)] == ["", "12 s", "4 min 10 s", "2 h 05 min"]
