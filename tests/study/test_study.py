"""`tailfin study`: equal steps, shared stages, cells that are run once, resumed or left, and what the tables say."""

from __future__ import annotations

import csv
import json
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import typer
from scipy.stats import ttest_rel
from typer.testing import CliRunner

from tailfin import api
from tailfin.cli import study as command
from tailfin.errors import UserError
from tailfin.report import build
from tailfin.schema.calibration import NorCal
from tailfin.study import loop, state, tables, work
from tailfin.study.cells import Cell, differing, donor, make_cells, shared
from tailfin.study.collect import difference
from tailfin.study.executors import executor
from tailfin.study.plan import minutes_left, seconds_per_step, status_lines, to_train
from tailfin.study.spec import dump_study, keep, load_study, open_study, placed_sets

SECOND = "{loss: {name: fcbl}, schedule: {epochs: 1, warmup: 0, milestones: [0.5]}}"
STUDY = """
sets:
  tiny: {{recipe: {recipe}, values: {{t: 0.5}}, overrides: {{data.train: {train}, data.val: {val}}}}}
control: plain
steps: 13
overrides: {{sampler: plain}}
arms:
  plain: {{seeds: [0, 1]}}
  rfs: {{overrides: {{sampler: {{name: rfs, threshold: $t}}}}}}
  two: {{overrides: {{method: bacl, loss: objectness, second: {second}}}}}
  margin: {{overrides: {{method: bacl, loss: objectness, second: {second}, second.loss.reweight: false}}, control: two}}
  norcal: {{calibrate: {{of: plain, method: norcal, strength: 0.6}}}}
"""


@pytest.fixture
def file(tmp_path, tiny_set, tiny_recipe):
    train, val = ("{" + f"annotations: {path}, images: {path.with_suffix('')}" + "}" for path in tiny_set)
    path = tmp_path / "grid.yaml"
    path.write_text(STUDY.format(recipe=tiny_recipe, train=train, val=val, second=SECOND))
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


def cells_of(file: Path, out: Path, **options) -> list[Cell]:
    return make_cells(load_study(file), out, **options)


def pretend(monkeypatch, results):
    """Commands that only write what a run would: `results` are exit codes by arm, in order; returns what was called."""
    called = []

    def tailfin(job, log, arguments):
        folder = Path(job.folder)
        arm = folder.parent.name
        called.append((arm, arguments))
        code = results.get(arm, [0]).pop(0) if results.get(arm) else 0
        if arguments[0] == "calibrate":
            return code
        stage = folder / "stages" / "1-train"
        stage.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text("")
        done = 5 if code else 13
        (stage / "metrics.jsonl").write_text(json.dumps({"iteration": done, "loss": 1.0, "seconds": 2.0 * done}) + "\n")
        if code:
            log.write("error: a class has no name\nmore words\n")
        else:
            seed = int(folder.name[-1])
            numbers = {"AP": 0.1 + 0.01 * seed, "AP50": 0.3, "APr": -1.0, "APc": 0.2, "APf": 0.3}
            (folder / "metrics.json").write_text(json.dumps({"bbox": numbers}))
            (folder / "environment.json").write_text(json.dumps({"commit": "abc", "versions": {"tailfin": "1"}}))
        return code

    monkeypatch.setattr(work, "tailfin", tailfin)
    monkeypatch.setattr(tables, "write_report", lambda runs, out, title: out)
    monkeypatch.setattr(tables.PictureIntervals, "of", lambda *_: {})
    return called


def run(file, out, **options):
    study = load_study(file)
    cells = make_cells(study, out)
    return loop.run_cells(study, cells, out, say=lambda text: None, poll=0.001, **options), cells


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("control: plain\n", "control: plane\n"), 'control: there is no "plane" (did you mean "plain"?)'),
        (("threshold: $t", "threshold: $tt"), "the set has no value $tt"),
        (("of: plain", "of: plaid"), 'there is no "plaid" (did you mean "plain"?)'),
        (("norcal: {calibrate", "norcal: {overrides: {seed: 1}, calibrate"), "no place beside calibrate"),
        (("steps: 13", "stepz: 13"), 'did you mean "steps"'),
        (("loss: objectness, second: {loss", "loss: objectnes, second: {loss"), "arms.two on set tiny"),
        (("steps: 13", "steps: [6, 7]"), "steps has 2 numbers for 1 stages (train)"),
    ],
)
def test_a_mistake_is_one_line(file, out, change, message):
    file.write_text(file.read_text().replace(*change, 1))
    with pytest.raises(UserError) as told:
        cells_of(file, out)
    assert message in str(told.value) and "\n" not in str(told.value)


