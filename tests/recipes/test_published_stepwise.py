"""Published rows of step-wise learning and its baseline: the recipe of a row is what the row says."""

from __future__ import annotations

import pytest
import torch

from tailfin import ClassStats, recipes
from tailfin.cli.recipes import _recipe_facts
from tailfin.config import load_recipe
from tailfin.data.smooth_tail import divide, divide_by_rank, planned_steps
from tailfin.methods.stepwise import freeze_but
from tailfin.models import build_detector
from tailfin.models.transfer import Transfer
from tailfin.recipes import Runnable
from tailfin.schema.stages import differences, stages, step_recipe

PAPER = recipes.papers()["stepwise"]
STEPWISE = [name for name in recipes.names() if load_recipe(name).stepwise]
ROWS = {row.id: row for row in recipes.rows() if row.detector == "deformable_detr"}


def test_all_rows_on_this_detector_run():
    assert len(ROWS) == 39
    assert all(isinstance(recipes.resolve(row_id), Runnable) for row_id in ROWS)


@pytest.mark.parametrize("row_id", ROWS)
def test_row(row_id):
    row, run = ROWS[row_id], recipes.resolve(row_id)
    recipe = load_recipe(row_id)
    assert recipe.detector.name == "deformable_detr" and recipe.loss.name == "focal" and recipe.weights == "imagenet"
    assert recipe.backbone == row.backbone.replace("r", "resnet")
    assert row.dataset in recipe.data.train.annotations and row.dataset in recipe.data.val.annotations
    assert recipe.sampler.name == "plain"  # of step 0
    epochs, *later = PAPER.defaults["epochs"]
    schedule = recipe.schedule
    assert (schedule.epochs, schedule.milestones, schedule.batch) == (epochs, (40,), PAPER.defaults["batch"])
    assert (schedule.optimizer, schedule.lr, schedule.weight_decay, schedule.clip) == ("adamw", 2e-4, 1e-4, 0.1)
    assert (recipe.method == "stepwise") == (row.method_key == "stepwise") == (recipe.stepwise is not None)
    assert recipe.about.published == row.numbers and recipe.about.table == f"table {row.table}"
    if recipe.stepwise is not None:
        check_steps(row, recipe.stepwise, later)
    plain = load_recipe(run.recipe, run.overrides)
    for index in range(len(run.overrides)):
        assert load_recipe(run.recipe, run.overrides[:index] + run.overrides[index + 1 :]) != plain


def check_steps(row, steps, epochs):
    """The steps that the row has, with the paper's settings but for the row's switches."""
    settings = PAPER.defaults | row.settings
    assert list(steps.division) == settings["division"]
    assert (steps.head is not None) == settings.get("fine_tuning", True)
    assert (steps.tail is not None) == settings.get("knowledge_transfer", True)
    assert (steps.base, steps.boundary, steps.both) == ("whole", "gt", None)
    if steps.head is not None:
        assert (steps.head.epochs, steps.head.lr, steps.head.photometric) == (epochs[0], 2e-5, True)
        counts = (steps.head.per_head_class, steps.head.per_tail_class)
        assert counts == (settings["d_head_n_head"], settings["d_head_n_tail"])
    if steps.tail is not None:
        assert (steps.tail.epochs, steps.tail.lr, steps.tail.milestones) == (epochs[1], 2e-4, (1,))
        counts = (steps.tail.per_head_class, steps.tail.per_tail_class)
        assert counts == (settings["d_tail_n_head"], settings["d_tail_n_tail"])
        taught = steps.tail.distillation
        assert taught.feature == (1.0 if settings.get("fm_dis", True) else 0)
        assert taught.classes == (0.1 if settings.get("cls_dis", True) else 0)
        if taught.classes:
            assert taught.shared_queries == settings.get("soq", True)
    for step in (steps.head, steps.tail):
        if step is not None:
            assert step.rfs.name == ("released" if row.sampler == "rfs" else "plain")
            assert step.trains == ()


