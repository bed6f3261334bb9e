"""The papers' figures as numbers: weight norms and their trend, activation maps, what the sampler fed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from tailfin.checkpoint import load_model_file, save_model
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.report import build_report
from tailfin.report.activations import (
    activation_maps,
    energy_inside,
    mean_activation,
    overlaid,
    spread,
    weighted_activation,
)
from tailfin.report.classifiers import twins
from tailfin.report.norms import class_norms, trend
from tailfin.report.runs import read_runs
from tailfin.report.sections.fed import fed
from tailfin.report.sections.steps import steps
from tailfin.stats import ClassStats


def test_norms_are_exact_and_without_background() -> None:
    weight = np.zeros((4, 3))
    weight[0], weight[1], weight[2], weight[3] = (3, 4, 0), (0, 0, 2), (1, 2, 2), (100, 0, 0)  # the last is background
    assert class_norms(weight, [0, 1, 2]).tolist() == [5, 2, 3]
    assert class_norms(weight, [2, 0]).tolist() == [3, 5]  # in the order of the classes, not of the rows


@pytest.mark.parametrize("number", [7, 31, 1203])
def test_the_trend_reproduces_a_polynomial_of_its_degree(number: int) -> None:
    x = np.linspace(0, 1, number)
    values = 2 - x + 3 * x**2 - 7 * x**3 + 0.5 * x**4 + 4 * x**5
    assert trend(values) == pytest.approx(values, abs=1e-6)
    assert np.abs(trend(x**6 * 10) - x**6 * 10).max() > 1e-4  # of a higher degree it is a fit
    assert trend([3.0]).tolist() == [3.0] and trend([1.0, 2.0]) == pytest.approx([1, 2])


def test_a_planted_activation_is_the_one_hot_spot() -> None:
    features = torch.zeros(5, 6, 8)
    features[2, 4, 1] = -3.0  # negative values are activations too
    values = spread(mean_activation(features), (96, 128), (96, 128), (96, 128))
    assert values.shape == (96, 128) and values.min() == 0 and values.max() == 1
    down, across = np.unravel_index(values.argmax(), values.shape)
    assert down // 16 == 4 and across // 16 == 1
    assert energy_inside(values, [[0, 48, 48, 96]]) == pytest.approx(1)
    assert energy_inside(values, [[64, 0, 128, 48]]) == 0
    half = energy_inside(values, [[0, 48, 24, 96]])
    assert half == pytest.approx(0.5, abs=0.01)
    assert energy_inside(values, [[0, 48, 24, 96], [0, 48, 24, 96]]) == pytest.approx(half)  # overlapping boxes once
    assert energy_inside(np.zeros((4, 4)), [[0, 0, 4, 4]]) == 0
    assert not spread(torch.ones(3, 3), (48, 48), (48, 48), (48, 48)).any()  # constant: zeros, no division by zero


def test_padding_is_no_part_of_the_map() -> None:
    features = torch.zeros(1, 4, 4)
    features[0, 3, 3] = 9.0  # in the padding
    features[0, 0, 0] = 1.0
    values = spread(mean_activation(features), (64, 64), (32, 32), (100, 100))
    assert values.shape == (100, 100) and values[0, 0] == 1


def test_gradcam_by_hand() -> None:
    features = torch.stack([torch.eye(2), torch.ones(2, 2)])
    gradient = torch.stack([torch.full((2, 2), 2.0), torch.full((2, 2), -0.5)])
    assert weighted_activation(features, gradient).tolist() == [[1.5, 0], [0, 1.5]]


def test_colours_run_from_blue_to_red() -> None:
    picture = np.full((1, 2, 3), 100, np.uint8)
    low, high = np.asarray(overlaid(picture, [[0.0, 1.0]]))[0]
    assert low[2] > low[0] and high[0] > high[2] and low[1] == high[1] == 50


@pytest.fixture
def trained(make_data: Callable, make_run: Callable, tiny_recipe: Path) -> Path:
    """A finished run with a small model of random weights."""
    data = make_data()
    run = make_run("tiny", data)
    recipe = load_recipe(tiny_recipe)
    stats = ClassStats.from_json(data.root / "val.json")
    torch.manual_seed(0)
    save_model(run / "model.safetensors", build_detector(recipe, stats, start=False)[0], recipe, stats)
    return run


@pytest.mark.parametrize("method", ["mean", "gradcam"])
def test_maps_of_a_detector(trained: Path, parse_page: Callable, method: str) -> None:
    picture = np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8)
    (values,) = activation_maps(trained / "model.safetensors", [picture], method, ["bolt"])
    assert values.shape == (50, 70) and values.min() == 0 and values.max() in (0, 1)
    page = parse_page(build_report([trained], activations=method))
    assert page.open == [] and re.search(r"energy inside, % all rare common frequent pictures tiny \d+\.\d", page.text)
    with pytest.raises(UserError, match='did you mean "mean"'):
        activation_maps(trained / "model.safetensors", [picture], "maen")


def test_what_the_sampler_fed(make_data: Callable, make_run: Callable, parse_page: Callable) -> None:
    data = make_data()
    plain = make_run("plain", data)
    repeated = make_run("repeated", data, recipe={"sampler": {"name": "rfs", "threshold": 0.9}})
    text = parse_page(str(fed(read_runs([plain, repeated])).html)).text
    batch = 16  # 12 pictures fill a batch with four more
    assert f"plain {batch} {2 * batch} " in text
    shown, number = re.search(r"repeated (\d+) (\d+) ", text).groups()
    assert int(shown) > batch and int(number) == 2 * int(shown)
    (data.root / "val.json").unlink()
    assert fed(read_runs([plain])) is None


def test_twins_point_the_same_way() -> None:
    rows = np.array([[1.0, 0, 0], [0, 5, 0], [0.9, 0.2, 0], [0, 1, 0.3]])
    assert twins(rows).tolist() == [2, 3, 0, 1]  # length does not matter


def test_shift_of_classifier_rows_between_steps(trained: Path, parse_page: Callable) -> None:
    model = load_model_file(trained / "model.safetensors")
    (name,) = [key for key in model.weights if key.endswith("cls_score.weight")]
    detector, _ = build_detector(model.recipe, model.stats, start=False)
    for number, step in enumerate(("head", "tail"), 1):
        folder = trained / "stages" / f"{number}-{step}"
        folder.mkdir()
        weights = dict(model.weights)
        if step == "tail":  # the rarest class's row is turned round and doubled
            weights[name] = weights[name].clone()
            weights[name][0] *= -2
        detector.load_state_dict(weights)
        save_model(folder / "model.safetensors", detector, model.recipe, model.stats)
        about = {"step": step, "annotations": [6, 6, 6, 6], "images": 12, "epoch": 1, "iterations": 1, "trains": []}
        (folder / "step.json").write_text(json.dumps(about))
    text = parse_page(str(steps(read_runs([trained])).html)).text
    group = [letter == model.stats.frequency[0] for letter in model.stats.frequency]
    assert f"tail {2 / sum(group):.3f}" in text and f" {1 + 1 / sum(group):.2f}" in text
