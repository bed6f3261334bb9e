"""D-FINE, RT-DETR v2: methods around them, a stopped training that goes on to the same bits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tailfin import api, checkpoint
from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.training_log import TrainingLog

pytest.importorskip("timm", reason="timm is not installed")
pytestmark = pytest.mark.usefixtures("quick_training")
SMALL = {
    **{"norm": "own", "frozen_layers": 0, "channels": 32, "heads": 4, "feedforward": 32, "queries": 10},
    **{"encoder_channels": 32, "encoder_feedforward": 32, "encoder_expansion": 0.5, "decoder_layers": 2},
    **{"levels": 2, "denoising": 8},
}
DETECTORS = {
    "d_fine": {"name": "d_fine", "points": [2, 2], "encoder_depth": 0.34, "bins": 8},
    "rt_detr_v2": {"name": "rt_detr_v2", "points": 2},
}
SCHEDULE = {"epochs": 1, "batch": 4, "lr": 1e-3, "warmup": 2, "milestones": [], "clip": 1.0, "optimizer": "adamw"}


def recipe(name: str, **more):
    values = {
        "weights": "none", "backbone": "timm/test_efficientnet", "detector": {**SMALL, **DETECTORS[name]},
        "loss": "varifocal", "schedule": SCHEDULE, "evaluation": {"max_dets": 20}, "logging": {"every": 1},
        "data": {"resize": "square", "sizes": [64], "workers": 0, "group_by_aspect": False}, **more,
    }  # fmt: skip
    return check_recipe(values, "test")


class Stopped(Exception):
    pass


def test_stopped_and_resumed_to_the_bit(tiny_set, tmp_path, monkeypatch):
    """Noise of the queries, EFL's gradient sums and repeated pictures go on too; then it measures and predicts."""
    more = {"sampler": {"name": "rfs", "threshold": 0.5}, "schedule": {**SCHEDULE, "ema": 0.9}}
    own = recipe("d_fine", loss="efl", logging={"every": 1, "checkpoint_every": 3}, **more)
    straight = api.train(own, train=tiny_set[0], val=tiny_set[1], out=tmp_path / "straight")
    out, add = tmp_path / "run", TrainingLog.add

    def stopping(self, parts, rate, done):
        add(self, parts, rate, done)
        if done == 5:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingLog, "add", stopping)
        api.train(own, train=tiny_set[0], val=tiny_set[1], out=out)
    assert checkpoint.load_resume_point(out / "stages" / "1-train")["iteration"] == 3
    api.train("", out=out, resume=True)
    first, last = (load_file(run / "model.safetensors") for run in (straight, out))
    assert first.keys() == last.keys()
    assert [key for key in first if not torch.equal(first[key], last[key])] == []
    assert json.loads((out / "metrics.json").read_text()) == json.loads((straight / "metrics.json").read_text())
    found = api.load(out, "cpu").predict(next(iter(tiny_set[1].parent.rglob("*.png"))))[0]
    assert len(found["scores"]) and (found["boxes"] >= 0).all()


def test_stepwise_learning(tiny_set, tmp_path):
    """Base, head class expert, transfer to the tail: the distillation terms are logged, exemplars are chosen."""
    section = {"division": [8], "head": {"lr": 1e-3}, "tail": {"lr": 1e-3, "epochs": 1, "milestones": []}}
    out = api.train(recipe("d_fine", method="stepwise", stepwise=section), train=tiny_set[0], out=tmp_path / "run")
    stages = sorted((out / "stages").iterdir())
    assert len(stages) == 3
    lines = [json.loads(line) for line in (stages[-1] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps and all(line["loss_class_distillation"] > -1e-6 for line in steps)


def test_decoupled_training_with_calibration(tiny_set, tmp_path):
    """The second stage trains the class heads with another loss and leaves all else; scores are calibrated."""
    second = {"loss": "eqfl", "schedule": SCHEDULE, "trains": ["classifier"]}
    own = recipe("rt_detr_v2", method="decoupled", second=second, calibration={"name": "norcal", "gamma": 0.6})
    out = api.train(own, train=tiny_set[0], out=tmp_path / "run")
    first = api.load(out / "stages/1-representation/model.safetensors", "cpu").model.state_dict()
    model = api.load(out, "cpu").model
    last = model.state_dict()
    moved = {key for key in first if key in last and not torch.equal(first[key], last[key])}
    heads = ("network.decoder.class_embed.", "network.enc_score_head.", "network.denoising_class_embed.", "criterion.")
    assert moved and all(key.startswith(heads) for key in moved), moved
    assert model.rescore is not None


def test_what_they_cannot_have():
    with pytest.raises(UserError, match="pretraining needs a box head on proposals"):
        recipe("d_fine", pretraining={"preset": "aligndet"})
    with pytest.raises(UserError, match='"rpn"'):
        recipe("d_fine", method="decoupled", second={"trains": ["classifier", "rpn"]})
    with pytest.raises(UserError, match="points needs a number per level"):
        check_recipe({"weights": "none", "detector": {"name": "d_fine", "points": [2]}}, "test")