def test_every_cell_has_the_steps_that_are_asked_for(file, out):
    cells = cells_of(file, out)
    assert [cell.name for cell in cells][:4] == [f"tiny/{arm}/seed-0" for arm in ("plain", "rfs", "two", "margin")]
    assert [cell.name for cell in cells][-2:] == ["tiny/plain/seed-1", "tiny/norcal/seed-1"]
    assert {cell.total_steps for cell in cells} == {13}
    by_arm = {cell.arm: cell for cell in cells}
    assert by_arm["two"].steps == {"representation": 6, "classifier": 7}
    # the rate drops where it did: after four fifths of an arm's epochs, whatever these are
    for arm in ("plain", "rfs"):
        schedule = by_arm[arm].recipe.schedule
        assert schedule.milestones[0] / schedule.epochs == pytest.approx(0.8, abs=1e-3)
    assert by_arm["rfs"].recipe.schedule.epochs < by_arm["plain"].recipe.schedule.epochs
    assert differing(cells) == []
    file.write_text(file.read_text().replace("rfs: {", "rfs: {steps: own, "))
    assert differing(cells_of(file, out))[0].startswith("tiny/rfs, seed 0: optimiser steps ")


def test_the_words_of_a_cell_make_its_recipe(file, out):
    for cell in cells_of(file, out):
        if cell.calibrate is None:
            _, recipe, *overrides = cell.words
            assert api.load_recipe(recipe, [*overrides, *cell.files]) == cell.recipe
            assert not any(word.startswith("data.train") for word in cell.words)


def test_stages_are_shared_where_they_are_equal(file, out):
    cells = {cell.arm: cell for cell in cells_of(file, out) if cell.seed == 0}
    assert shared(cells["two"], cells["margin"]) == 1
    assert shared(cells["plain"], cells["two"]) == 0 == shared(cells["plain"], cells["rfs"])
    everything = list(cells.values())
    assert donor(cells["margin"], everything) == (None, 0)
    fates = {cell.name: state.fate(cell) for cell in everything}
    assert to_train(cells["two"], everything, fates) == 13 and to_train(cells["margin"], everything, fates) == 7
    first = cells["two"].stage_files()[0]
    first.parent.mkdir(parents=True)
    first.touch()
    assert donor(cells["margin"], everything) == (cells["two"], 1)
    assert loop.job_of(cells["margin"], everything, load_study(file)).reuse == str(cells["two"].folder)
    assert loop.ready(cells["margin"], everything, [], [])


def test_a_cell_waits_for_the_one_that_trains_what_both_have(file, out):
    cells = {cell.arm: cell for cell in cells_of(file, out) if cell.seed == 0}
    everything = list(cells.values())
    assert not loop.ready(cells["margin"], everything, [cells["two"]], [cells["margin"]])
    assert not loop.ready(cells["margin"], everything, [], [cells["two"], cells["margin"]])
    assert loop.ready(cells["margin"], everything, [cells["plain"]], [cells["margin"], cells["two"]])
    assert not loop.ready(cells["norcal"], everything, [cells["plain"]], [cells["norcal"]])


