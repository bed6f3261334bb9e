"""Recipes: every one loads, says what it is, and trains; the command lists, shows and copies them."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tailfin import ClassStats, losses, recipes
from tailfin.cli.recipes import _recipe_facts, app
from tailfin.config import load_recipe, parse_yaml
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.recipes import Runnable
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import second_recipe

ROWS = {row.id: row for row in recipes.rows()}
RUNS = {row_id: recipes.resolve(row_id) for row_id in ROWS}
RUNNABLE = [row_id for row_id, run in RUNS.items() if isinstance(run, Runnable)]
STEPWISE = [name for name in recipes.names() if load_recipe(name).stepwise]  # see test_published_stepwise.py
LOCALIZERS = [name for name in recipes.names() if "/localizer_" in name]  # see test_localizer_recipes.py
DETRS = [name for name in recipes.names() if name.endswith("/deformable_detr_tiny")]  # see test_published_stepwise.py
# see test_packaged_recipes.py
PACKAGED = [name for name in recipes.names() if name.split(":")[0].endswith(("/packaged", "_lite0"))]
REALTIME = [name for name in recipes.names() if "/d_fine_" in name]  # see test_realtime_recipes.py
APART = REALTIME + STEPWISE + LOCALIZERS + DETRS + PACKAGED
SMALL = [name for name in recipes.names() if name.split("/")[0] in ("demo", "fod", "road12") and name not in APART]

# method of a recipe (its variant, or the last word of its name) -> losses of its stages
LOSSES = {
    **{name: (name,) for name in losses.names()},
    **{sampler: ("softmax",) for sampler in ("rfs", "irfs")},
    "balms": ("balanced_sigmoid",),
    "balms_decoupled": ("sigmoid", "balanced_sigmoid"),
    "fasa": ("softmax",),
    **{head: ("softmax",) for head in ("tde", "forest", "forest_rcnn")},
    **{head: ("softmax", "softmax") for head in ("disalign", "simcal")},
    "decoupled": ("softmax", "softmax"),
    "rio": ("softmax",),
    "loce": ("softmax", "ebl"),
    "bags": ("softmax", "bags"),
    "acsl": ("softmax", "acsl"),
    "bacl": ("objectness", "fcbl"),
    "bacl_end_to_end": ("fcbl",),
    "drcl": ("softmax",),
    "efl_baseline": ("focal",),
    **{form: ("focal",) for form in ("refine", "two_stage")},
}
COSINE = ("seesaw", "ecm", "ldam")  # methods that are made for a cosine classifier


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# ---- recipes ---------------------------------------------------------------------------------------------------------


def test_names():
    names = recipes.names()
    assert len(names) == len(set(names))
    assert list(recipes.files()) == sorted(name for name in names if ":" not in name)
    for expected in ("demo/faster_rcnn_r18_softmax", "fod/faster_rcnn_r18_rfs", "lvis_v1/faster_rcnn_r50:seesaw"):
        assert expected in names
    assert all(named(name) for name in names if name not in APART)


def named(name: str) -> tuple[str, str, str]:
    """(detector, depth, method) of a recipe's address; a file without a method in its name is the plain baseline."""
    file, _, variant = name.partition(":")
    own = file.split("/")[1]
    kinds = "faster_rcnn|mask_rcnn|cascade_faster_rcnn|cascade_mask_rcnn|deformable_detr|retinanet|atss"
    full = re.fullmatch(rf"({kinds})_r(\d+)_?([a-z0-9_]*)", own)
    detector, depth, method = full.groups() if full else ("faster_rcnn", "18", own.removesuffix("_r18"))
    if own in ("losses", "classifiers", "features"):
        method = ""
    detector = "cascade_rcnn" if detector.startswith("cascade") else detector
    plain = "softmax" if detector.endswith("_rcnn") else "focal"
    if variant == "masks":
        return detector, depth, method or plain
    if variant == "balms" and method == "decoupled":
        return detector, depth, "balms_decoupled"
    return detector, depth, variant or method or plain


def stage_losses(recipe: Recipe) -> tuple[str, ...]:
    return (recipe.loss.name, recipe.second.loss.name) if recipe.second else (recipe.loss.name,)