def test_switches_are_overrides_of_one_recipe():
    expected = {
        "1/stepwise/lvis_v1/r101": ("lvis_v1", ("backbone=resnet101",)),
        "3/stepwise/lvis_v0.5/r50/ft": ("lvis_v0.5", ("stepwise.tail=null",)),
        "4/stepwise/lvis_v0.5/r50/fm+cls": ("lvis_v0.5", ("stepwise.tail.distillation.shared_queries=false",)),
        "5/stepwise/lvis_v0.5/r50/division=10-30-100": ("lvis_v0.5", ("stepwise.division=[10, 30, 100]",)),
        "8/stepwise/lvis_v0.5/r50/rfs=off": ("lvis_v0.5", ("stepwise.head.rfs=plain", "stepwise.tail.rfs=plain")),
    }
    for row_id, (data, overrides) in expected.items():
        assert recipes.resolve(f"stepwise/{row_id}") == Runnable(f"{data}/deformable_detr_r50:stepwise", overrides)


def test_the_small_recipes_are_their_step_0():
    """A finished run of the plain recipe can be step 0 (`--stage1`): nothing that it depends on differs."""
    pairs = (
        ("fod/stepwise_tiny", "fod/deformable_detr_tiny"),
        ("fod/stepwise_faster_rcnn_r18", "fod/losses:objectness"),
        ("lvis_v1/deformable_detr_r50:stepwise", "lvis_v1/deformable_detr_r50"),
        ("lvis_v0.5/deformable_detr_r50:stepwise", "lvis_v0.5/deformable_detr_r50"),
    )
    for steps, plain in pairs:
        assert differences(stages(load_recipe(steps))[0].inputs, stages(load_recipe(plain))[0].inputs) == []


@pytest.mark.parametrize("name", STEPWISE)
def test_says_what_it_is(name):
    recipe, text = load_recipe(name), recipes.find(name).text
    assert recipe.about.title and recipe.about.hardware and recipe.about.paper
    assert f"tailfin train {name} data.root=DATA" in recipe.about.command
    given = recipe.stepwise.base == "given"  # its step 0 is a model file
    assert ("--weights is a detector" if given else "--stage1 RUN") in recipe.about.notes
    assert text.startswith("about:\n") and all(len(line) <= 120 for line in text.splitlines())


def test_numbers_of_the_rows():
    for data in ("lvis_v1", "lvis_v0.5"):
        own, larger = (recipes.published_row(f"stepwise/1/stepwise/{data}/{depth}") for depth in ("r50", "r101"))
        name = f"{data}/deformable_detr_r50:stepwise"
        assert load_recipe(name).about.published == own.numbers
        shown = next(fact for fact in _recipe_facts(load_recipe(name)) if fact.startswith(f"row {larger.id}: "))
        assert ", ".join(f"{key} {value}" for key, value in larger.numbers.items()) in shown


@pytest.mark.parametrize("name", [name for name in STEPWISE if name.startswith("fod/")])
def test_small_recipe_takes_its_steps(name):
    """Every step's detector is built and learns from a picture; what does not train has no gradient."""
    recipe = load_recipe(name)
    stats = ClassStats(image_count=[400, 60, 5], instance_count=[600, 60, 5], num_images=450)
    picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [30.0, 20.0, 90.0, 90.0]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 2])}
    settings = recipe.stepwise
    if settings.parts == "rank":
        settings = settings.model_copy(update={"division": (1, 2)})  # of three classes
        parts = divide_by_rank(stats.instance_count, settings.division)
    else:
        parts = divide(stats.image_count, settings.division)
        assert parts.tolist() == [0, 0, 1]
    for step in planned_steps(settings, parts, stats.instance_count):
        own = step_recipe(recipe, step.config)
        torch.manual_seed(0)
        (model, _), (teacher, _) = (build_detector(own, stats, start=False) for _ in range(2))
        freeze_but(model, step.config.trains)
        taught = step.config.distillation is not None
        shell = Transfer(model, teacher, torch.from_numpy(step.old), step.config.distillation) if taught else model
        losses = shell.train()([picture, picture], [target, target])
        assert ("loss_class_distillation" in losses) == taught
        total = torch.stack(list(losses.values())).sum()
        assert torch.isfinite(total)
        total.backward()
        assert all((p.grad is None) != ("all" in step.config.trains) for p in model.parts()["backbone"].parameters())
        assert any(p.grad is not None and bool(p.grad.any()) for p in model.parts()["classifier"].parameters())