def test_cells_run_once_go_on_and_fail_alone(file, out, monkeypatch):
    """One that was stopped goes on, one that failed waits until it is asked for, all others finish."""
    called = pretend(monkeypatch, {"rfs": [1, 0], "two": [143, 0], "margin": [143, 143]})
    monkeypatch.setattr(work, "load_model_file", lambda path: path.touch() or _Model())
    fates, cells = run(file, out)
    by_arm = {cell.arm: fates[cell.name] for cell in cells if cell.seed == 0}
    assert {arm: own.state for arm, own in by_arm.items()} == {
        "plain": "finished",
        "rfs": "failed",
        "two": "finished",
        "margin": "stopped",  # it got no further the second time
        "norcal": "finished",
    }
    assert by_arm["rfs"].line == "error: a class has no name"
    two = [arguments for arm, arguments in called if arm == "two"]
    assert two[0][:2] == ["train", cells[0].words[1]] and two[1] == ["train", "--resume", str(cells[2].folder)]
    norcal = [arguments for arm, arguments in called if arm == "norcal"]
    assert norcal[0][0] == "calibrate" and "--strength=0.6" in norcal[0]
    assert norcal[1][0] == "train" and norcal[1][-2:] == ["--reuse", str(cells[0].folder)]
    assert any(word.startswith("calibration={") for word in norcal[1])
    shown = "\n".join(status_lines(cells, fates, 1))
    assert "8 cells" not in shown and "failed tiny/rfs/seed-0: error: a class has no name" in shown
    assert "stopped tiny/margin/seed-0: step 5 of 13" in shown and "minutes of training left" in shown

    before = len(called)
    again, _ = run(file, out)  # only what was stopped
    assert {arm for arm, _ in called[before:]} == {"margin"} and again["tiny/rfs/seed-0"].state == "failed"
    before = len(called)
    again, _ = run(file, out, retry=True)
    assert [arm for arm, _ in called[before:]] == ["rfs"] and not loop.unfinished(again)
    assert run(file, out, retry=True)[0].keys() == again.keys() and len(called) == before + 1


def test_some_arms_take_stages_that_the_others_have_finished(file, out, monkeypatch):
    called = pretend(monkeypatch, {})
    study = load_study(file)
    (margin,) = make_cells(study, out, arms=["margin"], seeds=[0])
    others = [cell for cell in make_cells(study, out) if cell.name != margin.name]
    two = next(cell for cell in others if cell.arm == "two" and cell.seed == margin.seed)
    fates = {cell.name: state.fate(cell) for cell in (margin, *others)}
    assert to_train(margin, [margin], fates, others) == 13
    two.stage_files()[0].parent.mkdir(parents=True)
    two.stage_files()[0].touch()
    assert to_train(margin, [margin], fates, others) == 7 and to_train(margin, [margin], fates) == 13
    loop.run_cells(study, [margin], out, others=others, say=lambda text: None, poll=0.001)
    assert [arm for arm, _ in called] == ["margin"] and called[0][1][-2:] == ["--reuse", str(two.folder)]


def test_what_was_trained_by_another_command_is_refused(file, out, monkeypatch):
    pretend(monkeypatch, {})
    monkeypatch.setattr(work, "load_model_file", lambda path: path.touch() or _Model())
    run(file, out)
    file.write_text(file.read_text().replace("steps: 13", "steps: 14"))
    with pytest.raises(UserError, match="begun by another command"):
        run(file, out)


def test_minutes_come_from_steps_that_were_taken(file, out, monkeypatch):
    pretend(monkeypatch, {"rfs": [1]})
    study, cells = load_study(file), cells_of(file, out)
    fates = loop.run_cells(study, cells, out, most=2, say=lambda text: None, poll=0.001)
    rates = seconds_per_step(cells, fates)
    assert rates["tiny", "plain"] == 2.0 and rates["tiny", ""] == 2.0
    # rfs 8, two 13, margin 7 of its own, plain's second seed 13; two cells at a time
    assert minutes_left(cells, fates, rates, workers=2) == pytest.approx((8 + 13 + 7 + 13) * 2 / 60 / 2)
    assert minutes_left(cells, fates, {}, 1) is None