@pytest.mark.parametrize("name", [name for name in recipes.names() if name not in APART])
def test_recipe(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(f"{name}.yaml") == recipe
    file, colon, variant = name.partition(":")
    assert load_recipe(f"{file}.yaml{colon}{variant}") == recipe
    detector, depth, method = named(name)
    assert recipe.detector.name == detector
    assert recipe.backbone == f"resnet{depth}"
    assert stage_losses(recipe) == LOSSES[method]
    assert (recipe.method == "bacl") == (method == "bacl")
    repeats = method in ("rfs", "rio", "balms_decoupled") or (method == "ecm" and name.startswith(("lvis", "coco_lt")))
    repeats = repeats or (name.startswith("lvis") and detector in ("retinanet", "atss"))
    repeats = repeats or (method == "fedloss" and name.startswith("lvis"))
    repeats = repeats or (method == "drcl" and not name.startswith("coco"))
    assert (recipe.pretraining is not None) == ("drcl" in name)
    assert (recipe.sampler.name == "rfs") == repeats
    masks = detector == "mask_rcnn" or getattr(recipe.detector, "masks", False)
    assert (recipe.evaluation.iou == ("bbox", "segm")) == masks
    classifier = getattr(recipe.detector, "classifier", None)  # a choice of two-stage detectors
    assert (classifier is not None and classifier.name == "cosine") == (method in COSINE and classifier is not None)
    features = recipe.second.features if recipe.second else recipe.features
    assert (features is not None and features.name == "hallucination") == method.startswith("bacl")
    assert recipe.data.synthesize or (recipe.data.train.annotations and recipe.data.val.annotations)
    assert recipe.about.title and recipe.about.hardware
    assert f"tailfin train {name}" in recipe.about.command

    found = recipes.find(name)
    assert (found.label, found.overrides, found.name) == (f"recipe {name}", (), name)
    assert found.text.startswith("about:\n"), "what a header would say is said by about"
    for line in found.text.splitlines():
        assert len(line) <= 120
    values = parse_yaml(found.text, found.label)
    assert "name" not in values, "a copy would keep the name of the original"


def test_every_loss_has_a_recipe():
    """But for gap, a part of rog, and forms of a loss that has one."""
    used = {loss for name in recipes.names() for loss in stage_losses(load_recipe(name))}
    assert set(losses.names()) - used == {"gap", "balanced_softmax"}


def test_small_recipes_differ_in_their_method_alone():
    """The comparison on FOD31-LT is fair: one detector, one set of pictures, one measure, 14 epochs in all."""
    for family in ("demo", "fod", "road12"):
        family_names = [name for name in SMALL if name.startswith(f"{family}/")]
        assert len(family_names) >= 2
        for name in family_names:
            recipe, method = load_recipe(name), named(name)[2]
            dense = named(name)[0] in ("retinanet", "atss")  # one detector per file, half the rate
            masks = "mask_rcnn" in name
            plain = load_recipe(name.split(":")[0] if dense or masks else f"{family}/faster_rcnn_r18_softmax")
            other = load_recipe(f"{family}/faster_rcnn_r18_softmax")
            if dense:
                assert recipe.schedule == other.schedule.model_copy(update={"lr": 0.01}) and recipe.data == other.data
            if masks:
                assert plain.schedule == other.schedule and plain.data == other.data
                shared = plain.detector.model_dump(include=set(other.detector.model_dump()) - {"name"})
                own = {"box_regression", "box_loss", "box_loss_beta"} if plain.detector.CASCADE else set()
                assert {key: value for key, value in shared.items() if key not in own} == other.detector.model_dump(
                    exclude={"name", *own}
                )
            same = {"seed", "weights", "backbone", "evaluation", "logging"}
            assert recipe.model_dump(include=same) == plain.model_dump(include=same), name
            heads = method in (*COSINE, "rio") or name.startswith("fod/classifiers:")
            free = {"classifier"} if heads else set()
            free |= {"rpn_nms_resampling"} if method == "forest" else set()
            smaller = recipe.pretraining is not None and family == "fod"  # 12 epochs at 128 px: its arms are its own
            free |= {"anchor_sizes"} if smaller else set()
            free |= {"mask_predictor"} if masks and method == "seesaw" else set()
            assert recipe.detector.model_dump(exclude=free) == plain.detector.model_dump(exclude=free), name
            changed = {"copy_paste": True} if recipe.method == "bacl" and family != "fod" else {}
            changed |= {"sizes": (128,)} if smaller else {}
            assert recipe.data == plain.data.model_copy(update=changed), name
            if recipe.second:
                assert second_recipe(recipe).data == plain.data.model_copy(update={"sizes": recipe.data.sizes}), name
            stages = [recipe.schedule, *([recipe.second.schedule] if recipe.second else [])]
            stages += [recipe.pretraining.schedule] if recipe.pretraining else []
            longer = 2 if name == "demo/bacl" else 0  # stage 2 is cheap: the same time, not the same epochs
            total = 12 if smaller else plain.schedule.epochs + longer
            assert sum(stage.epochs for stage in stages) == total, name
            for stage in stages:
                length = {"epochs", "milestones"} if len(stages) > 1 else set()
                decay = {"weight_decay"} if stage is recipe.schedule and method == "bacl" else set()
                rest = length | decay
                assert stage.model_dump(exclude=rest) == plain.schedule.model_dump(exclude=rest), name


@pytest.mark.parametrize("name", SMALL)
def test_small_recipe_takes_a_step(name):
    """Every stage's detector is built and learns from a picture; frozen parts do not."""
    recipe = load_recipe(name)
    stats = ClassStats(image_count=[400, 60, 5], instance_count=[600, 60, 5], num_images=450)
    picture = torch.rand(3, 96, 96, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[8.0, 8.0, 60.0, 60.0], [30.0, 20.0, 90.0, 90.0]])
    target = {"boxes": boxes, "labels": torch.tensor([0, 2]), "masks": torch.zeros(2, 96, 96, dtype=torch.uint8)}
    for mask, (left, top, right, bottom) in zip(target["masks"], boxes.int().tolist(), strict=True):
        mask[top:bottom, left:right] = 1
    for stage in [recipe, second_recipe(recipe)] if recipe.second else [recipe]:
        torch.manual_seed(0)
        model, _ = build_detector(stage, stats, start=False)
        if stage is not recipe:
            model.freeze_but(recipe.second.trains)
        parts = model.train()([picture], [target])
        value = torch.stack(list(parts.values())).sum()
        assert torch.isfinite(value)
        value.backward()
        trained = [value for value in model.parts()["classifier"].parameters() if value.requires_grad]
        assert any(value.grad.abs().sum() > 0 for value in trained)
        body = next(model.backbone.body.parameters()).grad
        assert (body is None) == (stage is not recipe)


