"""Pre-training as a stage: transfer, the exported weights, exact resumes with queues, presets, mistakes."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tailfin import api, checkpoint
from tailfin.config import check_recipe, load_recipe, recipe_from_file
from tailfin.data.index import open_index
from tailfin.errors import UserError
from tailfin.methods import drcl as method
from tailfin.models import build_detector
from tailfin.report.runs import read_runs
from tailfin.report.sections.curves import curves
from tailfin.run import Run, batch_plan, curve_of
from tailfin.schedule import Curve
from tailfin.schema.presets import PRESETS
from tailfin.schema.stages import keeps_predictor, stages
from tailfin.schema.training import Schedule
from tailfin.training_log import TrainingLog

pytestmark = pytest.mark.usefixtures("quick_training")

SECTION = """\
pretraining:
  views: {resize: square, sizes: [64], min_side: 4}
  proposals: {source: gt_jitter}
  image: {queue: 24, hidden: 32, dim: 16}
  box: {queue: 50, hidden: 32, dim: 16}
  reconstruction: {widths: [16, 16, 8]}
  keep_predictor: false
  sampler: {threshold: 0.5}
  schedule: {epochs: 1.4, batch: 4, lr: 0.01, warmup: 4, milestones: [1]}
"""
SHORT = ["schedule.epochs=0.3", "schedule.milestones=[]"]


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, tiny_recipe) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "pretrained.yaml"
    path.write_text(tiny_recipe.read_text() + SECTION)
    return path


@pytest.fixture(scope="module")
def straight(tmp_path_factory, recipe, tiny_set) -> tuple[Path, str]:
    """An uninterrupted run, and what it said."""
    out = tmp_path_factory.mktemp("pretrained") / "run"
    said = io.StringIO()
    with redirect_stdout(said), redirect_stderr(said):
        api.train(recipe, train=tiny_set[0], out=out, overrides=SHORT)
    return out, said.getvalue()


def test_the_stage_comes_first_and_its_parts_are_taken_over(straight):
    out, said = straight
    assert sorted(path.name for path in (out / "stages").iterdir()) == ["1-pretrain", "2-train"]
    assert "stage pretrain: 25 images" in said and "sampler dynamic" in said and "sampler rfs" in said
    assert "pre-training: " in said and "weights loaded (backbone.body" in said
    assert "  dropped: 4 (roi_heads.predictor" in said and "  new: 4 (roi_heads.predictor" in said
    lines = [json.loads(line) for line in (out / "stages/1-pretrain/metrics.jsonl").read_text().splitlines()]
    parts = [line for line in lines if "loss_hcl" in line]
    for line in parts:  # the sum is that of its weighted parts
        named = sum(value for key, value in line.items() if key.startswith("loss_"))
        assert line["loss"] == pytest.approx(named, rel=1e-5)
    assert len(parts) == len(lines) >= 9
    for term in ("hcl", "lcl"):
        assert all(0 <= line[f"accuracy_{term}"] <= 1 and 0 < line[f"spread_{term}"] < 1.01 for line in lines)
    assert all(line["unexplained_pictures"] > 0.5 for line in lines)  # nine iterations reconstruct nothing
    assert "of the pictures' variance, 1 is a flat colour" in said and "pretraining.weights.sr=0" in said
    assert all(line[f"gradient_{term}"] > 0 for line in lines for term in ("hcl", "lcl", "ar", "sr"))
    section = curves(read_runs([out]))
    assert section is not None and "sr: gradient over detection" in str(section.html)
    assert "accuracy_hcl" not in read_runs([out])[0].stages[0].parts


def test_a_norm_over_few_pictures_is_said_once(straight, recipe):
    """The recipe has 4 pictures at a time, with 2 proposals or more each."""
    assert straight[1].count("warning: pretraining.image.norm batch") == 1
    assert "fewer than 16 rows" in straight[1] and "pretraining.image.norm=layer" in straight[1]
    section = load_recipe(recipe).pretraining
    assert section.normed_by_few(4) and not section.normed_by_few(16)
    assert "box.norm" in section.normed_by_few(1)
    layer = load_recipe(recipe, ["pretraining.image.norm=layer", "pretraining.box.norm=layer"]).pretraining
    assert not layer.normed_by_few(1)


def test_the_model_file_of_the_stage_is_a_detector(straight):
    out, _ = straight
    detector = api.load(out / "stages/1-pretrain/model.safetensors")
    assert detector.recipe.pretraining is None and detector.recipe.sampler.name == "dynamic"
    assert recipe_from_file(out / "recipe.yaml").pretraining is not None


def test_exported_weights_hold_the_transferred_parts_alone(straight):
    out, _ = straight
    whole, exported = load_file(out / "stages/1-pretrain/model.safetensors"), load_file(out / "pretrained.safetensors")
    assert {key.split(".")[0] for key in exported} == {"backbone", "rpn", "roi_heads"}
    assert {key.split(".")[1] for key in exported if key.startswith("roi_heads")} == {"head"}
    assert not [key for key in whole if key.startswith(("heads", "average", "terms"))]
    assert all(torch.equal(exported[key], whole[key]) for key in exported)
    assert {key for key in whole if key not in exported} == {
        f"roi_heads.predictor.{layer}.{kind}" for layer in ("cls_score", "bbox_pred") for kind in ("weight", "bias")
    }


def test_fine_tuning_starts_from_them_and_from_a_new_predictor(straight):
    """What the method's own stage is handed, against the files and against a fresh detector."""
    out, _ = straight
    resumed = recipe_from_file(out / "recipe.yaml")
    run = Run(resumed, out)
    given = method.start(run).state_dict()
    exported = load_file(out / "pretrained.safetensors")
    assert all(torch.equal(given[key].cpu(), exported[key]) for key in exported)
    torch.manual_seed(resumed.seed)
    fresh = build_detector(resumed, run.stats, start=False)[0].state_dict()
    assert all(torch.equal(given[key].cpu(), fresh[key]) for key in fresh if key not in exported)


