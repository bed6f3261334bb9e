"""What is said before anything runs: the plan of `--dry-run`, and commands that a model cannot serve."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import tailfin as package
from tailfin.errors import UserError


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_dry_run_writes_a_picture_and_nothing_else(tailfin, tiny_recipe, tiny_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--val", tiny_set[1], "--dry-run"]
    outcome = tailfin(*train)
    assert outcome.code == 0, outcome.err
    assert files(tmp_path) == {"dry-run.jpg"}
    for text in ("38 of 4 images", "rare 1, common 2", "memory", "learning rate"):
        assert text in outcome.out
    assert min(Image.open("dry-run.jpg").size) > 64
    assert tailfin(*train, "--out", tmp_path / "sub" / "run").code == 0
    assert files(tmp_path) == {"dry-run.jpg", "sub/run-dry-run.jpg"}


def test_dry_run_lists_every_stage(tailfin, tiny_recipe, tiny_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--val", tiny_set[1], "--dry-run"]
    assert "baseline: 1 stage " in tailfin(*train).out

    pretraining = ["pretraining.preset=moco_v2", "pretraining.schedule.batch=4", "pretraining.schedule.epochs=2"]
    second = ["method=decoupled", "second.schedule.epochs=3", "second.schedule.batch=4", "second.loss=bags"]
    shown = " ".join(tailfin(*train, *pretraining, *second).out.split())
    assert "decoupled: 3 stages" in shown
    assert "stage 1, pretrain │ moco_v2: 2 epochs, 14 iterations of 4" in shown
    assert "stage 2, representation │ 5 epochs, 38 iterations of 4, lr 0.01, loss softmax, sampler rfs" in shown
    assert "stage 3, classifier │ 3 epochs, 21 iterations of 4" in shown and "loss bags, sampler plain" in shown

    steps = ["method=stepwise", "stepwise.division=[10]", "stepwise.head.per_head_class=2", "stepwise.tail.epochs=2"]
    shown = " ".join(tailfin(*train, *steps).out.split())
    counts = json.loads(tiny_set[0].read_text())["annotations"]
    rare = sum(annotation["category_id"] == 9 for annotation in counts)
    assert "stepwise: 3 stages" in shown and "stage 1, base │ 5 epochs, 38 iterations" in shown
    assert f"stage 2, head │ 1 epochs, lr 2e-05, 2 classes of its own, at most {4 + rare} annotations" in shown
    assert "stage 3, tail │ 2 epochs, lr 0.0002, 1 classes of its own" in shown
    assert shown.count("trains classifier") == 2 and shown.count("taught by the step before") == 1
    assert files(tmp_path) == {"dry-run.jpg"}


def test_dry_run_of_a_variant(tailfin, tiny_recipe, tiny_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    variant = "variants: {short: {overrides: {schedule.epochs: 2, loss: seesaw, sampler: plain}}}\n"
    Path("own.yaml").write_text(tiny_recipe.read_text() + variant)
    outcome = tailfin("train", "own.yaml:short", "--train", tiny_set[0], "--val", tiny_set[1], "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "plan of own:short" in outcome.out
    assert "2 epochs, 14 iterations of 4" in outcome.out and "loss seesaw, sampler plain" in outcome.out
    outcome = tailfin("train", "own.yaml:shrt", "--train", tiny_set[0], "--dry-run")
    assert outcome.code == 2 and outcome.err == 'error: own.yaml has no variant "shrt" (did you mean "short"?)\n'


LOCALIZER = """\
weights: none
backbone: resnet18
detector: {name: localizer, norm: bn, frozen_layers: 0, fpn_channels: 16, fpn_layers: [2, 3],
           anchor_sizes: [12, 24, 48], head_channels: 32}
