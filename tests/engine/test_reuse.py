"""`--stage1 RUN` and `--reuse RUN`: finished stages of another run, and what keeps them from being taken."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from small_detr import DETR

import tailfin
from tailfin.checkpoint import content_hash
from tailfin.config import load_recipe
from tailfin.errors import UserError
from tailfin.schema.stages import differences, stages

pytestmark = pytest.mark.usefixtures("quick_training")

BACL = ["method=bacl", "loss=objectness", "schedule.epochs=0.5", "second.loss=fcbl", "second.features=hallucination"]
BACL += ["second.schedule={epochs: 0.5, batch: 4, lr: 0.01, warmup: 0, milestones: []}"]
STAGE = Path("stages", "1-representation", "model.safetensors")


def parents(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["parents"])


@pytest.fixture(scope="module")
def train(tiny_set, tiny_recipe):
    def run(out: Path, *changes: str, **options):
        files = {"train": tiny_set[0], **options}
        return tailfin.train(tiny_recipe, out=out, overrides=[*BACL, *changes], **files)

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory, train) -> Path:
    return train(tmp_path_factory.mktemp("base") / "run")


def test_the_same_second_stage_gives_the_same_bits(tmp_path, train, base):
    run = train(tmp_path / "again", stage1=base)
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert (run / STAGE).read_bytes() == (base / STAGE).read_bytes()
    assert parents(run / "model.safetensors")[0] == parents(base / "model.safetensors")[0] == content_hash(base / STAGE)
    facts = json.loads((run / "environment.json").read_text())["reused"]
    assert facts == [
        {"stage": "representation", "run": str(base), "model": str(base / STAGE), "sha256": content_hash(base / STAGE)}
    ]
    log = Path("stages", "1-representation", "metrics.jsonl")
    assert (run / log).read_bytes() == (base / log).read_bytes()
    assert not list(run.glob("stages/1-*/.*"))


def test_arms_of_an_ablation_share_it(tmp_path, train, base):
    """The second stage may differ in everything; name, evaluation and logging too. A model file serves as well."""
    changes = ["second.loss.alpha=0", "second.features=null", "evaluation.max_dets=5", "logging.every=2"]
    margin = train(tmp_path / "margin", *changes, stage1=base / STAGE)
    weights = load_file(margin / "model.safetensors")
    assert parents(margin / "model.safetensors")[0] == content_hash(base / STAGE)
    assert not any("extra_rows" in key for key in weights)
    assert not torch.equal(weights["roi_heads.loss.num_gt"], torch.zeros(3, dtype=torch.float64))


def test_a_baseline_run_can_be_one(tmp_path, tiny_set, tiny_recipe, train):
    """One-stage training is a first stage where its recipe is the same: BACL after repeat factor sampling."""
    shared = ["loss=objectness", "schedule.epochs=0.5", "sampler.threshold=0.4"]
    base = tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "rfs", overrides=shared)
    with pytest.raises(UserError, match=r"sampler.threshold is 0.4 there, 0.5 here. To take it as it is: 'sampler"):
        train(tmp_path / "run", stage1=base)
    assert not (tmp_path / "run").exists()
    run = train(tmp_path / "run", "sampler.threshold=0.4", stage1=base)
    assert parents(run / "model.safetensors")[0] == content_hash(base / "stages" / "1-train" / "model.safetensors")


def test_starting_weights_are_not_needed(tmp_path, tiny_set, tiny_recipe, train, base):
    """The recipe's own start is behind the first stage; its file may be gone."""
    start = tmp_path / "start.safetensors"
    shutil.copy(base / STAGE, start)
    first = train(tmp_path / "first", weights=start)
    start.unlink()
    train(tmp_path / "second", stage1=first, weights=start)