def test_other_recipes_start_from_the_exported_file(straight, tiny_recipe, tiny_set):
    out, _ = straight
    weights = out / "pretrained.safetensors"
    recipe = load_recipe(tiny_recipe, ["loss=sigmoid", f"weights={weights}"])
    stats = checkpoint.load_model_file(weights).stats
    model, notes = build_detector(recipe, stats)
    exported, own = load_file(weights), model.state_dict()
    assert all(torch.equal(own[key], exported[key]) for key in exported)
    assert notes[0] == f"{weights}: {len(exported)} of {len(exported) + 4} weights loaded"
    assert notes[1].startswith("  start anew: 4 (roi_heads.predictor.bbox_pred.bias")


def test_a_one_stage_detector_goes_on_from_its_pre_training(recipe, tiny_set, tmp_path):
    """2DRCL on ATSS (table A.2): backbone, pyramid and towers are taken over; the boxes' layers are dropped."""
    out = tmp_path / "run"
    own = {"name": "atss", "norm": "bn", "frozen_layers": 0, "fpn_channels": 32, "head_convs": 1, "anchor_scales": [2]}
    plain = load_recipe(recipe).model_dump(mode="json")
    plain["detector"] = own
    plain["pretraining"]["schedule"]["epochs"] = 0.5
    plain["schedule"] |= {"epochs": 0.3, "milestones": []}
    given = check_recipe(
        {**plain, "loss": "focal", "pretraining": {**plain["pretraining"], "loss": {"name": "focal"}}}, "test"
    )
    api.train(given, train=tiny_set[0], out=out)
    whole, exported = load_file(out / "stages/1-pretrain/model.safetensors"), load_file(out / "pretrained.safetensors")
    assert {key for key in whole if key not in exported} == {
        *(f"head.{layer}.{kind}" for layer in ("classifier", "box", "quality") for kind in ("weight", "bias")),
        "head.scales",
    }
    assert not [key for key in whole if "trunk" in key] and any("class_tower" in key for key in exported)
    assert (out / "pretrained.safetensors").exists() and api.load(out, "cpu").recipe.detector.name == "atss"