def test_find_prefers_recipe_then_file_then_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, row_id = "fod/faster_rcnn_r18_softmax", "bacl/XIII/softmax/lvis_v1/r50"
    for path in (name, f"{name}.yaml", row_id, "mine.yml", "plain"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("seed: 77\ndetector: {norm: bn, frozen_layers: 0}\n")
    assert load_recipe(name).seed == load_recipe(f"{name}.yaml").seed == 0
    assert (recipes.find(row_id).label, recipes.find(row_id).overrides) == (row_id, ())
    assert load_recipe(row_id).seed == 77
    assert load_recipe("mine.yml").name == "mine"
    assert load_recipe(Path("plain")).name == "plain"
    Path(row_id).unlink()
    assert load_recipe(row_id).name == row_id
    assert recipes.find(row_id).name == row_id


def test_unknown_names_get_the_nearest(tmp_path):
    assert 'did you mean "fod/faster_rcnn_r18_softmax"?' in refusal(load_recipe, "fod/faster_rcnn_r18_sofmax")
    assert 'did you mean "bacl/XIII/rfs/lvis_v1/r50"?' in refusal(load_recipe, "bacl/XIII/rfs/lvisv1/r50")
    assert f"{tmp_path} is a folder" in refusal(load_recipe, str(tmp_path))
    assert "does not exist" in refusal(load_recipe, str(tmp_path / "x.yaml"))
    assert "there is no recipe" in refusal(load_recipe, "../recipes/fod/faster_rcnn_r18_softmax")


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"loss: \xe9qlv2\n")
    assert refusal(load_recipe, path).startswith(f"recipe {path} is not UTF-8 text: byte 6 (line 1) is 0xe9")
    path.write_text("loss: eqlv2\nweights: imagenet\n", encoding="utf-16")
    assert load_recipe(path).loss.name == "eqlv2"


