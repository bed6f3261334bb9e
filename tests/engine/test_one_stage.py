"""Methods and tools on one-stage detectors: decoupled training, step-wise learning, cost."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tailfin import api, checkpoint
from tailfin.config import check_recipe
from tailfin.cost import cost
from tailfin.errors import UserError
from tailfin.training_log import TrainingLog

pytestmark = pytest.mark.usefixtures("quick_training")
DETECTORS = {
    "retinanet": {"name": "retinanet", "anchor_scale": 1.5},
    "atss": {"name": "atss", "anchor_scales": [2]},
}
SMALL = {
    "norm": "bn",
    "frozen_layers": 0,
    "fpn_channels": 32,
    "fpn_layers": [2, 3],
    "fpn_convs": "none",
    "head_convs": 1,
}
SCHEDULE = {"epochs": 2, "batch": 4, "lr": 0.01, "warmup": 2, "milestones": [1], "clip": 10.0}


def recipe(name: str, **more):
    values = {
        "weights": "none", "backbone": "resnet18", "detector": {**SMALL, **DETECTORS[name]}, "loss": "focal",
        "schedule": SCHEDULE, "evaluation": {"max_dets": 20}, "logging": {"every": 1},
        "data": {"resize": "square", "sizes": [64], "workers": 0, "group_by_aspect": False}, **more,
    }  # fmt: skip
    return check_recipe(values, "test")


@pytest.mark.parametrize("name", DETECTORS)
def test_decoupled_training(name, tiny_set, tmp_path):
    """The second stage trains a new classifier with another loss and leaves all else as it was."""
    second = {"loss": "efl", "schedule": SCHEDULE, "trains": ["classifier"], "fresh_classifier": True}
    out = api.train(recipe(name, method="decoupled", second=second), train=tiny_set[0], out=tmp_path / "run")
    first = api.load(out / "stages/1-representation/model.safetensors", "cpu").model.state_dict()
    last = api.load(out, "cpu").model.state_dict()
    moved = {key for key in first if not key.startswith("class_loss") and not torch.equal(first[key], last[key])}
    assert moved == {"head.classifier.weight", "head.classifier.bias"}
    assert float(last["class_loss.pos_grad"].sum()) > 0


@pytest.mark.parametrize("name", DETECTORS)
def test_stepwise_learning(name, tiny_set, tmp_path):
    """Base, head class expert, transfer to the tail: the distillation terms are logged, exemplars are chosen."""
    section = {"division": [8], "head": {"lr": 1e-3}, "tail": {"lr": 1e-3, "epochs": 1, "milestones": []}}
    out = api.train(recipe(name, method="stepwise", stepwise=section), train=tiny_set[0], out=tmp_path / "run")
    stages = sorted((out / "stages").iterdir())
    assert len(stages) == 3
    lines = [json.loads(line) for line in (stages[-1] / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert steps and all(line["loss_class_distillation"] > -1e-6 for line in steps)


def test_what_a_one_stage_detector_cannot_have():
    with pytest.raises(UserError, match="class_agnostic trains an RPN and a box head, which atss lacks"):
        recipe("atss", pretraining={"preset": "aligndet", "freeze_backbone": False})
    with pytest.raises(UserError, match="hallucination needs a box head on proposals"):
        recipe("atss", features="hallucination", loss="fcbl")
    with pytest.raises(UserError, match='"rpn"'):
        recipe("retinanet", method="decoupled", second={"trains": ["classifier", "rpn"]})


def test_cost_of_recipes():
    """Counted without data or weights, and timed on outputs as spread as a trained detector's."""
    found = cost([f"fod/{name}_r18" for name in DETECTORS], size=(96, 96), classes=31, rounds=1)
    for own in found:
        assert own.gmacs > 0.1 and own.proposals is None and own.images_per_second > 0
        assert {"backbone", "head"} <= set(own.part_gmacs) and own.candidates > 100


class Stopped(Exception):
    pass


@pytest.mark.parametrize("name", DETECTORS)
def test_stopped_and_resumed_to_the_bit(name, tiny_set, tmp_path, monkeypatch):
    """EFL's gradient sums go on too."""
    own = recipe(name, loss="efl", schedule={**SCHEDULE, "ema": 0.9}, logging={"every": 1, "checkpoint_every": 5})
    straight = api.train(own, train=tiny_set[0], out=tmp_path / "straight")
    out, add = tmp_path / "run", TrainingLog.add

    def stopping(self, parts, rate, done):
        add(self, parts, rate, done)
        if done == 8:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingLog, "add", stopping)
        api.train(own, train=tiny_set[0], out=out)
    assert checkpoint.load_resume_point(out / "stages" / "1-train")["iteration"] == 5
    api.train("", out=out, resume=True)
    first, last = (load_file(run / "model.safetensors") for run in (straight, out))
    assert first.keys() == last.keys()
    assert [key for key in first if not torch.equal(first[key], last[key])] == []


@pytest.mark.parametrize("row", ["2drcl/A.2/ecm+2drcl/lvis_v1/r50", "stepwise/2/efl/lvis_v1/r50"])
def test_a_published_row_trains(row, tiny_set, tmp_path):
    """As it stands, but for its size, its start and where proposals come from."""
    schedule = "{epochs: 1, batch: 4, warmup: 0, milestones: []}"
    small = [
        *("weights=none", "backbone=resnet18", "detector.norm=bn", "detector.frozen_layers=0"),
        *("detector.fpn_channels=32", "detector.head_convs=1", "detector.pre_nms=200", "data.workers=0"),
        *("schedule.epochs=1", "schedule.batch=4", "schedule.warmup=0", "schedule.milestones=[]"),
        *("data.sizes=[64]", "data.max_size=96", "data.train.images=", "data.val.images=", "evaluation.batch=3"),
    ]
    if "+2drcl" in row:
        small += ["pretraining.proposals={source: gt}", f"pretraining.schedule={schedule}"]
    out = api.train(row, train=tiny_set[0], val=tiny_set[1], out=tmp_path / "run", overrides=small)
    assert len(list((out / "stages").iterdir())) == 1 + ("+2drcl" in row)
    assert -1 <= json.loads((out / "metrics.json").read_text())["bbox"]["AP"] <= 1


@pytest.mark.parametrize("loss", ["focal", "efl", "ecm"])
@pytest.mark.parametrize("name", DETECTORS)
def test_losses(name, loss, tiny_set, tmp_path):
    """Each falls within two epochs, though the few steps at this rate are no straight way."""
    out = api.train(recipe(name, loss=loss), train=tiny_set[0], out=tmp_path / "run")
    lines = [json.loads(line) for line in (out / "stages/1-train/metrics.jsonl").read_text().splitlines()]
    terms = [line["loss_classifier"] for line in lines if "loss_classifier" in line]
    assert min(terms[-3:]) < terms[0]
