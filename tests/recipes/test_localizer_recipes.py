"""Recipes of the class-agnostic detector: they load, say what they are, and take a step."""

from __future__ import annotations

import pytest
import torch

from tailfin import ClassStats, recipes
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector

NAMES = [name for name in recipes.names() if "/localizer_" in name]


def test_names():
    assert NAMES == ["coco/localizer_r50", "fod/localizer_r18", "lvis_v1/localizer_r50"]


@pytest.mark.parametrize("name", NAMES)
def test_recipe(name):
    recipe = load_recipe(name)
    assert recipe.detector.name == "localizer" and recipe.backbone == f"resnet{name[-2:]}"
    assert recipe.data.train.annotations and not recipe.data.val.annotations
    assert recipe.about.title and recipe.about.hardware and f"tailfin train {name}" in recipe.about.command
    assert "tailfin data proposals RUN --annotations" in recipe.about.notes
    text = recipes.find(name).text
    assert text.startswith("about:\n") and all(len(line) <= 120 for line in text.splitlines())
    with pytest.raises(UserError, match="knows no classes to be measured by"):
        load_recipe(name, ["data.val.annotations=val.json"])


def test_the_small_one_takes_a_step():
    recipe = load_recipe("fod/localizer_r18")
    torch.manual_seed(0)
    model, _ = build_detector(recipe, ClassStats(image_count=[4], instance_count=[6], num_images=5), start=False)
    picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    target = {"boxes": torch.tensor([[8.0, 8.0, 60.0, 60.0], [30.0, 20.0, 90.0, 90.0]])}
    total = torch.stack(list(model.train()([picture], [target]).values())).sum()
    total.backward()
    assert torch.isfinite(total)
    assert all(
        any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in part.parameters())
        for part in model.parts().values()
    )
