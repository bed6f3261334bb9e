"""`tailfin cost`: multiply-adds, parameters and speed of recipes and models, by part and side by side."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import tailfin
from tailfin import cost as costs
from tailfin.cli.main import app
from tailfin.cost import cost, open_subject, sample_picture
from tailfin.errors import UserError
from tailfin.models.images import batch_images

pytestmark = pytest.mark.usefixtures("quick_training")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_set, tiny_recipe):
    out = tmp_path_factory.mktemp("cost") / "run"
    return tailfin.train(tiny_recipe, train=tiny_set[0], out=out, overrides=["schedule.epochs=0.2"])


def linear_macs(model, rows: int) -> float:
    """Multiply-adds of the box head: `rows` through its linear layers."""
    layers = [module for module in model.roi_heads.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 4
    return rows * sum(layer.weight.numel() for layer in layers) / 1e9


def conv_macs(part: nn.Module, run) -> float:
    """Multiply-adds of a part's convolutions, from the shapes of their outputs in `run()`."""
    total = []

    def count(layer, _, output):
        total.append(output[0].numel() * layer.weight[0].numel())

    handles = [layer.register_forward_hook(count) for layer in part.modules() if isinstance(layer, nn.Conv2d)]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return sum(total) / 1e9


def test_counts_are_those_of_the_layers(tiny_recipe):
    (found,) = cost([tiny_recipe], size=(64, 96), classes=7, speed=False)
    subject = open_subject(tiny_recipe, classes=7)
    model, picture = subject.model.eval(), sample_picture((64, 96))
    parts = {name: conv_macs(getattr(model, name), lambda: model([picture])) for name in ("backbone", "rpn")}
    assert found.proposals == 50  # the recipe's, whatever an untrained RPN finds
    parts["roi_heads"] = linear_macs(model, 50)
    assert found.part_gmacs == pytest.approx(parts)
    assert found.gmacs == pytest.approx(sum(parts.values()))
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert sum(found.part_parameters.values()) == found.parameters
    assert (found.classes, found.size, found.trained) == (7, (64, 96), False)
    assert found.images_per_second is None


def test_the_final_stage_counts(tiny_recipe):
    """A two-stage recipe costs what its second stage's detector does: the same where only the loss differs."""
    second = ["method=bacl", "loss=objectness", "second.loss=fcbl", "second.features=hallucination"]
    (plain,) = cost([tiny_recipe], classes=5, speed=False)
    (bacl,) = cost([tiny_recipe], classes=5, speed=False, overrides=second)
    assert (bacl.gmacs, bacl.parameters) == (plain.gmacs, plain.parameters)
    (wider,) = cost(
        [tiny_recipe], classes=5, speed=False, overrides=[*second, "second.loss=seesaw", "second.features=null"]
    )
    assert wider.parameters - plain.parameters == 32 + 1  # one more logit on 32 channels


def test_speed_by_part(tiny_recipe, trained):
    first, second = cost([tiny_recipe, trained], classes=3, rounds=2)
    for found in (first, second):
        assert {"backbone", "rpn", "roi_heads", "post-processing", "rest"} == set(found.part_seconds)
        assert all(seconds > 0 for seconds in found.part_seconds.values())
        assert 1 / found.images_per_second == pytest.approx(sum(found.part_seconds.values()), rel=0.5)
    assert second.trained and second.gmacs == pytest.approx(first.gmacs)
    # an untrained head gets logits like a trained one's: 50 proposals x 3 classes, most above 1e-4
    assert 75 < first.candidates <= 150
    assert 0 <= second.candidates <= 150


def test_time_of_the_parts(tiny_recipe, monkeypatch):
    """A slow part shows up as that part; a part inside another counts once."""
    import time

    subject = open_subject(tiny_recipe, classes=3)
    heads = subject.model.eval().roi_heads
    slow = {subject.model.rpn.head: 0.05, heads.head.fc6: 0.03}
    for module, pause in slow.items():
        module.register_forward_pre_hook(lambda *_, pause=pause: time.sleep(pause))
    detect = heads.detect
    monkeypatch.setattr(type(heads), "detect", lambda self, *more: time.sleep(0.04) or detect(*more))
    spent = costs._timed(subject, [sample_picture((64, 64))] * 2, [])
    assert 0.1 <= spent["rpn"] < 0.2 and 0.06 <= spent["roi_heads"] < 0.16 and 0.08 <= spent["post-processing"] < 0.18
    assert costs.OWN not in spent
    assert not {"detections", "outputs"} & vars(subject.model).keys()  # as before


def test_settled_norms_keep_numbers_sane():
    """Random weights with frozen norms would double the spread in every block."""
    subject = open_subject("coco/faster_rcnn_r50_softmax", ["backbone=resnet101"], classes=3)
    picture = sample_picture((64, 64))
    costs.settle(subject.model.eval(), picture)
    with torch.no_grad():
        levels = subject.model.backbone(batch_images([picture]).tensors)
    assert all(torch.isfinite(level).all() and level.std() < 30 for level in levels.values())


@pytest.mark.parametrize(
    "given, classes",
    [("lvis_v1/faster_rcnn_r50", 1203), ("bacl/XI/bacl/lvis_v0.5/r50", 1230), ("fod/bacl_r18", 31)],
)
def test_classes_of_a_data_set(given, classes):
    assert costs._stats(tailfin.config.load_recipe(given), given, None).num_classes == classes


def test_classes_of_the_training_file(tiny_set, tiny_recipe):
    (found,) = cost([tiny_recipe], overrides=[f"data.train.annotations={tiny_set[0]}"], speed=False)
    assert found.classes == 3


def test_command(tmp_path, tiny_recipe, trained, tiny_set):
    pictures = sorted(tiny_set[1].with_suffix("").glob("*.png"))[:2]
    words = ["cost", tiny_recipe, trained, "detector.head_channels=48", "--classes", 3, "--rounds", 1]
    words += ["--images", pictures[0], "--images", pictures[1], "--json", tmp_path / "cost.json", "--device", "cpu"]
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    first, second = json.loads((tmp_path / "cost.json").read_text())
    assert first["parameters"] > second["parameters"]  # the override is the recipe's
    assert f"x {second['parameters'] / first['parameters']:.3f}" in done.output
    assert "post-processing" in done.output and "random weights" in done.output
    assert (first["size"], second["trained"]) == ([64, 64], True)


def test_mistakes(tiny_recipe, tmp_path):
    cases = {
        "give --classes": lambda: cost([tiny_recipe], speed=False),
        "at least 32 x 32": lambda: cost([tiny_recipe], classes=3, size=(8, 8)),
        "at least one round": lambda: cost([tiny_recipe], classes=3, rounds=0),
        'device "abacus" cannot be used': lambda: cost([tiny_recipe], classes=3, device="abacus"),
        "nowhere.safetensors does not exist": lambda: cost([tmp_path / "nowhere.safetensors"]),
        "faster_rcnn_r18_softmax": lambda: cost(["fod/faster_rcnn_r18_sotfmax"]),
    }
    for message, call in cases.items():
        with pytest.raises(UserError, match=message):
            call()
