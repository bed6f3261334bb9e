"""The report's section about classifiers: weight norms, indicators, and runs that differ in their indicator."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tailfin import losses
from tailfin.checkpoint import save_model
from tailfin.config import check_recipe
from tailfin.report import build_report
from tailfin.report.runs import read_runs
from tailfin.report.sections.classifier import classifier
from tailfin.schema.stages import second_recipe
from tailfin.stats import ClassStats

NAMES = ("<b>bolt</b>", "cup", "light </script>", "чашка", "fork")
INSTANCES = (4, 900, 60, 8, 300)
DETECTOR = {"norm": "bn", "frozen_layers": 0}
BACL = {
    "method": "bacl",
    "loss": "objectness",
    "second": {"loss": {"name": "fcbl"}, "features": "hallucination"},
    "detector": DETECTOR,
}


def stats(instances=INSTANCES, names=NAMES) -> ClassStats:
    count = torch.tensor(instances)
    return ClassStats(image_count=(count / 2).ceil().long(), instance_count=count, num_images=1000, names=names)


class Weights(torch.nn.Module):
    """The parts of a detector that the section reads."""

    def __init__(self, loss, norms) -> None:
        super().__init__()
        self.loss = loss
        self.predictor = torch.nn.Module()
        self.predictor.cls_score = torch.nn.Linear(8, loss.num_logits)
        direction = torch.nn.functional.normalize(torch.randn(loss.num_logits, 8), dim=1)
        self.predictor.cls_score.weight.data = direction * norms[:, None]


def write_model(run: Path, norms, values: dict, own: ClassStats | None = None, trained: bool = True):
    """`model.safetensors` of a finished run whose logits have these weight norms; returns its loss."""
    recipe = check_recipe({"detector": DETECTOR, **values}, "test")
    recipe = second_recipe(recipe) if recipe.second is not None else recipe
    own = own or stats()
    loss = losses.build(recipe.loss.name, own, **recipe.loss.options)
    if trained:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, own.num_classes + 1, (64,), generator=generator)
        loss.train()(torch.randn((64, loss.num_logits), generator=generator), labels)
    shell = torch.nn.Module()
    shell.roi_heads = Weights(loss, torch.as_tensor(norms))
    save_model(run / "model.safetensors", shell, recipe, own)
    return loss


def figures(html: str) -> list[dict]:
    return [json.loads(text) for text in re.findall(r'<script type="application/json">(.*?)</script>', html, re.S)]


def numbers(values) -> list[float]:
    """Plotly's arrays: plain lists or base64."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).tolist()
    return values


@pytest.fixture
def runs(make_data, make_run):
    data = make_data()
    return lambda *names, **options: [make_run(name, data, **options) for name in names]


def test_norms_by_training_instances(runs, parse_page):
    plain, balanced = runs("plain", "balanced")
    write_model(plain, [1.0, 5.0, 3.0, 2.0, 4.0, 9.0], {"loss": "softmax"})
    write_model(balanced, [2.0, 2.0, 2.0, 2.0, 2.5, 7.0], {"loss": "objectness"})
    section = classifier(read_runs([plain, balanced]))
    (figure,) = figures(section.html)  # no indicator, no comparison
    first, second = figure["data"]
    assert numbers(first["y"]) == pytest.approx([5, 4, 3, 2, 1])  # most instances first, without background
    assert numbers(second["y"]) == pytest.approx([2, 2.5, 2, 2, 2])
    assert first["name"] == "plain" and "900 instances" in first["text"][0]
    assert "&lt;b&gt;bolt&lt;/b&gt;" in first["text"][-1]
    page = parse_page(str(section.html))
    assert page.open == []
    # rare: 2 and 4 images (norms 1 and 2), common: 30 (3), frequent: 450 and 150 (5 and 4)
    assert "plain 1.500 3.000 4.500 0.33 5.0 +1.00" in page.text
    assert "balanced 2.000 2.000 2.250 0.89" in page.text


def test_a_loss_with_its_own_order_of_logits(runs):
    (run,) = runs("bags")
    loss = losses.build("bags", stats())
    norms = torch.zeros(loss.num_logits)
    norms[loss.column] = torch.tensor([1.0, 5.0, 3.0, 2.0, 4.0])
    write_model(run, norms, {"loss": "bags"})
    (figure,) = figures(classifier(read_runs([run])).html)
    assert numbers(figure["data"][0]["y"]) == pytest.approx([5, 4, 3, 2, 1])