def test_pictures_for_the_report(straight):
    out, _ = straight
    with np.load(out / "stages/1-pretrain/pictures.npz") as file:
        found = {key: file[key] for key in file}
    assert found["view1"].shape == found["view2"].shape == found["reconstruction"].shape == (6, 3, 64, 64)
    assert found["boxes1"].shape == found["boxes2"].shape and found["boxes1"].shape[::2] == (6, 4)
    real = np.isfinite(found["boxes1"]).all(2)
    assert (np.isfinite(found["boxes2"]).all(2) == real).all() and int(real.sum()) == len(found["box_positive"])
    assert found["masks"].shape == (6, 4) and found["positive"].shape == (6,) and found["negative"].shape == (6, 24)
    for name in ("positive", "negative", "box_positive", "box_negative"):
        assert (np.abs(found[name]) <= 1 + 1e-5).all()


def test_stopped_in_pretraining_and_resumed(straight, recipe, tiny_set, tmp_path, monkeypatch):
    reference, _ = straight
    out = tmp_path / "run"
    add = TrainingLog.add

    def stopping(self, parts, rate, done):
        add(self, parts, rate, done)
        if done == 7:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingLog, "add", stopping)
        api.train(recipe, train=tiny_set[0], out=out, overrides=SHORT)
    state = checkpoint.load_resume_point(out / "stages/1-pretrain")
    assert state is not None and {"heads.queues.image.rows", "heads.queues.box.place"} <= state["model"].keys()
    api.train("", out=out, resume=True)
    for name in ("stages/1-pretrain/model.safetensors", "pretrained.safetensors", "model.safetensors"):
        first, second = load_file(reference / name), load_file(out / name)
        assert first.keys() == second.keys()
        assert not [key for key in first if not torch.equal(first[key], second[key])], name
    one, two = (dict(np.load(run / "stages/1-pretrain/pictures.npz")) for run in (reference, out))
    assert all(np.array_equal(one[key], two[key], equal_nan=True) for key in one), "made with the queues"


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "drcl"])
def test_every_preset_trains(preset, recipe, tiny_set, tmp_path):
    overrides = [f"pretraining.preset={preset}", "pretraining.freeze_backbone=false", "schedule.epochs=0.2"]
    overrides += ["pretraining.schedule.epochs=0.5", "schedule.precision=auto", "pretraining.schedule.precision=auto"]
    out = api.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    assert (out / "pretrained.safetensors").exists() and (out / "stages/1-pretrain/pictures.npz").exists()


def test_it_goes_before_any_method(recipe, tiny_set, tmp_path):
    overrides = ["method=decoupled", "second.loss=sigmoid", "second.schedule.epochs=0.2", "second.schedule.batch=4"]
    overrides += ["schedule.epochs=0.2", "pretraining.schedule.epochs=0.2"]
    out = api.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    names = sorted(path.name for path in (out / "stages").iterdir())
    assert names == ["1-pretrain", "2-representation", "3-classifier"]


def test_the_predictor_is_kept_where_the_loss_stays(recipe, tiny_set, tmp_path):
    overrides = ["pretraining.keep_predictor=null", "schedule.epochs=0.2", "pretraining.schedule.epochs=0.2"]
    out = api.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    exported = load_file(out / "pretrained.safetensors")
    assert "roi_heads.predictor.cls_score.weight" in exported
    for more, kept in (
        ([], True),
        (["loss=seesaw"], False),  # as many logits, but they say something else
        (["loss=seesaw", "pretraining.loss=seesaw"], True),
        (["loss=seesaw", "pretraining.keep_predictor=true"], True),
        (["pretraining.preset=moco_v2"], False),
        (["pretraining.keep_predictor=false"], False),
    ):
        changed = load_recipe(recipe, [*overrides, *more])
        assert keeps_predictor(changed) == kept, more
        assert ("classifier" in stages(changed)[0].hands_on) == kept