def test_differences_are_paired(monkeypatch):
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.3, 0.02, 5), rng.normal(0.28, 0.02, 5)
    rows = [
        {"set": "s", "arm": arm, "seed": seed, "AP": value}
        for arm, values in (("one", one), ("two", two))
        for seed, value in enumerate(values)
    ]
    rows.append({"set": "s", "arm": "one", "seed": 9, "AP": 5.0})  # has no partner
    found = difference(rows, "s", "one", "two", "AP")
    low, high = ttest_rel(one, two).confidence_interval()
    assert found.seeds == 5 and (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert difference(rows[:1] + rows[5:6], "s", "one", "two", "AP").half is None
    assert difference(rows[:5], "s", "one", "two", "AP") is None
    assert tables.difference_text(rows, "s", "one", "two", "AP").startswith("**") == (low * high > 0)
    one_seed = rows[:1] + rows[5:6]
    assert tables.difference_text(one_seed, "s", "one", "two", "AP", (0.01, 0.02)).endswith("[+0.010, +0.020]**")
    assert not tables.difference_text(one_seed, "s", "one", "two", "AP", (-0.01, 0.02)).startswith("*")


def test_real_cells_share_a_stage_and_are_compared(file, out, monkeypatch, quick_training):
    """Trained in this process: a stage is taken from another cell, a calibration trains nothing, tables have all."""

    def tailfin(job, log, arguments):
        options = dict(zip(arguments[-4::2], arguments[-3::2], strict=True))
        if arguments[0] == "calibrate":
            from tailfin.calibrate.model import calibrate

            calibrate(arguments[1], arguments[3], method="norcal", strength=0.6, train=job.train)
        else:
            overrides = [word for word in arguments[2:] if "=" in word]
            api.train(arguments[1], overrides=overrides, out=job.folder, reuse=options.get("--reuse"))
        return 0

    monkeypatch.setattr(work, "tailfin", tailfin)
    monkeypatch.setattr(build, "plotly_script", lambda: "")
    file.write_text(file.read_text().replace("seeds: [0, 1]", "seeds: [0]").replace("  rfs:", "  # rfs:"))
    study, cells = load_study(file), cells_of(file, out)
    keep(study, out)
    fates = loop.run_cells(study, cells, out, say=lambda text: None, poll=0.01)
    assert {own.state for own in fates.values()} == {"finished"}, [own.line for own in fates.values()]
    reused = json.loads((out / "tiny" / "margin" / "seed-0" / "environment.json").read_text())["reused"]
    assert [stage["stage"] for stage in reused] == ["representation"]
    calibrated = api.load(out / "tiny" / "norcal" / "seed-0")
    assert calibrated.recipe.calibration.gamma == 0.6
    assert state.progress(out / "tiny" / "two" / "seed-0")[0] == 13
    monkeypatch.setattr(tables, "write_report", lambda runs, out, title: out)
    tables.write_tables(study, cells, fates, out)
    lines = list(csv.DictReader((out / "study.csv").open()))
    assert [line["arm"] for line in lines] == ["plain", "two", "margin", "norcal"]
    assert {line["steps"] for line in lines} == {"13"} and lines[2]["taken"] == "representation"
    assert "| margin | 0 |" in (out / "study.md").read_text()
    lines = list(csv.DictReader((out / "differences.csv").open()))
    assert all(float(line["low_pictures"]) <= float(line["high_pictures"]) for line in lines if line["metric"] == "AP")
    known = json.loads((out / "pictures.json").read_text())
    assert list(known) == ["tiny/two/plain", "tiny/margin/two", "tiny/norcal/plain"]
    monkeypatch.setattr("tailfin.study.bootstrap.paired_bootstrap", None)  # what is known is not drawn again
    tables.write_tables(study, cells, fates, out)
    again, _ = open_study(out)
    assert dump_study(again) == dump_study(study)


def test_sets_without_a_place_are_left_out(file, out, tmp_path):
    file.write_text(file.read_text().replace("control: plain", "  other: {recipe: demo/bacl}\ncontrol: plain", 1))
    assert {cell.set for cell in cells_of(file, out)} == {"tiny"}
    with pytest.raises(UserError, match='no set "others" .did you mean "other"'):
        cells_of(file, out, sets=["others"])
    keep(load_study(file, {"other": str(tmp_path)}), out)
    keep(load_study(file), out)
    assert open_study(out)[0].sets["other"].root == str(tmp_path)
    assert placed_sets(load_study(file)) == ["tiny"]


def test_the_command(file, out, monkeypatch):
    pretend(monkeypatch, {"rfs": [1]})
    monkeypatch.setattr(work, "load_model_file", lambda path: path.touch() or _Model())
    monkeypatch.setattr(loop, "POLL", 0.001)
    study = typer.Typer()
    study.command()(command.study)
    planned = CliRunner().invoke(study, [str(file), "--out", str(out), "--plan"])
    assert planned.exit_code == 0 and "6 + 7" in planned.output and not out.exists()
    found = CliRunner().invoke(study, [str(file), "--out", str(out), "--arms", "plain,rfs", "--seeds", "0"])
    assert found.exit_code == 1 and "failed tiny/rfs/seed-0: error: a class has no name" in found.output
    shown = CliRunner().invoke(study, ["show", str(out)])
    assert "1 finished, 1 failed" in shown.output and "waiting" in shown.output
    CliRunner().invoke(study, [str(file), "--out", str(out), "--arms", "two", "--tables"])
    assert "| plain | 0 |" in (out / "study.md").read_text()  # tables are of all that is there
    wrong = CliRunner().invoke(study, [str(file), "--arms", "plane"])
    assert isinstance(wrong.exception, UserError) and 'did you mean "plain"' in str(wrong.exception)


def test_missing_libraries_are_named(tmp_path, monkeypatch):
    for name, extra in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, name, None)
        with (
            pytest.raises(UserError, match=rf"tailfin\[{extra}\]"),
            executor(name, workers=1, threads=1, resources={}, logs=tmp_path),
        ):
            pass