schedule: {epochs: 0.2, batch: 4, lr: 0.001, warmup: 0, milestones: []}
data: {resize: square, sizes: [64], workers: 0}
"""


def test_a_localizer_predicts_no_classes(tailfin, tiny_set, tmp_path):
    recipe, run = tmp_path / "localizer.yaml", tmp_path / "run"
    recipe.write_text(LOCALIZER)
    package.train(recipe, train=tiny_set[0], out=run)
    before, picture = files(tmp_path), tiny_set[1].with_suffix("") / "1.png"
    for words in (
        ("predict", run, picture, "--out", tmp_path / "found.json", "--draw", tmp_path / "drawn"),
        ("evaluate", run, "--annotations", tiny_set[1], "--save", tmp_path / "saved"),
        ("evaluate", "--model", run / "model.safetensors", "--annotations", tiny_set[1]),
    ):
        outcome = tailfin(*words)
        assert outcome.code == 2 and "tailfin data proposals MODEL" in outcome.error
    with pytest.raises(UserError, match="a localizer finds objects and knows no classes"):
        package.load(run).predict(picture)
    assert files(tmp_path) == before and not (tmp_path / "drawn").exists()


def test_dry_run_refuses_what_training_refuses(tailfin, tiny_recipe, tiny_set, tmp_path, monkeypatch, edited):
    monkeypatch.chdir(tmp_path)

    def other(document):
        document["categories"][0]["name"] = "violet"

    def without_masks(document):
        for annotation in document["annotations"]:
            annotation.pop("segmentation", None)

    train = ["train", tiny_recipe, "--train", tiny_set[0], "--dry-run"]
    assert '"red" is not in the file' in tailfin(*train, "--val", edited(tiny_set[1], other)).error
    bare = tailfin(*train, "evaluation.iou=[bbox, segm]", "--val", edited(tiny_set[1], without_masks)).error
    assert "iou type segm needs the mask of every annotation" in bare
    assert "none.json does not exist" in tailfin(*train, "--val", "none.json").error
    assert "start.pth does not exist" in tailfin(*train, "--weights", "start.pth").error
    monkeypatch.setenv("COLUMNS", "300")
    assert "validation pictures, too" in tailfin(*train, "--val", tiny_set[0]).out
    short = ["--val", tiny_set[0], "--out", tmp_path / "run", "schedule.epochs=0.1"]
    assert "validation pictures, too" in tailfin(*[word for word in train if word != "--dry-run"], *short).err
    assert "validation pictures, too" not in tailfin(*train, "--val", tiny_set[1]).out


FEATURE_MEMORY = ["second.loss=ebl", "second.features={name: feature_memory, stores: shared}"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["second.trains=[rpn]", "second.fresh_classifier=true"], "the second stage freezes roi_heads"),
        (["second.classifier=simcal", "second.loss=seesaw"], "a form of softmax cross-entropy of its own"),
        ([*FEATURE_MEMORY, "second.trains=[head, classifier]"], "feature_memory.stores: the shared layers train"),
    ],
)
def test_dry_run_and_training_refuse_a_second_stage_before_the_first(
    tailfin, tiny_recipe, tiny_set, tmp_path, monkeypatch, words, message
):
    monkeypatch.chdir(tmp_path)
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--val", tiny_set[1], "method=decoupled", *words]
    for more in (["--dry-run"], ["--out", tmp_path / "run"]):
        outcome = tailfin(*train, *more)
        assert outcome.code == 2 and message in outcome.error, outcome.err
    assert files(tmp_path) == set()


def test_dry_run_estimates_the_stage_that_needs_most(tailfin, tiny_recipe, tiny_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")
    train = ["train", tiny_recipe, "--train", tiny_set[0], "--val", tiny_set[1], "--dry-run", "data.copy_paste=false"]
    two = ["method=bacl", "second.loss=fcbl", "second.features=hallucination"]
    all_parts = "second.trains=[backbone, fpn, rpn, head, classifier, box]"
    views = ["pretraining.preset=drcl", "pretraining.schedule.batch=4", "pretraining.proposals.source=gt_jitter"]

    def memory(*words):
        outcome = tailfin(*train, *words)
        assert outcome.code == 0, outcome.err
        (line,) = (line for line in outcome.out.splitlines() if "memory, one process" in line)
        return line

    assert "in stage" not in memory()
    small, large = memory(*two), memory(*two, all_parts, "second.schedule.batch=32")
    assert "GiB in stage representation" in small and "for 4 images" in small
    assert "GiB in stage classifier" in large and "for 32 images" in large
    assert "GiB in stage pretrain" in memory(*views)


def test_data_of_the_working_directory_is_not_taken_by_chance(tailfin, tiny_set, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny_set[0].parent)
    error = tailfin("train", "fod/faster_rcnn_r18_softmax", "--out", tmp_path / "run").error
    assert "no training data is named, and train.json of the working directory would be taken" in error
    assert not (tmp_path / "run").exists()