def test_recipes_state_the_numbers_of_their_row():
    for row_id, run in RUNS.items():
        if isinstance(run, Runnable) and not run.overrides and row_id.startswith(("bacl/XIII/", "2drcl/3a/ecm/")):
            assert load_recipe(run.recipe).about.published == ROWS[row_id].numbers
    end_to_end = ROWS["bacl/X/bacl/lvis_v0.5/r50/end_to_end"]
    assert load_recipe("lvis_v0.5/faster_rcnn_r50:bacl_end_to_end").about.published == end_to_end.numbers


def test_a_recipe_shows_the_row_of_the_deeper_backbone():
    """Every method with a printed ResNet-101 row names it, with its numbers and the override."""
    for row_id, run in RUNS.items():
        if not row_id.startswith("bacl/XIII/") or not row_id.endswith("/r101") or not isinstance(run, Runnable):
            continue
        assert run.overrides[0] == "backbone=resnet101"
        numbers = ", ".join(f"{key} {value}" for key, value in ROWS[row_id].numbers.items())
        shown = next(fact for fact in facts_of(run.recipe) if fact.startswith(f"row {row_id}: "))
        assert numbers in shown and "backbone=resnet101" in shown


@cache
def facts_of(name: str) -> list[str]:
    return _recipe_facts(load_recipe(name))


def test_the_data_names_no_path_of_a_machine():
    for path in (Path(recipes.__file__).parent).rglob("*"):
        if path.suffix in (".json", ".yaml", ".py"):
            assert not re.search(r"/(home|root|tmp|work|Users)/", path.read_text(encoding="utf-8")), path


# ---- command line ----------------------------------------------------------------------------------------------------


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments), catch_exceptions=True)


def listed(*arguments: str) -> list[str]:
    """The names in the first column."""
    result = run("list", *arguments)
    assert result.exit_code == 0, result.output
    return [line.split()[0] for line in result.output.splitlines() if "/" in line.split()[0]]


def test_list_shows_everything():
    assert set(listed("--rows")) == {*recipes.names(), *ROWS}
    assert set(listed("--no-rows")) == set(recipes.names())
    assert set(listed("--runnable")) == {*recipes.names(), *RUNNABLE}


def test_plain_list_is_short():
    lines = run("list").output.splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert lines[0] == "START FROM" and lines[11] == ""
    starts = [line.split()[0] for line in lines[1:11]]
    assert starts == list(recipes.START) and len(starts) == 10 and set(starts) <= set(recipes.names())
    named, file = [], ""
    for line in lines[13:-2]:
        words = line.split()
        if not words[0].startswith(":"):
            file = words[0]
            named.append(file)
        else:
            named += [f"{file}{word}" for word in words]
    assert tuple(named) == recipes.names()
    counted = f"{len(named)} recipes in {len(recipes.files())} files, 311 published rows (300 can be run); "
    assert lines[-1].startswith(counted)


def test_list_filters():
    own = {row_id for row_id in ROWS if row_id.startswith("stepwise/")}
    run_by = {RUNS[row_id].recipe for row_id in own if row_id in RUNNABLE}
    assert set(listed("--paper", "stepwise")) == own | run_by
    assert listed("XIII/", "LVIS_V1", "rfs") == ["bacl/XIII/rfs/lvis_v1/r50", "bacl/XIII/rfs/lvis_v1/r101"]
    used = {run.recipe for row_id, run in RUNS.items() if row_id.startswith("bacl/") and isinstance(run, Runnable)}
    assert listed("--paper", "bacl", "--runnable", "--no-rows") == [name for name in recipes.names() if name in used]
    nothing = run("list", "no such word")
    assert nothing.exit_code == 0 and nothing.output.startswith("0 shown;")
    result = run("list", "--paper", "balc")
    assert isinstance(result.exception, UserError) and 'did you mean "bacl"?' in str(result.exception)


def test_list_line():
    line = next(line for line in run("list", "XIII", "rfs").output.splitlines() if "/lvis_v1/r101" in line)
    for word in ("bacl", "XIII", "RFS", "25.7", "15.9", "23.7", "32.2", "backbone=resnet101 sampler=rfs"):
        assert word in line


def test_show_prints_a_recipe_that_runs_as_it_is(tmp_path):
    ablation = "bacl/III/bacl/lvis_v0.5/r50/mg"
    for name in ("fod/faster_rcnn_r18_rfs", "fod/bacl_r18", "fod/losses:ldam", "bacl/XIII/rfs/lvis_v1/r101", ablation):
        result = run("show", name)
        assert result.exit_code == 0, result.output
        path = tmp_path / "shown.yaml"
        path.write_text(result.output, encoding="utf-8")
        assert load_recipe(path) == load_recipe(name)


