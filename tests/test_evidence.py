"""The scripts of benchmarks/evidence: every arm is a recipe, epochs are equal, cells train once, intervals hold."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from tailfin.config import load_recipe
from tailfin.schema.stages import stages

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks" / "evidence"
SCRIPTS = ("cells", "bacl", "drcl", "federated", "starts")


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in SCRIPTS}
    finally:
        sys.path.remove(str(FOLDER))
        for name in SCRIPTS:
            sys.modules.pop(name, None)


def options(tmp_path: Path, **changes) -> argparse.Namespace:
    values = {
        "set": "road12",
        "epochs": 12.0,
        "size": 96,
        "out": tmp_path,
        "data": tmp_path,
        "change": [],
        "arms": None,
    }
    values |= {"seeds": [0, 1], "list": False, "threads": 1}
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.parametrize("script", ["bacl", "drcl"])
@pytest.mark.parametrize("name", ["road12", "fod"])
def test_every_arm_is_a_recipe_of_equal_epochs_from_one_start(scripts, tmp_path, script, name):
    given = options(tmp_path, set=name)
    arms = scripts[script].arms(given)
    assert len({arm.name for arm in arms}) == len(arms) >= 10
    starts = set()
    for arm in arms:
        _, recipe, *overrides = scripts["cells"].command_of(arm, 3, given)
        files = [f"{key}={path}" for key, path in arm.files.items()]
        loaded = load_recipe(recipe, [*overrides, *files])
        plan = stages(loaded)
        assert sum(stage.recipe.schedule.epochs for stage in plan) == given.epochs, arm.name
        assert loaded.seed == 3 and loaded.data.sizes == (96,)
        starts.add((loaded.weights, loaded.backbone, str(loaded.detector), str(loaded.evaluation)))
    assert len(starts) == 1


@pytest.mark.parametrize("name", ["road12", "fod"])
def test_starts_differ_in_their_start_alone(scripts, tmp_path, name):
    """Four methods twice, of equal epochs; a random start trains everything."""
    given = options(tmp_path, set=name, minutes=0.0)
    found = {}
    for arm in scripts["starts"].arms(given):
        _, recipe, *overrides = scripts["cells"].command_of(arm, 0, given)
        found[arm.name] = load_recipe(recipe, overrides)
    assert len(found) == 8
    free = {"weights": True, "detector": {"norm", "frozen_layers"}}
    for method in ("softmax", "rfs", "bacl", "stepwise"):
        one, other = found[method], found[f"{method}_random"]
        assert (one.weights, one.detector.norm, one.detector.frozen_layers) == ("packaged", "frozen_bn", 2)
        assert (other.weights, other.detector.norm, other.detector.frozen_layers) == ("none", "bn", 0)
        assert one.model_dump(exclude=free) == other.model_dump(exclude=free)
        assert sum(stage.recipe.schedule.epochs for stage in stages(one)) == pytest.approx(given.epochs)
    assert found["stepwise"].stepwise.tail.distillation is not None and found["bacl"].second.loss.name == "fcbl"


def test_the_controls_have_none_of_the_parts(scripts, tmp_path):
    given = options(tmp_path)
    cells, found = scripts["cells"], {}
    for script in ("bacl", "drcl"):
        for arm in scripts[script].arms(given):
            _, recipe, *overrides = cells.command_of(arm, 0, given)
            found[script, arm.name] = load_recipe(recipe, [*overrides, *(f"{k}={p}" for k, p in arm.files.items())])
    control, whole = found["bacl", "control"].second, found["bacl", "all"].second
    assert (control.loss.options["alpha"], control.loss.options["reweight"], control.features) == (0, False, None)
    assert whole.features is not None and whole.loss.options["alpha"] > 0
    assert stages(found["bacl", "control"])[0].inputs == stages(found["bacl", "all"])[0].inputs
    assert stages(found["bacl", "control_rfs"])[0].inputs == stages(found["bacl", "all_rfs"])[0].inputs
    assert found["bacl", "all_rfs"].sampler.name == "rfs" and found["bacl", "all_rfs"].second.sampler.name == "plain"
    base, copied = found["bacl", "objectness"], found["bacl", "all"]
    assert (base.loss, base.data.copy_paste) == (copied.loss, copied.data.copy_paste)
    assert base.schedule.weight_decay == copied.schedule.weight_decay
    for name, terms in (("detection", set()), ("hcl", {"hcl"}), ("drcl", {"hcl", "lcl", "ar", "sr"})):
        weights = found["drcl", name].pretraining.weights.model_dump()
        assert {term for term, weight in weights.items() if weight} == terms | {"det"}


def test_a_finished_cell_is_not_trained_again(scripts, tmp_path, monkeypatch):
    cells = scripts["cells"]
    arms = [cells.Arm("one", "road12/packaged"), cells.Arm("two", "road12/packaged:rfs")]
    trained = []

    def train(arm, seed, command, _):
        trained.append((arm.name, seed))
        numbers = dict.fromkeys(cells.METRICS, 0.1 * seed)
        failed = arm.name == "two" and seed == 1 and len(trained) < 5
        cell = {"arm": arm.name, "seed": seed, "set": "road12", **numbers, "command": command, "iterations": {"a": 5}}
        return None if failed else cell

    monkeypatch.setattr(cells, "train", train)
    for _ in range(3):
        with pytest.raises(SystemExit) as ended:
            cells.run(arms, "one", options(tmp_path))
    assert not ended.value.code
    assert trained == [("one", 0), ("two", 0), ("one", 1), ("two", 1), ("two", 1)]
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 4
    with pytest.raises(SystemExit, match="another command"):
        cells.run(arms, "one", options(tmp_path, size=128))
    with pytest.raises(SystemExit, match="no arm three"):
        cells.run(arms, "one", options(tmp_path, arms=["three"]))


def test_paired_intervals(scripts):
    cells = scripts["cells"]
    rng = np.random.default_rng(0)
    one, two = rng.normal(0.3, 0.02, 5), rng.normal(0.28, 0.02, 5)
    rows = [{"arm": "one", "seed": k, "set": "s", "AP": value} for k, value in enumerate(one)]
    rows += [{"arm": "two", "seed": k, "set": "s", "AP": value} for k, value in enumerate(two)]
    rows.append({"arm": "one", "seed": 9, "set": "s", "AP": 5.0})  # has no partner
    mean, half, count = cells.paired(rows, "one", "two", "AP")
    low, high = ttest_rel(one, two).confidence_interval()
    assert count == 5 and (mean - half, mean + half) == pytest.approx((low, high))
    mean, half, count = cells.paired(rows[:1] + rows[5:6], "one", "two", "AP")
    assert (mean, half, count) == (pytest.approx(one[0] - two[0]), None, 1)
    assert cells.difference(rows[:1], "one", "two", "AP") == "-"


def test_a_stopped_script_stops_its_training_and_ends(scripts, tmp_path):
    script = tmp_path / "stopped.py"
    child = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(3)); print(1, flush=True); time.sleep(60)"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import os, cells\n"
        f"cells.watched([sys.executable, '-c', {child!r}], os.environ, sys.stdout)\n"
    )
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=50) == 128 + signal.SIGTERM
    with (tmp_path / "log").open("w") as log:
        assert scripts["cells"].watched([sys.executable, "-c", "raise SystemExit(7)"], os.environ, log) == 7


def test_a_cell_is_trained_and_goes_on(scripts, tmp_path, monkeypatch):
    """The run's files become a line; what was begun by the same command is resumed, else it starts anew."""
    cells = scripts["cells"]
    arm, given, called = cells.Arm("one", "r", {"loss": "focal", "second.features": None}), options(tmp_path), []
    command = cells.command_of(arm, 0, given)
    assert command == ["train", "r", "seed=0", "data.sizes=[96]", "loss=focal", "second.features=null"]
    folder = tmp_path / "one" / "seed-0"

    def watched(arguments, environment, _):
        called.append(arguments[3:])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "recipe.yaml").write_text("")
        if len(called) < 2:
            return 143
        (folder / "metrics.json").write_text(json.dumps({"bbox": dict.fromkeys(cells.METRICS, 0.5)}))
        (folder / "environment.json").write_text(json.dumps({"reused": [{"stage": "representation"}]}))
        (folder / "stages" / "1-train").mkdir(parents=True)
        (folder / "stages" / "1-train" / "metrics.jsonl").write_text('{"iteration": 20}\n{"iteration": 33}\n')
        return 0

    monkeypatch.setattr(cells, "watched", watched)
    assert cells.train(arm, 0, command, given) is None
    cell = cells.train(arm, 0, command, given)
    assert called[0][:2] == ["train", "r"] and called[0][-1] == "--overwrite"
    assert called[1] == ["train", "--resume", str(folder)]
    assert (cell["AP"], cell["iterations"], cell["reused"]) == (0.5, {"1-train": 33}, ["representation"])
    json.dumps(cell)


