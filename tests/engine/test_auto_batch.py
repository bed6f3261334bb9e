"""The learning rate's rule for another batch, and the largest batch that the memory holds."""

from __future__ import annotations

import json

import pytest
import torch

import tailfin
from tailfin import api, auto_batch
from tailfin.auto_batch import free_memory, largest_batch, training_step
from tailfin.config import dump_recipe, load_recipe, recipe_from_file
from tailfin.errors import UserError
from tailfin.schedule import build_optimizer, learning_rate
from tailfin.schema.training import Schedule

pytestmark = pytest.mark.usefixtures("quick_training")


RATES = [("none", 8, 0.02), ("linear", 8, 0.01), ("sqrt", 4, 0.01), ("linear", 64, 0.08)]


@pytest.mark.parametrize(("rule", "batch", "rate"), RATES)
def test_the_rate_follows_the_rule(rule, batch, rate):
    schedule = Schedule(lr=0.02, batch=batch, lr_rule=rule, lr_batch=16, warmup=0, milestones=())
    assert schedule.rate == pytest.approx(rate)
    assert learning_rate(5, 10, [], schedule) == pytest.approx(rate)
    assert build_optimizer(torch.nn.Linear(1, 1), schedule).param_groups[0]["lr"] == pytest.approx(rate)
    assert (schedule.rate_told() == "") == (rule == "none")


def test_the_batch_of_the_rate_is_the_recipe_s_own():
    """That of the file before overrides, for every schedule of the recipe; it is stored, so that a run stands alone."""
    recipe = load_recipe("lvis_v1/mask_rcnn_r50", ["schedule.batch=4", "schedule.lr_rule=linear"])
    assert (recipe.schedule.lr_batch, recipe.schedule.rate) == (16, pytest.approx(0.005))
    assert "lr_batch: 16" in dump_recipe(recipe)
    assert recipe.schedule.rate_told() == "lr 0.005: linear from 0.02 at batch 16 to batch 4"
    plain = load_recipe("lvis_v1/mask_rcnn_r50", ["schedule.batch=4"])
    assert (plain.schedule.lr_batch, plain.schedule.rate) == (0, 0.02)
    second = load_recipe("fod/bacl_r18", ["second.schedule.batch=32", "second.schedule.lr_rule=sqrt"])
    assert second.second.schedule.rate == pytest.approx(second.second.schedule.lr * 2**0.5)
    given = load_recipe("lvis_v1/mask_rcnn_r50", ["schedule.batch=4", "schedule.lr_rule=linear", "schedule.lr_batch=8"])
    assert given.schedule.rate == pytest.approx(0.01)


def test_a_training_says_what_it_does(tiny_set, tiny_recipe, tmp_path, capfd):
    out = tmp_path / "run"
    changes = ["schedule.batch=2", "schedule.lr_rule=linear", "schedule.epochs=0.2", "schedule.warmup=0"]
    tailfin.train(tiny_recipe, train=tiny_set[0], out=out, overrides=changes)
    assert "lr 0.005: linear from 0.01 at batch 4 to batch 2" in capfd.readouterr().err
    lines = [json.loads(line) for line in (out / "stages/1-train/metrics.jsonl").read_text().splitlines()]
    assert lines[0]["lr"] == pytest.approx(0.005)


def resolved(tiny_set, tiny_recipe, *changes: str):
    return api.resolve_recipe(tiny_recipe, tiny_set[0], None, overrides=list(changes))


def test_the_estimate_fills_the_free_memory(tiny_set, tiny_recipe):
    """Twice the memory beyond the weights' holds twice the pictures; a step of that size is made; an epoch is most."""
    recipe = resolved(tiny_set, tiny_recipe, "schedule.accumulation=2")
    sizes = []

    def probe(model, given, samples, accelerator):
        sizes.append(len(samples))
        assert given is recipe and model.training is not None

    _, lines = largest_batch(recipe, free=lambda device: 0, probe=probe)
    weights = float(lines[0].split(" MiB for weights")[0].split(", ")[-1])
    each = float(lines[0].split("about ")[1].split(" MiB")[0])
    assert sizes == [1] and weights > 0 and each > 0
    for count in (4, 8):
        free = int((weights + (count + 0.5) * each) * 2**20 / auto_batch.SHARE["cpu"])
        found, lines = largest_batch(recipe, free=lambda device, free=free: free, probe=probe)
        assert found.schedule.batch == sizes[-1] and abs(sizes[-1] - count) <= 1
        assert found.schedule.accumulation == 1 and "schedule.lr stays 0.01" in lines[-1]
    found, _ = largest_batch(recipe, free=lambda device: 10**13, probe=probe)
    assert found.schedule.batch == 25  # pictures with annotations


def test_a_step_that_runs_out_of_memory_is_halved(tiny_set, tiny_recipe):
    recipe = resolved(tiny_set, tiny_recipe, "schedule.lr_rule=sqrt")
    sizes = []

    def probe(model, given, samples, accelerator):
        sizes.append(len(samples))
        if len(samples) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    found, lines = largest_batch(recipe, free=lambda device: 10**13, probe=probe)
    assert sizes == [25, 12, 6, 3] and found.schedule.batch == 3 and len(lines) == 5
    assert found.schedule.rate == pytest.approx(0.01 * (3 / 4) ** 0.5) and "sqrt from 0.01 at batch 4" in lines[-1]

    def never(*_):
        raise MemoryError

    with pytest.raises(UserError, match="not one picture fits"):
        largest_batch(recipe, free=lambda device: 10**13, probe=never)

    def broken(*_):
        raise RuntimeError("a mistake of another kind")

    with pytest.raises(RuntimeError, match="another kind"):
        largest_batch(recipe, free=lambda device: 10**13, probe=broken)


def test_the_whole_way(tiny_set, tiny_recipe, tmp_path, monkeypatch, capfd):
    """`train --auto-batch` with a real step and the machine's own memory; the run's recipe has the batch."""
    assert free_memory(torch.device("cpu")) > 2**20
    steps = []

    def counted(*arguments):
        steps.append(training_step(*arguments))

    monkeypatch.setattr(auto_batch, "training_step", counted)
    out = tmp_path / "run"
    tailfin.train(tiny_recipe, train=tiny_set[0], out=out, overrides=["schedule.epochs=0.5"], auto_batch=True)
    said = capfd.readouterr().err
    assert len(steps) == 1 and "auto-batch: schedule.batch=" in said
    batch = recipe_from_file(out / "recipe.yaml").schedule.batch
    assert 1 <= batch <= 25 and f"iterations of {batch}" in said