def test_a_resumed_run_needs_the_first_one_no_more(tmp_path, train, base):
    moved = tmp_path / "moved"
    shutil.copytree(base, moved)
    run = train(tmp_path / "run", stage1=moved)
    shutil.rmtree(moved)
    shutil.rmtree(run / "stages" / "2-classifier")
    (run / "model.safetensors").unlink()
    tailfin.train("", out=run, resume=True)
    before, after = load_file(base / "model.safetensors"), load_file(run / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_mistakes(tmp_path, tiny_set, tiny_recipe, train, base):
    cases = {
        r"seed is 0 there, 3 here; schedule.lr is 0.01 there, 0.02 here. To": (["schedule.lr=0.02", "seed=3"], base),
        "detector.head_channels is 32 there, 16 here": (["detector.head_channels=16"], base),
        "its first stage is not finished": ([], tmp_path / "begun"),
        "it is no run folder": ([], tmp_path),
        "nowhere does not exist": ([], tmp_path / "nowhere"),
    }
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "recipe.yaml").write_text("weights: none\n")
    for message, (changes, stage1) in cases.items():
        with pytest.raises(UserError, match=message):
            train(tmp_path / "run", *changes, stage1=stage1)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="has one stage only"):
        tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", stage1=base)
    with pytest.raises(UserError, match="other annotations"):
        train(tmp_path / "run", stage1=base, train=tiny_set[1])
    with pytest.raises(UserError, match="is inside --out"):
        train(base, stage1=base, overwrite=True)
    assert (base / "model.safetensors").exists()


def test_every_key_counts_but_those_that_cannot_matter(tiny_recipe):
    recipe = load_recipe(tiny_recipe, BACL)
    keys = stages(recipe)[0].inputs
    assert {"loss.name", "schedule.lr", "data.sizes", "data.flip", "detector.norm", "seed", "weights"} <= keys.keys()
    assert not {"method", "evaluation.nms", "data.workers", "data.root", "second.loss.name"} & keys.keys()
    other = stages(load_recipe(tiny_recipe, [*BACL, "loss.name=focal", "loss.focal_gamma=1"]))[0].inputs
    found = differences(other, keys)
    assert found == [("loss.name", "focal", "objectness"), ("loss.focal_gamma", 1.0, None)]


# ---- any stage: --reuse ----------------------------------------------------------------------------------------------

STEPWISE = (
    DETR
    + """\
method: stepwise
schedule: {epochs: 0.5, batch: 4, optimizer: adamw, lr: 1e-3, warmup: 0, milestones: [], clip: 0.1}
stepwise:
  division: [10]
  head: {per_head_class: 8, per_tail_class: 2, lr: 1e-3}
  tail: {per_head_class: 4, lr: 1e-3, epochs: 1, milestones: []}
"""
)
PRETRAINING = """\
pretraining:
  preset: moco_v2
  views: {resize: square, sizes: [64]}
  image: {queue: 24, hidden: 32, dim: 16}
  schedule: {epochs: 0.5, batch: 4, lr: 0.01, warmup: 0, milestones: []}
"""


def same(one: Path, other: Path, name: str) -> bool:
    return (one / name).read_bytes() == (other / name).read_bytes()


def reused(run: Path) -> list[str]:
    return [facts["stage"] for facts in json.loads((run / "environment.json").read_text()).get("reused", [])]