def test_ray_and_submitit_are_handed_cells(tmp_path, monkeypatch):
    """What is asked of the libraries, with stand-ins for them: they run `run_job` on a job and return a future."""
    from concurrent.futures import Future
    from types import SimpleNamespace

    asked = {}

    def future(value):
        done = Future()
        done.set_result(value)
        return done

    def remote(**options):
        asked["ray"] = options
        return lambda run: SimpleNamespace(remote=lambda job: SimpleNamespace(future=lambda: future((run, job))))

    class AutoExecutor:
        def __init__(self, folder, cluster):
            asked["cluster"] = cluster

        def update_parameters(self, **parameters):
            asked["submitit"] = parameters

        def submit(self, run, job):
            return future((run, job))

    ray = SimpleNamespace(is_initialized=lambda: True, remote=remote)
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "submitit", SimpleNamespace(AutoExecutor=AutoExecutor))
    for name, resources in (("ray", {"num_gpus": 1}), ("submitit", {"cluster": "slurm", "gpus_per_node": 1})):
        with executor(name, workers=2, threads=3, resources=resources, logs=tmp_path) as submit:
            assert submit("job").result() == (work.run_job, "job")
    assert asked["ray"] == {"num_cpus": 3, "max_retries": 0, "num_gpus": 1}
    assert asked["cluster"] == "slurm" and asked["submitit"]["cpus_per_task"] == 3


def test_a_stopped_study_stops_its_cells(tmp_path):
    """SIGTERM reaches the process of a cell, which has the time to end in its own way."""
    child = "import signal, sys, time, pathlib; signal.signal(15, lambda *_: sys.exit(3)); "
    child += f"pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"
    note = tmp_path / "cell.json"
    launcher = (sys.executable, "-c", child)
    job = work.Job(("train",), (), str(tmp_path / "cell"), str(note), str(tmp_path / "log"), 1, launcher)

    def study():
        try:
            with loop.terminable(), executor("local", workers=1, threads=1, resources={}, logs=tmp_path) as submit:
                submit(job)
                time.sleep(60)
        except loop.Terminated:
            os._exit(loop.TERMINATED)

    process = multiprocessing.get_context("fork").Process(target=study)
    process.start()
    until = time.monotonic() + 50
    while not (tmp_path / "begun").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGTERM)
    process.join(50)
    assert process.exitcode == loop.TERMINATED
    assert json.loads(note.read_text())["sessions"][0]["code"] == 3


class _Model:
    """A model file whose recipe has a calibration."""

    class recipe:
        calibration = NorCal()
