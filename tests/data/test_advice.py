"""Advice of `data stats`: a whole command that runs, for this set, from a measurement that is written down."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from tailfin.cli.data import app
from tailfin.config import load_recipe
from tailfin.data.advice import EXTRA, MEASURED, advise, rfs_threshold, sided
from tailfin.samplers.repeat_factor import category_factors
from tailfin.stats import ClassStats

RESULTS = (Path(__file__).resolve().parents[2] / "docs" / "results.md").read_text(encoding="utf-8")


def made(counts: list[int], **options: Any) -> ClassStats:
    options.setdefault("num_images", max(1, int(sum(counts))))
    return ClassStats(image_count=counts, instance_count=counts, **options)


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=40), st.integers(0, 5000))
def test_advice_is_a_command_that_loads(counts: list[int], empty: int) -> None:
    stats = made(counts, num_images=max(1, sum(counts) + empty))
    advice = advise(stats, "my set/train.json")
    assert bool(advice.command) == any(counts)
    if not any(counts):
        return
    words = shlex.split(advice.command)
    assert words[:2] == ["tailfin", "train"] and words[3:7] == ["--train", "my set/train.json", "--val", "VAL.json"]
    recipe = load_recipe(words[2], words[7:])
    assert recipe.loss.name == "softmax"
    steps = recipe.schedule.epochs * stats.num_annotated_images / recipe.schedule.batch
    assert recipe.schedule.warmup <= max(1, round(steps) / 10)
    if recipe.sampler.name == "rfs":
        assert category_factors(stats, "rfs", recipe.sampler.threshold).max() > 1


def test_advice_follows_the_tail() -> None:
    even, mild, long = (
        advise(made([50, 40, 30])),
        advise(made([50, 40, 10])),
        advise(made([600, 42, 3], num_images=900)),
    )
    assert "nearly balanced" in even.text and "rfs" not in even.command
    assert "mild tail" in mild.text and "rfs" not in mild.command and "sampler=rfs" in mild.more[0]
    assert "long tail" in long.text and "sampler.threshold" in long.command
    assert any("detector.classifier=cosine" in line for line in long.more)
    assert "nothing to learn" in advise(made([0, 0])).text


def test_a_loss_is_named_with_the_classifier_that_it_was_measured_on_alone() -> None:
    advice = advise(made([600, 42, 3], num_images=900))
    assert "seesaw" not in advice.command
    for line in advice.more:
        assert "seesaw" not in line or "cosine" in line


def test_every_number_is_in_the_results() -> None:
    for text in MEASURED.values():
        numbers = re.findall(r"\d+\.\d{1,3}", text)
        assert numbers
        assert [number for number in numbers if number not in RESULTS] == []


def test_what_the_set_needs_is_in_the_command(tmp_path: Path) -> None:
    stats = made([50, 40, 30], names=("turn left", "turn right", "bright"))
    (tmp_path / "val.json").write_text("{}")
    advice = advise(stats, tmp_path / "train.json", tmp_path / "pictures", long_side=4000)
    assert "data.flip=0" in advice.command and f"--val {tmp_path / 'val.json'}" in advice.command
    assert f"--train-images {tmp_path / 'pictures'}" in advice.command
    assert any("4000 px" in line for line in advice.more)


def test_without_the_packaged_weights_the_command_starts_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in EXTRA else find(name))
    advice = advise(made([600, 42, 3], num_images=900))
    assert "fod/faster_rcnn_r18_rfs" in advice.command and "0.385" in advice.source
    assert any("tailfin[weights]" in line for line in advice.more)


@pytest.mark.parametrize("name", ["left", "turn_left", "LeftTurn", "arrow-RIGHT", "right hand"])
def test_names_with_a_side(name: str) -> None:
    assert sided([name]) == [name]


@pytest.mark.parametrize("name", ["bright", "cleft", "copyright", "upright", "leftover"])
def test_names_without_a_side(name: str) -> None:
    assert sided([name]) == []


def test_threshold_repeats_the_tail_within_bounds() -> None:
    lvis_like = made([1] * 10 + [50] * 20 + [2000] * 30, num_images=100_000)
    assert rfs_threshold(lvis_like) == 1e-3
    for counts, images in (([600, 42, 3], 3614), ([40, 1, 1, 1], 80), ([9000, 5000, 1], 14000)):
        stats = made(counts, num_images=images)
        factors = category_factors(stats, "rfs", rfs_threshold(stats))
        assert factors[0] == 1 and 1.9 <= factors.max() <= 10.3


def test_the_command_prints_it(data_dir: Path, tmp_path: Path) -> None:
    path = data_dir / "fod31-lt" / "train.json"
    result = CliRunner().invoke(app, ["stats", str(path), "--json", str(tmp_path / "s.json")])
    assert result.exit_code == 0, result.output
    advice = json.loads((tmp_path / "s.json").read_text())["advice"]
    assert f"  run        {advice['command']}\n" in result.output and "docs/results.md" in result.output
    assert str(path.with_name("val.json")) in advice["command"]
