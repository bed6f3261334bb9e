"""What a plan says of itself: samplers that repeat nothing, warm-ups that do not end, flips of left and right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailfin import recipes
from tailfin.config import load_recipe
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.plan_notes import plan_notes
from tailfin.run import batch_plan
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import stages
from tailfin.stats import ClassStats


def notes(recipe: Recipe, file: Path) -> list[str]:
    files = recipe.data.model_copy(
        update={"root": "", "train": recipe.data.train.model_copy(update={"annotations": str(file), "images": ""})}
    )
    source = open_source(files.train, "", "train")
    stats = ClassStats.from_index(source.index)
    found = []
    for stage in stages(recipe):
        dataset = TrainingDataset(source, stage.recipe.data, stage.recipe.seed)
        found += plan_notes(stage, batch_plan(stage.recipe, dataset, stats))
    return found


def even(recipe: Path, *overrides: str) -> Recipe:
    """A recipe with a warm-up that is short enough for all sets here."""
    return load_recipe(recipe, ["schedule.warmup=0", *overrides])


def test_a_good_plan_has_none(tiny_recipe, tiny_set):
    assert notes(even(tiny_recipe), tiny_set[0]) == []
    assert notes(even(tiny_recipe, "sampler=plain"), tiny_set[0]) == []


@pytest.mark.parametrize("sampler", ["rfs", "irfs", "dynamic"])
def test_a_threshold_below_every_share_is_told_with_one_that_is_not(tiny_recipe, tiny_set, sampler):
    (note,) = notes(even(tiny_recipe, f"sampler={{name: {sampler}, threshold: 1e-3}}"), tiny_set[0])
    assert f"sampler {sampler} repeats no picture with its threshold 0.001" in note and '"blue"' in note
    threshold = note.partition("sampler.threshold=")[2].split()[0]
    assert notes(even(tiny_recipe, f"sampler={{name: {sampler}, threshold: {threshold}}}"), tiny_set[0]) == []


def test_classes_that_are_even_need_no_sampler(tiny_recipe, tmp_path):
    document = {
        "images": [{"id": n, "width": 50, "height": 40, "file_name": f"{n}.png"} for n in range(20)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 1 + n % 2, "bbox": [1, 1, 9, 9], "area": 81} for n in range(20)
        ],
    }
    path = tmp_path / "even.json"
    path.write_text(json.dumps(document))
    (note,) = notes(even(tiny_recipe, "sampler=rfs"), path)
    assert "nearly even, sampler=plain does the same" in note


def test_a_rounding_that_takes_all_repeats_away_is_told(tiny_recipe, tiny_set):
    """Blue, in 2 of 26 images, would come 1.4 times."""
    keys = "sampler={name: rfs, threshold: 0.15, rounding: floor}"
    assert "repeats no picture" in notes(even(tiny_recipe, keys), tiny_set[0])[0]
    assert notes(even(tiny_recipe, keys.replace("floor", "ceil")), tiny_set[0]) == []


def test_a_long_warmup_is_told(tiny_recipe, tiny_set):
    recipe = load_recipe(tiny_recipe, ["schedule.warmup=500"])
    (note,) = notes(recipe, tiny_set[0])
    warmup = int(note.rpartition("schedule.warmup=")[2].split()[0])
    assert (
        "the warm-up of 500 iterations is as long as, or longer than, the run's" in note and "of 0.01 at most" in note
    )
    assert 1 <= warmup <= 4 and notes(load_recipe(tiny_recipe, [f"schedule.warmup={warmup}"]), tiny_set[0]) == []
    (note,) = notes(load_recipe(tiny_recipe, ["schedule.warmup=10"]), tiny_set[0])
    assert "of the run's" in note and "at most" not in note


def test_steps_of_the_rate_behind_the_end_are_told(tiny_recipe, tiny_set):
    steps = ["schedule.epochs=4", "schedule.decay=multistep"]
    (note,) = notes(even(tiny_recipe, *steps, "schedule.milestones=[8, 11]"), tiny_set[0])
    assert "the rate never falls: schedule.milestones=[8, 11]" in note
    remedy = note.partition("; ")[2].partition(" are ")[0]
    assert notes(even(tiny_recipe, *steps, remedy), tiny_set[0]) == []
    for fine in ("[]", "[3]", "[3, 11]"):  # none is asked for; one comes; one comes, the other not
        assert notes(even(tiny_recipe, *steps, f"schedule.milestones={fine}"), tiny_set[0]) == []
    other = even(tiny_recipe, "schedule.epochs=4", "schedule.decay=cosine", "schedule.milestones=[8, 11]")
    assert notes(other, tiny_set[0]) == []


def test_a_flip_of_classes_with_sides_is_told(tiny_recipe, tiny_set, tmp_path):
    document = json.loads(tiny_set[0].read_text())
    document["categories"][0]["name"], document["categories"][1]["name"] = "turn left", "turn right"
    path = tmp_path / "sides.json"
    path.write_text(json.dumps(document))
    (note,) = notes(even(tiny_recipe), path)
    assert note.startswith("data.flip=0.5 mirrors pictures") and '"turn left", "turn right"' in note
    assert notes(even(tiny_recipe, "data.flip=0"), path) == []


def test_the_second_stage_has_keys_of_its_own(tiny_recipe, tiny_set):
    recipe = load_recipe(
        tiny_recipe, ["method=decoupled", "schedule.warmup=0", "second.schedule.warmup=500", "second.schedule.batch=4"]
    )
    (note,) = notes(recipe, tiny_set[0])
    assert "second.schedule.warmup=" in note


@pytest.mark.parametrize("name", [name for name in recipes.names() if name.startswith("fod/") and ":" not in name])
def test_the_small_recipes_have_none_on_the_set_that_they_are_for(data_dir, name):
    recipe = load_recipe(name)
    if recipe.pretraining is None and recipe.stepwise is None:
        assert notes(recipe, data_dir / "fod31-lt" / "train.json") == []


def test_pictures_without_a_partner_are_told_to_bags(tiny_recipe, tiny_set):
    alone = even(tiny_recipe, "sampler=plain", "loss=bags", "schedule.batch=4", "schedule.accumulation=4")
    (note,) = notes(alone, tiny_set[0])
    assert "loss bags: a process has one picture at a time" in note and "schedule.accumulation" in note
    assert notes(even(tiny_recipe, "sampler=plain", "loss=bags", "schedule.accumulation=2"), tiny_set[0]) == []
    assert notes(even(tiny_recipe, "sampler=plain", "loss={name: bags, per: process}"), tiny_set[0]) == []


def test_pictures_that_a_pre_training_does_not_mix(tiny_recipe, tiny_set):
    """Copy-paste belongs to BACL's first stage, behind 2DRCL's views."""
    section = "pretraining={proposals: {source: gt_jitter}, schedule: {warmup: 0}}"
    told = "the pre-training shows single pictures: data.copy_paste, data.mixup begin with the stage behind it"
    plain = notes(even(tiny_recipe, section), tiny_set[0])
    mixed = notes(even(tiny_recipe, section, "data.copy_paste=true", "data.mixup=0.5"), tiny_set[0])
    assert told not in plain
    assert mixed == [*plain, told]
