"""Recipes that start from packaged ImageNet weights: one detector per set, which differs in the method alone."""

from __future__ import annotations

import pytest
import torch

from tailfin import ClassStats, recipes
from tailfin.config import load_recipe
from tailfin.models import build_detector
from tailfin.schema.stages import keeps_predictor, second_recipe

NAMES = [name for name in recipes.names() if name.split(":")[0].endswith("/packaged")]
OTHERS = [name for name in recipes.names() if name.split(":")[0].endswith("_lite0")]  # the other detectors
PRETRAINED = ("drcl", "drcl_bacl")
LOSSES = {
    "": ("softmax",),
    "rfs": ("softmax",),
    "bacl": ("objectness", "fcbl"),
    "localizer": (),
    "drcl": ("softmax",),
    "drcl_bacl": ("objectness", "fcbl"),
}
DETECTORS = [name for name in NAMES if not name.endswith(":localizer")]


def test_names():
    assert sorted({name.split("/")[0] for name in NAMES}) == ["fod", "road12"]
    assert {name.partition(":")[2] for name in NAMES} == set(LOSSES)


@pytest.mark.parametrize("name", DETECTORS)
def test_recipe(name):
    recipe, base = load_recipe(name), load_recipe(name.split(":")[0])
    variant = name.partition(":")[2]
    assert (recipe.weights, recipe.backbone) == ("packaged", "timm/tf_efficientnet_lite0")
    assert (recipe.detector.norm, recipe.detector.frozen_layers, recipe.data.sizes) == ("frozen_bn", 2, (128,))
    stages = [recipe, second_recipe(recipe)] if recipe.second else [recipe]
    assert tuple(stage.loss.name for stage in stages) == LOSSES[variant]
    assert recipe.sampler.name == ("rfs" if variant in ("rfs", "drcl") else "plain")
    assert (recipe.pretraining is not None) == (variant in PRETRAINED)
    assert recipe.detector == base.detector and recipe.evaluation == base.evaluation
    schedules = [stage.schedule for stage in stages]
    if recipe.pretraining:
        schedules.append(recipe.pretraining.schedule)
        assert keeps_predictor(recipe) and recipe.pretraining.proposals.file == "proposals.npz"
        assert recipe.pretraining.sampler.threshold == load_recipe(f"{name.split(':')[0]}:rfs").sampler.threshold
        assert recipe.pretraining.views.flip == recipe.data.flip
    assert sum(schedule.epochs for schedule in schedules) == base.schedule.epochs
    for stage in stages:
        assert stage.data.model_copy(update={"copy_paste": False}) == base.data
        method = {"epochs", "milestones", "weight_decay"} if len(schedules) > 1 else set()
        assert stage.schedule.model_dump(exclude=method) == base.schedule.model_dump(exclude=method)
    assert recipe.about.title and f"tailfin train {name}" in recipe.about.command
    assert "tailfin[weights]" in recipe.about.notes


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(":localizer")])
def test_localizer(name):
    """It starts where the detector starts and sees its pictures; its boxes go where `drcl` looks for them."""
    recipe, base = load_recipe(name), load_recipe(name.split(":")[0])
    assert (recipe.detector.name, recipe.weights, recipe.backbone) == ("localizer", base.weights, base.backbone)
    assert recipe.detector.anchor_sizes == base.detector.anchor_sizes and recipe.data.train == base.data.train
    assert recipe.data.sizes == base.data.sizes and not recipe.data.val.annotations
    assert "--out DATA/proposals.npz" in recipe.about.notes


@pytest.mark.parametrize("name", OTHERS)
def test_other_detector(name):
    """One start, size of pictures and number of epochs per set, whatever the detector and the method."""
    recipe, base = load_recipe(name), load_recipe(name.split("/")[0] + "/packaged")
    assert (recipe.weights, recipe.backbone) == (base.weights, base.backbone)
    for key in ("norm", "frozen_layers", "fpn_channels", "fpn_layers"):
        assert getattr(recipe.detector, key) == getattr(base.detector, key)
    assert recipe.data.model_copy(update={"copy_paste": False}) == base.data
    stages = [recipe, *([second_recipe(recipe)] if recipe.second else []), *filter(None, [recipe.pretraining])]
    assert sum(stage.schedule.epochs for stage in stages) == base.schedule.epochs
    assert ("segm" in recipe.evaluation.iou) == (name.startswith("road12"))
    assert recipe.about.title and f"tailfin train {name}" in recipe.about.command
    assert "tailfin[weights]" in recipe.about.notes


@pytest.mark.parametrize("name", DETECTORS + [name for name in OTHERS if ":" not in name])
def test_it_takes_a_step(name):
    """Each stage learns from a picture; the stem and the first layer do not."""
    pytest.importorskip("timm", reason="timm is not installed")
    recipe = load_recipe(name)
    stats = ClassStats(image_count=[400, 60, 5], instance_count=[600, 60, 5], num_images=450)
    picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    masks = "segm" in recipe.evaluation.iou
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0], [30.0, 20.0, 90.0, 90.0]]), "labels": torch.tensor([0, 2])}
    if masks:
        target["masks"] = torch.zeros(2, 96, 96, dtype=torch.uint8)
        target["masks"][0, 8:60, 8:60] = 1
        target["masks"][1, 20:90, 30:90] = 1
    for stage in [recipe, second_recipe(recipe)] if recipe.second else [recipe]:
        torch.manual_seed(0)
        model, _ = build_detector(stage, stats, start=False)
        if stage is not recipe:
            model.freeze_but(recipe.second.trains)
        value = torch.stack(list(model.train()([picture], [target]).values())).sum()
        assert torch.isfinite(value)
        value.backward()
        assert any(own.grad.abs().sum() > 0 for own in model.parts()["classifier"].parameters() if own.requires_grad)
        body = list(model.backbone.body.parameters())
        assert body[0].grad is None and (body[-1].grad is None) == (stage is not recipe)