def test_show_tells_what_a_row_is():
    shown = run("show", "2drcl/3a/rfs/lvis_v1/r50").output
    for fact in ("table 3a", "AP 24.2, APr 14.2, APc 22.3, APf 30.6", "same numbers as", "doubt: Digit for digit"):
        assert fact in shown
    assert "recipe: lvis_v1/faster_rcnn_r50; overrides: sampler=rfs" in shown
    assert "row bacl/XIII/rfs/lvis_v1/r50: AP 24.2" in run("show", "lvis_v1/faster_rcnn_r50").output


def test_rows_that_share_a_stage_say_so():
    """BAGS and ACSL train on one representation, BACL on another; a row of one stage shares none."""
    bags = run("show", "bacl/XIII/bags/lvis_v1/r50").output
    shared = next(line for line in bags.splitlines() if "--stage1 RUN" in line)
    assert "stage 1 (representation) is the same in" in shared
    assert "bacl/XIII/acsl/lvis_v1/r50" in shared and "2drcl/3a/bags/lvis_v1/r50" in shared
    assert "/bacl/lvis_v1" not in shared and "r101" not in shared and "lvis_v0.5" not in shared
    assert "--stage1" not in "".join(
        line for line in run("show", "bacl/XIII/seesaw/lvis_v1/r50").output.splitlines() if line.startswith("#")
    )


def test_the_plain_list_counts_the_rows_that_can_be_run():
    assert "311 published rows (300 can be run); search: " in run("list").output


def test_show_of_a_blocked_row_gives_its_facts_and_reason():
    result = run("show", "stepwise/1/ahrl/lvis_v1/r50")
    assert result.exit_code == 0
    assert "cannot be run, never: method without code (AHRL)" in result.output
    assert all(line.startswith("#") for line in result.output.splitlines())


def test_copy_keeps_comments_and_variants(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "fod/losses"
    assert run("copy", name).exit_code == 0
    assert Path("losses.yaml").read_text() == recipes.find(name).text
    assert run("copy", f"{name}.yaml", "mine.yaml").exit_code == 0
    for variant in ("", ":eql"):
        mine, original = load_recipe(f"mine.yaml{variant}"), load_recipe(name + variant)
        assert mine.name == f"mine{variant}"
        about = original.about.model_copy(update={"command": mine.about.command})
        assert mine.model_copy(update={"name": name + variant, "about": about}) == original.model_copy(
            update={"about": about}
        )


@pytest.mark.parametrize("name", [name for name in recipes.names() if ":" in name])
def test_copy_of_a_variant_stands_alone(name, tmp_path):
    result = run("copy", name, str(tmp_path))
    assert result.exit_code == 0, result.output
    path = tmp_path / f"{name.split('/')[1].replace(':', '-')}.yaml"
    text = path.read_text()
    assert text.startswith(f"# {name}, a variant of ") and "variants:" not in text
    assert load_recipe(path).name == path.stem
    assert load_recipe(path).model_copy(update={"name": name}) == load_recipe(name)


def test_copy_of_a_row_is_resolved(tmp_path):
    row_id = "bacl/I/stage1/lvis_v0.5/r50/small_weight_decay"
    result = run("copy", row_id, str(tmp_path))
    assert result.exit_code == 0, result.output
    path = tmp_path / "bacl-I-stage1-lvis_v0.5-r50-small_weight_decay.yaml"
    assert load_recipe(path) == load_recipe(row_id)
    assert path.read_text().startswith(f"# {row_id}: ")


def test_copy_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.yaml"
    path.write_text("old")
    result = run("copy", "fod/losses:focal", "mine.yaml")
    assert isinstance(result.exception, UserError) and "mine.yaml exists already" in str(result.exception)
    assert path.read_text() == "old"
    assert run("copy", "fod/losses:focal", "mine.yaml", "--overwrite").exit_code == 0
    assert path.read_text() != "old"
    blocked = "stepwise/1/ahrl/lvis_v1/r50"
    for name, told in (("fod/losses:fokal", "did you mean"), (blocked, "never")):
        result = run("copy", name, "new.yaml")
        assert isinstance(result.exception, UserError) and told in str(result.exception)
        assert not Path("new.yaml").exists()