@pytest.mark.parametrize("indicator", ["confusion", "image", "instance", "cumulative", "score", "tpr"])
def test_indicator_of_a_run_with_fcbl(runs, indicator):
    plain, bacl = runs("plain", "bacl")
    write_model(plain, torch.ones(6), {"loss": "softmax"})
    values = {**BACL, "second": {"loss": {"name": "fcbl", "indicator": indicator}}}
    loss = write_model(bacl, torch.ones(6), values)
    norms, shown, weight = figures(classifier(read_runs([plain, bacl])).html)
    (heat,) = weight["data"]
    counts = np.frombuffer(base64.b64decode(heat["z"]["bdata"]), np.int8).reshape(51, 51)  # [other class, own class]
    assert counts[20, 30] == 0 and counts[30, 20] == counts[30, 30] == 1  # less, more and as probable
    assert counts[36, 45] == 1 and counts[34, 45] == 0  # above and below the threshold of 0.7
    assert [trace["name"] for trace in norms["data"]] == ["plain", "bacl"]
    (trace,) = shown["data"]
    expected = loss.indicator_diagonal()[[1, 4, 2, 3, 0]].tolist()
    assert trace["name"] == "bacl" and numbers(trace["y"]) == pytest.approx(expected)
    assert len(set(expected)) > 1
    assert f"bacl: {indicator}." in classifier(read_runs([plain, bacl])).html


def test_many_classes_have_a_trend(runs):
    (run,) = runs("many")
    many = stats(tuple(range(1, 121)), tuple(f"c{i}" for i in range(120)))
    write_model(run, torch.arange(121.0), {"loss": "softmax"}, many)
    (figure,) = figures(classifier(read_runs([run])).html)
    every, mean = figure["data"]
    assert len(numbers(every["y"])) == 120 and numbers(mean["y"]) == pytest.approx(range(119, -1, -1), abs=1e-5)


def test_ap_by_indicator(make_data, make_run):
    data = make_data()
    made = []
    for name, indicator, seed, ap in (("a", "confusion", 0, 0.3), ("b", "tpr", 0, 0.4), ("c", "tpr", 1, 0.5)):
        recipe = {**BACL, "seed": seed, "second": {"loss": {"name": "fcbl", "indicator": indicator}}}
        made.append(make_run(name, data, ap=ap, recipe=recipe))
    section = classifier(read_runs(made))  # without model files
    (figure,) = figures(section.html)
    bars = {trace["name"]: trace for trace in figure["data"]}
    assert bars["all"]["x"] == ["confusion", "tpr<br>2 runs"]
    assert numbers(bars["all"]["y"]) == pytest.approx([30, 45])
    assert numbers(bars["rare"]["y"]) == pytest.approx([20, 35])
    assert numbers(bars["all"]["error_y"]["array"]) == pytest.approx([0, 5])
    assert "differ in more than" not in section.html
    made.append(make_run("d", data, recipe={**BACL, "seed": 2, "sampler": "rfs"}))
    assert "differ in more than the indicator" in classifier(read_runs(made)).html
    assert classifier(read_runs(made[:1])) is None  # one indicator compares with nothing


def test_hard_matrix_is_an_indicator_of_its_own(make_data, make_run):
    data = make_data()
    hard = {**BACL, "second": {"loss": {"name": "fcbl", "matrix": "hard"}}}
    made = [make_run("soft", data, recipe=BACL), make_run("hard", data, recipe=hard)]
    (figure,) = figures(classifier(read_runs(made)).html)
    assert figure["data"][0]["x"] == ["confusion", "confusion, hard"]


def test_what_cannot_be_read_is_left_out(runs):
    good, damaged, other = runs("good", "damaged", "other")
    assert classifier(read_runs([good])) is None
    write_model(good, torch.ones(6), {"loss": "softmax"})
    (damaged / "model.safetensors").write_bytes(b"not a model")
    write_model(other, torch.ones(6), {"loss": "softmax"})
    section = classifier(read_runs([good, damaged, other]))
    assert [trace["name"] for trace in figures(section.html)[0]["data"]] == ["good", "other"]


def test_the_page_holds_it_escaped(runs, parse_page):
    (run,) = runs("bacl")
    write_model(run, torch.ones(6), BACL)
    text = build_report([run])
    page = parse_page(text)
    assert page.open == []
    assert page.count("section", id="classifier") == 1
    assert "<b>bolt" not in text and "light </script>" not in text