def test_one_curve_of_the_rate_over_both_stages(recipe, tiny_set, tmp_path):
    """The rate of every line, against one training of as many epochs."""
    overrides = ["pretraining.one_curve=true", "schedule.epochs=0.8", "pretraining.schedule.epochs=0.8"]
    overrides += ["schedule.decay=cosine", "schedule.warmup=2", "schedule.lr=0.01", "logging.every=1"]
    out = api.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    resolved = recipe_from_file(out / "recipe.yaml")
    rates = []
    for stage, before in (("1-pretrain", 0.0), ("2-train", 0.8)):
        lines = [json.loads(line) for line in (out / f"stages/{stage}/metrics.jsonl").read_text().splitlines()]
        rates += [(before, line) for line in lines]
        curve = curve_of(resolved, next(own for own in stages(resolved) if own.folder == stage))
        assert curve is not None and (curve.before, curve.total) == (before, 1.6)
        assert lines[0]["lr"] == pytest.approx(curve.rate(0.0, 0))
    own = [line["lr"] for _, line in rates]
    warm = resolved.schedule.warmup
    assert own[warm:] == sorted(own[warm:], reverse=True)
    assert own[0] < own[1] and own[-1] < 0.2 * max(own) and curve_of(load_recipe(recipe), stages(resolved)[0]) is None
    steps = Curve(Schedule(decay="multistep", milestones=(2, 3), lr=1.0, warmup=4), 2.0, 4.0)
    assert [steps.rate(epoch, 0) for epoch in (0.0, 0.9, 1.0)] == pytest.approx([0.1, 0.1, 0.01])
    first = stages(resolved)[0].inputs  # the pre-training follows from the whole curve
    assert first["schedule.epochs"] == 0.8 and "schedule.epochs" not in stages(load_recipe(recipe))[0].inputs
    with pytest.raises(UserError, match="one_curve"):
        load_recipe("fod/stepwise_faster_rcnn_r18", ["pretraining={proposals: {source: gt_jitter}, one_curve: true}"])


def test_a_contrast_that_leaves_out_its_own_class(recipe, tiny_set, tmp_path):
    keys = ["pretraining.image.same_class=left_out", "pretraining.box.same_class=left_out"]
    keys += ["schedule.epochs=0.2", "pretraining.schedule.epochs=0.5", "pretraining.views.detection=first"]
    out = api.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=keys)
    lines = [json.loads(line) for line in (out / "stages/1-pretrain/metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss_hcl"]) and np.isfinite(line["loss_lcl"]) for line in lines)


def test_mistakes_leave_nothing_behind(recipe, tiny_set, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(UserError, match="proposals.file names no file"):
        api.train(recipe, train=tiny_set[0], out=out, overrides=["pretraining.proposals.source=file"])
    assert not out.exists()


def test_pretraining_can_be_dropped(recipe):
    assert load_recipe(recipe, ["pretraining=null"]).pretraining is None


def test_proposals_as_instances_reach_the_plan(tmp_path, tiny_set, recipe, monkeypatch):
    seen = []

    def plan(*arguments):
        seen.append(made := batch_plan(*arguments))
        return made

    monkeypatch.setattr(method, "batch_plan", plan)
    more = ["instance_source=proposal", "first_epoch=1"]
    overrides = [
        *SHORT,
        "schedule.epochs=0.2",
        "pretraining.schedule.epochs=0.2",
        "pretraining.proposals.source=gt",
        "pretraining.proposals.min_side=20",
        "pretraining.proposals.fallback=none",
        *(f"pretraining.sampler.{key}" for key in more),
    ]
    api.train(recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides)
    index = open_index(tiny_set[0])
    clean = index.clean()
    large = ((clean.boxes[:, 2:] - clean.boxes[:, :2]) >= 20).all(axis=1)
    counts = np.maximum(np.bincount(index.labels[clean.rows][large], minlength=3), 1)
    assert seen[0].stats.instance_count.tolist() == counts.tolist() != np.bincount(index.labels).tolist()
    stored = recipe_from_file(tmp_path / "run" / "recipe.yaml").pretraining.sampler
    assert (stored.instance_source, stored.first_epoch, stored.name) == ("proposal", 1, "dynamic")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "gt_jitter.* draws new boxes for every sample, they cannot be counted"),
        (["pretraining.proposals.source=selective_search"], "write them with `tailfin data proposals"),
        (["pretraining.sampler.name=rfs"], "needs a sampler that counts instances: dynamic or irfs, not rfs"),
        (["pretraining.weights.lcl=0", "pretraining.weights.sr=0"], "no term of this pre-training uses proposals"),
    ],
)
def test_what_cannot_be_counted_is_refused(recipe, overrides, message):
    with pytest.raises(UserError, match=message):
        load_recipe(recipe, ["pretraining.sampler.instance_source=proposal", *overrides])
    with pytest.raises(UserError, match="instance_source"):
        load_recipe(recipe, ["sampler.instance_source=proposal"])  # a training without proposals
