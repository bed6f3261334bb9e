"""Two-stage training: the second stage changes only what it names, and the model file rebuilds it."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from small_detr import DETR

import tailfin
from tailfin.config import load_recipe
from tailfin.errors import UserError

pytestmark = pytest.mark.usefixtures("quick_training")
SECOND = [
    "method=decoupled",
    "second.loss=objectness",
    "second.sampler=class_aware",
    "second.schedule.epochs=1",
    "second.schedule.batch=4",
    "second.schedule.warmup=0",
    "second.schedule.milestones=[]",
    "second.data.flip=0",
    "schedule.epochs=1",
]


@pytest.mark.parametrize("trains", [["classifier"], ["classifier", "box", "rpn"]])
def test_frozen_parts_are_bit_identical(tmp_path, tiny_set, tiny_recipe, trains):
    overrides = [*SECOND, f"second.trains={trains}"]
    tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=tmp_path / "run", overrides=overrides)
    first = load_file(tmp_path / "run" / "stages" / "1-representation" / "model.safetensors")
    last = load_file(tmp_path / "run" / "model.safetensors")
    names = {"roi_heads.predictor.cls_score": "classifier", "roi_heads.predictor.bbox_pred": "box", "rpn": "rpn"}
    changed = {key for key in last if key not in first or not torch.equal(first[key], last[key])}
    parts = {next((part for name, part in names.items() if key.startswith(name)), key) for key in changed}
    assert parts == set(trains)
    detector = tailfin.load(tmp_path / "run")
    assert detector.recipe.loss.name == "objectness"
    assert detector.recipe.data.flip == 0


def test_fresh_classifier(tmp_path, tiny_set, tiny_recipe):
    """A classifier of the same width goes on from the first stage's, unless it is to start anew."""
    kept = [*SECOND, "second.loss=softmax", "second.schedule.lr=1e-12"]
    for name, overrides in {"kept": kept, "fresh": [*kept, "second.fresh_classifier=true"]}.items():
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / name, overrides=overrides)
    key = "roi_heads.predictor.cls_score.weight"
    first = load_file(tmp_path / "kept" / "stages" / "1-representation" / "model.safetensors")[key]
    assert torch.allclose(load_file(tmp_path / "kept" / "model.safetensors")[key], first, atol=1e-6)
    assert not torch.allclose(load_file(tmp_path / "fresh" / "model.safetensors")[key], first, atol=1e-3)


def test_a_stage_two_after_a_loaded_stage_one_is_the_same(tmp_path, tiny_set, tiny_recipe):
    """Killed between the stages: stage 1 is loaded, not trained, and stage 2 starts from the same new weights."""
    overrides = [*SECOND, "second.fresh_classifier=true", "data.flip=0.5"]
    tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    straight = load_file(tmp_path / "run" / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "stages" / "2-classifier")
    (tmp_path / "run" / "model.safetensors").unlink()
    tailfin.train("", out=tmp_path / "run", resume=True)
    resumed = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_a_begun_run_goes_on_without_its_starting_weights(tmp_path, tiny_set, tiny_recipe):
    tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "first", overrides=["schedule.epochs=0.2"])
    weights = tmp_path / "start.safetensors"
    shutil.copy(tmp_path / "first" / "model.safetensors", weights)
    run = tmp_path / "run"
    tailfin.train(tiny_recipe, train=tiny_set[0], out=run, weights=weights, overrides=["schedule.epochs=1"])
    straight = load_file(run / "model.safetensors")
    for file in (run / "model.safetensors", *run.glob("stages/1-train/model.safetensors")):
        file.unlink()
    assert list(run.glob("stages/1-train/last/complete.json"))  # from iteration 5 on there is a resume point
    weights.unlink()
    tailfin.train("", out=run, resume=True)
    resumed = load_file(run / "model.safetensors")
    assert all(torch.equal(straight[key], resumed[key]) for key in straight)


def test_bacl_hallucinates_and_loads(tmp_path, tiny_set, tiny_recipe):
    bacl = [*SECOND, "method=bacl", "loss=objectness", "second.loss=fcbl", "second.features=hallucination"]
    tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=tmp_path / "run", overrides=bacl)
    weights = load_file(tmp_path / "run" / "model.safetensors")
    used = weights["roi_heads.extra_rows.hallucination.statistics.used"]
    counted = weights["roi_heads.loss.num_gt"]
    assert used.any() and torch.equal(used, counted > 0)
    detector = tailfin.load(tmp_path / "run")
    assert set(detector.predict(torch.zeros((3, 60, 60), dtype=torch.uint8))[0]) == {"boxes", "scores", "labels"}


def test_mistakes(tmp_path, tiny_set, tiny_recipe):
    with pytest.raises(UserError, match="method decoupled needs a section `second`"):
        load_recipe(tiny_recipe, ["method=decoupled"])
    with pytest.raises(UserError, match="method baseline has no section `second`"):
        load_recipe(tiny_recipe, ["second.loss=focal"])
    with pytest.raises(UserError, match=r'unknown key "second\.los" \(did you mean "loss"\?\)'):
        load_recipe(tiny_recipe, ["method=decoupled", "second.los=focal"])
    with pytest.raises(UserError, match="a run has one precision"):
        load_recipe(tiny_recipe, [*SECOND, "schedule.precision=bf16"])
    with pytest.raises(UserError, match="set loss=fcbl"):
        tailfin.train(
            tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=[*SECOND, "second.features=hallucination"]
        )
    with pytest.raises(UserError, match="data"):
        load_recipe(tiny_recipe, ["method=decoupled", "second.data.resise=square"])


def test_on_a_detector_without_a_box_head(tmp_path, tiny_set):
    """Deformable DETR: its parts by their own names; what does not train keeps its bits, the loss may be another."""
    recipe = tmp_path / "detr.yaml"
    recipe.write_text(DECOUPLED)
    run = tailfin.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=["second.trains=[classifier]"])
    first = load_file(run / "stages" / "1-representation" / "model.safetensors")
    last = load_file(run / "model.safetensors")
    changed = {key for key in last if key not in first or not torch.equal(first[key], last[key])}
    assert changed and all(key.startswith(("class_embed.", "criterion.")) for key in changed)
    assert tailfin.load(run).recipe.loss.name == "eqlv2"
    with pytest.raises(UserError, match=r'second.trains: deformable_detr has no part "rpn"'):
        load_recipe(recipe)


DECOUPLED = (
    DETR
    + """\
method: decoupled
schedule: {epochs: 0.5, batch: 4, optimizer: adamw, lr: 1e-3, warmup: 0, milestones: [], clip: 0.1}
second:
  loss: eqlv2
  schedule: {epochs: 0.5, batch: 4, optimizer: adamw, lr: 1e-3, warmup: 0, milestones: [], clip: 0.1}
"""
)