def test_all_stages_that_fit_are_taken(tmp_path, train, base, capsys):
    whole = train(tmp_path / "whole", reuse=base)
    assert reused(whole) == ["representation", "classifier"]
    before, after = load_file(base / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    capsys.readouterr()
    arm = train(tmp_path / "arm", "second.loss.alpha=0", reuse=base)
    assert reused(arm) == ["representation"]
    said = " ".join("".join(capsys.readouterr()).split())
    assert "stage classifier is not taken" in said and "second.loss.alpha is null there, 0 here" in said
    assert not same(arm, base, "stages/2-classifier/model.safetensors")
    again = train(tmp_path / "again", "second.loss.alpha=0", reuse=arm)  # a stage may have been taken before
    assert reused(again) == ["representation", "classifier"] and same(
        again, arm, "stages/2-classifier/model.safetensors"
    )


def test_a_stage_whose_start_has_changed_is_not_taken(tmp_path, train, base):
    """Stage 2 is that of the stage 1 beside it, by the hash in its model file, or it is trained again."""
    mixed = tmp_path / "mixed"
    shutil.copytree(base, mixed)
    other = train(tmp_path / "other", "seed=3")
    shutil.copy(other / STAGE, mixed / STAGE)
    shutil.copy(other / "recipe.yaml", mixed / "recipe.yaml")
    assert reused(train(tmp_path / "run", "seed=3", reuse=mixed)) == ["representation"]


@pytest.fixture(scope="module")
def steps(tmp_path_factory, tiny_set):
    recipe = tmp_path_factory.mktemp("recipe") / "steps.yaml"
    recipe.write_text(STEPWISE)

    def run(out: Path, *changes: str, **options) -> Path:
        return tailfin.train(recipe, train=tiny_set[0], out=out, overrides=changes, **options)

    return run


@pytest.fixture(scope="module")
def expert(tmp_path_factory, steps) -> Path:
    return steps(tmp_path_factory.mktemp("steps") / "run")


def test_step_0_exemplars_and_expert(tmp_path, steps, expert):
    """Arms of step 2 share all before it; exemplars chosen otherwise leave step 0 alone."""
    arm = steps(tmp_path / "arm", "stepwise.tail.distillation.classes=0", reuse=expert)
    assert reused(arm) == ["base", "head"]
    for name in ("stages/1-base/model.safetensors", "stages/2-head/model.safetensors", "exemplars.json"):
        assert same(arm, expert, name), name
    assert not same(arm, expert, "stages/3-tail/model.safetensors")
    other = steps(tmp_path / "other", "stepwise.exemplars.score=gt_class", "stepwise.tail=null", reuse=expert)
    assert reused(other) == ["base"] and not same(other, expert, "exemplars.json")
    first = steps(tmp_path / "first", "stepwise.tail=null", stage1=expert)
    assert reused(first) == ["base"] and same(first, expert, "exemplars.json")
    assert same(first, expert, "stages/2-head/model.safetensors") is False  # another file, since it was trained here
    before, after = (load_file(run / "stages/2-head/model.safetensors") for run in (expert, first))
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_stage1_of_a_later_stage_takes_all_up_to_it(tmp_path, steps, expert):
    """The expert with step 0 and exemplars, or a mistake: an ablation of step 2 selects once."""
    later = expert / "stages" / "2-head"
    arm = steps(tmp_path / "arm", "stepwise.tail.distillation.classes=0", stage1=later)
    assert reused(arm) == ["base", "head"] and same(arm, expert, "exemplars.json")
    assert same(arm, expert, "stages/2-head/step.json")
    again = steps(tmp_path / "again", "stepwise.tail.distillation.classes=0", stage1=later / "model.safetensors")
    assert same(again, arm, "stages/3-tail/step.json")
    with pytest.raises(
        UserError, match=r"train another stage head: stepwise.head.lr is 0.001 there.*'stepwise.head.lr"
    ):
        steps(tmp_path / "run", "stepwise.head.lr=0.01", stage1=later)
    with pytest.raises(UserError, match="exemplars.json is not taken .*stepwise.exemplars.score.*follow from it"):
        steps(tmp_path / "run", "stepwise.exemplars.score=gt_class", stage1=later)
    with pytest.raises(UserError, match="it is stage 3 of its run, this recipe has 2 stages"):
        steps(tmp_path / "run", "stepwise.tail=null", stage1=expert / "stages" / "3-tail")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(expert, unfinished)
    (unfinished / "stages" / "2-head" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="its stage head is not finished"):
        steps(tmp_path / "run", stage1=unfinished / "stages" / "2-head")


def test_metrics_of_steps_are_taken_where_they_were_measured_alike(tmp_path, tiny_set, steps):
    val = {"val": tiny_set[1]}
    first = steps(tmp_path / "first", "stepwise.tail=null", **val)
    changes = ["stepwise.tail.distillation.classes=0"]
    marked = first / "stages" / "1-base" / "metrics.json"
    marked.write_text(json.dumps({**json.loads(marked.read_text()), "marked": 1}))  # shows that nothing was measured
    second = steps(tmp_path / "second", *changes, reuse=first, **val)
    assert same(first, second, "stages/1-base/metrics.json") and same(first, second, "stages/2-head/metrics.json")
    third = steps(tmp_path / "third", *changes, "evaluation.max_dets=3", reuse=first, **val)
    assert not same(first, third, "stages/1-base/metrics.json")
    fourth = steps(tmp_path / "fourth", *changes, reuse=first, val=tiny_set[0])
    assert "marked" not in json.loads((fourth / "stages/1-base/metrics.json").read_text())
    # a plain run of step 0 has its numbers at its end
    plain = steps(tmp_path / "plain", "method=baseline", "stepwise=null", **val)
    fifth = steps(tmp_path / "fifth", "stepwise.tail=null", reuse=plain, **val)
    assert json.loads((fifth / "stages/1-base/metrics.json").read_text()) == json.loads(
        (plain / "metrics.json").read_text()
    )


def test_exemplars_and_sets_of_files(tmp_path, tiny_set, steps, expert, capsys):
    """What a selection or `data smooth-tail` has written is trained on as the run's own selection is, and no model
    scores annotations; files that have changed are another run's.
    """
    from tailfin.data import smooth_tail
    from tailfin.data.index import open_index

    def bits(run: Path, name: str) -> dict[str, torch.Tensor]:
        return load_file(run / "stages" / name / "model.safetensors")

    def equal(one: Path, other: Path, *names: str) -> bool:
        pairs = [(bits(one, name), bits(other, name)) for name in names]
        return all(torch.equal(before[key], after[key]) for before, after in pairs for key in before)

    def unused(*_, **__):
        raise AssertionError("annotations were scored")

    index = open_index(tiny_set[0])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tailfin.methods.stepwise.score_annotations", unused)
        listed = steps(tmp_path / "listed", f"stepwise.exemplars.file={expert}", stage1=expert)
        assert equal(listed, expert, "2-head", "3-tail")
        document, own = (json.loads((run / "exemplars.json").read_text()) for run in (listed, expert))
        assert document["classes"] == own["classes"] and document["source"]["file"] == str(expert / "exemplars.json")
        exemplars = smooth_tail.read_exemplars(expert / "exemplars.json", index)
        for name, counts in (("head", [8, 8, 2]), ("tail", [4, 4, -1])):
            smooth_tail.write_subset(
                tmp_path / f"d_{name}.json", index, smooth_tail.choose(exemplars, index, np.array(counts))
            )
        files = [f"stepwise.{name}.annotations={tmp_path}/d_{name}.json" for name in ("head", "tail")]
        fed = steps(tmp_path / "fed", *files, stage1=expert)
        assert equal(fed, expert, "2-head", "3-tail") and not (fed / "exemplars.json").exists()
        assert reused(steps(tmp_path / "again", *files, reuse=fed)) == ["base", "head", "tail"]
        smooth_tail.write_subset(
            tmp_path / "d_tail.json", index, smooth_tail.choose(exemplars, index, np.array([3, 3, -1]))
        )
        assert reused(steps(tmp_path / "other", *files, reuse=fed)) == ["base", "head"]
        short = json.loads((expert / "exemplars.json").read_text())
        short["classes"][1]["exemplars"] = short["classes"][1]["exemplars"][:3]
        (tmp_path / "short.json").write_text(json.dumps(short))
        capsys.readouterr()
        steps(tmp_path / "few", f"stepwise.exemplars.file={tmp_path}/short.json", "stepwise.tail=null", stage1=expert)
        assert 'fewer exemplars listed than the step wants, first "green" with 3 of 8' in " ".join(
            "".join(capsys.readouterr()).split()
        )
    # mistakes are told before anything trains
    document = json.loads((tmp_path / "d_head.json").read_text())
    for key, value, message in (
        ("category_id", 3, "another class"), ("bbox", [1, 2, 20, 20], "another box"),
        ("image_id", 100, "another image"),
        ("id", 5000, "there is no annotation 5000"),
    ):  # fmt: skip
        entry = next(one for one in document["annotations"] if one["category_id"] != 3 and one["image_id"] != 100)
        entries = [{**one, key: value} if one is entry else one for one in document["annotations"]]
        images = [*document["images"], {"id": 100, "file_name": "0.png", "width": 60, "height": 80}]
        images = list({image["id"]: image for image in images}.values())
        (tmp_path / "wrong.json").write_text(json.dumps({**document, "annotations": entries, "images": images}))
        with pytest.raises(UserError, match=message):
            steps(tmp_path / "run", f"stepwise.head.annotations={tmp_path}/wrong.json")
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="head.annotations names 2 files, 1 are needed"):
        steps(tmp_path / "run", "stepwise.head.annotations=[a.json, b.json]")


