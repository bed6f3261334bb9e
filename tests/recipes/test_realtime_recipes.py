"""Recipes of the query-based detectors made for speed: one network per file, which differs in the method alone."""

from __future__ import annotations

import pytest
import torch

from tailfin import ClassStats, recipes
from tailfin.config import load_recipe
from tailfin.models import build_detector

NAMES = [name for name in recipes.names() if "/d_fine_" in name]
LOSSES = {"": "varifocal", "rfs": "varifocal", "efl": "efl", "eqfl": "eqfl"}


def test_names():
    assert {name.split(":")[0] for name in NAMES} == {"fod/d_fine_tiny", "coco/d_fine_n"}


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("fod/")])
def test_the_method_alone_differs(name):
    recipe, base = load_recipe(name), load_recipe(name.split(":")[0])
    variant = name.partition(":")[2]
    assert recipe.loss.name == LOSSES[variant]
    assert (recipe.sampler.name == "rfs") == bool(variant)
    same = {"weights", "backbone", "detector", "schedule", "data", "evaluation"}
    assert recipe.model_dump(include=same) == base.model_dump(include=same)
    assert f"tailfin train {name}" in recipe.about.command and recipe.about.title


@pytest.mark.parametrize("name", ["fod/d_fine_tiny:efl", "coco/d_fine_n", "coco/d_fine_n:rt_detr_v2_r18"])
def test_it_takes_a_step(name):
    """In its real size; what is frozen does not learn."""
    pytest.importorskip("timm", reason="timm is not installed")
    recipe = load_recipe(name)
    stats = ClassStats(image_count=[400, 60, 5], instance_count=[600, 60, 5], num_images=450)
    picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[8.0, 8, 60, 60], [30, 20, 90, 90]]), "labels": torch.tensor([0, 2])}
    torch.manual_seed(0)
    model, _ = build_detector(recipe, stats, start=False)
    value = torch.stack(list(model.train()([picture], [target]).values())).sum()
    assert torch.isfinite(value)
    value.backward()
    assert all(own.grad.abs().sum() > 0 for own in model.parts()["classifier"].parameters())
    body = list(model.backbone.body.parameters())
    assert body[0].grad is None and body[-1].grad is not None
