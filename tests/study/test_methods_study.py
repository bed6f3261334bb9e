"""benchmarks/studies: every arm is a recipe at equal steps; pages are what the script makes of the stored numbers."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from tailfin.schema.stages import stages
from tailfin.study.cells import differing, make_cells, shared
from tailfin.study.spec import load_study

ROOT = Path(__file__).resolve().parents[2]
METHODS = ROOT / "benchmarks" / "studies" / "methods.yaml"


@pytest.fixture(scope="module")
def script():
    specification = importlib.util.spec_from_file_location("leaderboard", ROOT / "benchmarks" / "leaderboard.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_arms_differ_from_their_controls_in_the_method_alone(tiny_set, tmp_path):
    root = str(tiny_set[0].parent)
    study = load_study(METHODS, {"road12": root, "fod": root})
    cells = {(cell.set, cell.arm): cell for cell in make_cells(study, tmp_path, seeds=[0])}
    assert differing(list(cells.values())) == []
    for name in ("road12", "fod"):
        own = {arm: cell for (one, arm), cell in cells.items() if one == name}
        assert {cell.total_steps for cell in own.values()} == {study.sets[name].steps}
        for cell in own.values():
            for stage in stages(cell.recipe):
                schedule = stage.recipe.schedule
                same = (schedule.batch, schedule.lr, schedule.decay, schedule.warmup, schedule.precision)
                assert same == (8, 0.01, "cosine", 50, "auto"), (cell.name, stage.name)
        parts = [own[arm] for arm in ("bacl_control", "bacl_hallucination", "bacl_margin", "bacl_weight", "bacl_fcbl")]
        assert all(shared(own["bacl"], other) == 1 for other in parts)
        assert all(shared(own["decoupled"], own[arm]) == 1 for arm in ("bags", "acsl", "loce", "disalign"))
    assert own["bacl"].recipe.data.copy_paste is False and cells["road12", "bacl"].recipe.data.copy_paste is True


def test_claims_name_what_the_studies_have():
    known = set()
    for path in (METHODS, METHODS.with_name("stepwise.yaml")):
        study = load_study(path)
        for name, arm in study.arms.items():
            others = {arm.control or study.control, *arm.against} - {name}
            known |= {(one, name, other) for one in (arm.sets or study.sets) for other in others}
    sets = {one for one, _, _ in known}
    claims = yaml.safe_load((ROOT / "benchmarks" / "studies" / "claims.yaml").read_text())
    for claim in (claim for paper in claims["papers"] for claim in paper["claims"]):
        if "arm" not in claim:
            assert claim["needs"], claim
            continue
        assert claim["metric"] in ("AP", "APr", "APc", "APf") and claim["sign"] in (-1, 1)
        for test in ({**claim, **other} for other in ({}, *claim.get("also", ()))):
            if test["set"] in sets:
                assert (test["set"], test["arm"], test["control"]) in known, test


def test_the_pages_are_what_the_script_makes(script):
    for path, text in script.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"python benchmarks/leaderboard.py writes another {path.name}"


@pytest.mark.parametrize(
    ("mean", "half", "pictures", "verdict"),
    [
        (0.02, 0.01, ("", ""), "reproduced"),
        (-0.02, 0.01, ("", ""), "not reproduced"),
        (0.02, 0.03, ("0.01", "0.03"), "not told apart"),
        (0.02, "", ("0.01", "0.03"), "reproduced, one seed"),
        (0.02, "", ("-0.01", "0.05"), "not told apart, one seed"),
        (0.02, "", ("", ""), "one seed alone, as claimed"),
        (-0.02, "", ("", ""), "one seed alone, against it"),
    ],
)
def test_verdicts(script, mean, half, pictures, verdict):
    low, high = pictures
    numbers = {"mean": str(mean), "half_interval": str(half), "seeds": "3", "low_pictures": low, "high_pictures": high}
    line = {"set": "s", "arm": "a", "control": "b", "metric": "AP", **numbers}
    claim = {"set": "s", "arm": "a", "control": "b", "metric": "AP", "sign": 1}
    assert script.judged(claim, [line])[2] == verdict
    assert script.judged({**claim, "metric": "APr"}, [line])[2] == "not run yet"
    assert script.judged({"needs": "LVIS"}, [line])[2] == "not testable here"


def test_the_leaderboard_is_sorted(script):
    cells = [
        {"set": "s", "arm": arm, "seed": str(seed), "AP": ap, "APr": "", "APc": ap, "APf": ap}
        | {"minutes": "2", "steps": "5", "commit": "0123456789", "command": "tailfin train r"}
        for arm, seed, ap in (("low", 0, "0.1"), ("high", 0, "0.2"), ("high", 1, "0.4"))
    ]
    lines = re.findall(r"(?m)^\| (low|high) \| ([\d.]+) \| (\w+)", script.leaderboard(cells))
    assert lines == [("high", "0.300", "nan"), ("low", "0.100", "nan")]