def test_an_expert_of_a_given_detector(tmp_path, steps, expert):
    given = ["stepwise.base=given", "stepwise.tail=null"]
    weights = tmp_path / "weights.safetensors"
    shutil.copy(expert / "stages/1-base/model.safetensors", weights)
    first = steps(tmp_path / "first", *given, weights=weights)
    second = steps(tmp_path / "second", *given, weights=weights, reuse=first)
    assert reused(second) == ["base", "head"] and same(first, second, "stages/1-head/model.safetensors")
    shutil.copy(expert / "model.safetensors", weights)
    with pytest.raises(UserError, match="nothing can be taken: .*is another file by now"):
        steps(tmp_path / "third", *given, weights=weights, reuse=first)


def test_a_pretraining(tmp_path, tiny_set, tiny_recipe):
    """The method after it may differ in everything but what pre-training sees of it."""
    recipe = tmp_path / "pretrained.yaml"
    recipe.write_text(tiny_recipe.read_text() + PRETRAINING)

    def run(name: str, *changes: str, **options) -> Path:
        short = ["schedule.epochs=0.3", "schedule.milestones=[]"]
        return tailfin.train(recipe, train=tiny_set[0], out=tmp_path / name, overrides=[*short, *changes], **options)

    first = run("first")
    arm = run("arm", "loss=seesaw", "sampler.threshold=0.3", reuse=first)
    assert reused(arm) == ["pretrain"]
    for name in ("stages/1-pretrain/model.safetensors", "stages/1-pretrain/pictures.npz"):
        assert same(arm, first, name), name
    before, after = load_file(first / "pretrained.safetensors"), load_file(arm / "pretrained.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert reused(run("demanded", "loss=seesaw", stage1=first)) == ["pretrain"]
    with pytest.raises(UserError, match=r"nothing can be taken.*pretraining.image.temperature is 0.2 there, 0.1 here"):
        run("other", "pretraining.image.temperature=0.1", reuse=first)
    with pytest.raises(UserError, match="that run's stage is a pre-training, this recipe's is train"):
        run("none", "pretraining=null", reuse=first)
    with pytest.raises(UserError, match="is not the model of a first stage, but of pretrain"):
        lone = tmp_path / "lone" / "model.safetensors"
        lone.parent.mkdir()
        shutil.copy(first / "stages/1-pretrain/model.safetensors", lone)
        run("file", "pretraining=null", reuse=lone)


def test_one_option_at_a_time(tmp_path, train, base):
    with pytest.raises(UserError, match="give one of them"):
        train(tmp_path / "run", stage1=base, reuse=base)
    alone = tmp_path / "model.safetensors"
    shutil.copy(base / "stages" / "2-classifier" / "model.safetensors", alone)
    with pytest.raises(UserError, match="is not the model of a first stage"):
        train(tmp_path / "run", stage1=alone)