def test_a_federated_cut_says_what_it_hides(scripts, tiny_set, tmp_path):
    """Every second picture is whole; in the others a class is shown in full, listed as absent, or not looked for."""
    source = json.loads(tiny_set[0].read_text())
    found = json.loads(scripts["federated"].cut(tiny_set[0], tmp_path / "cut.json").read_text())
    ids = {category["id"] for category in source["categories"]}
    hidden = 0
    for number, image in enumerate(found["images"]):
        before, after = (
            sorted(a["id"] for a in document["annotations"] if a["image_id"] == image["id"])
            for document in (source, found)
        )
        shown = {a["category_id"] for a in found["annotations"] if a["image_id"] == image["id"]}
        present = {a["category_id"] for a in source["annotations"] if a["image_id"] == image["id"]}
        absent = set(image["neg_category_ids"])
        assert not absent & present and shown <= present and set(after) <= set(before)
        if number % 2 == 0:
            assert after == before and absent == ids - present
        hidden += len(present - shown)
    assert hidden > 3


@pytest.mark.parametrize("name", ["road12", "fod"])
def test_arms_on_partial_labels_differ_in_the_loss_alone(scripts, tiny_set, tmp_path, name):
    given = options(tmp_path, set=name, data=tmp_path)
    (tmp_path / "train.json").write_bytes(tiny_set[0].read_bytes())
    loaded = {}
    for arm in scripts["federated"].arms(given):
        _, recipe, *overrides = scripts["cells"].command_of(arm, 0, given)
        loaded[arm.name] = load_recipe(recipe, [*overrides, *(f"{key}={path}" for key, path in arm.files.items())])
    data = loaded["plain"].data.model_dump()
    for recipe in loaded.values():
        own = recipe.data.model_dump()
        assert {key for key in data if own[key] != data[key]} <= {"unchecked_classes", "train"}
        assert recipe.schedule == loaded["plain"].schedule and recipe.data.keep_empty
    assert loaded["mask"].loss == loaded["plain"].loss == loaded["whole"].loss
    assert loaded["both"].loss == loaded["fedloss"].loss != loaded["plain"].loss
