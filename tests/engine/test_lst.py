"""LST on the parts of step-wise learning: phases by rank, balanced replay, the last model as teacher."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import tailfin
from tailfin.config import load_recipe
from tailfin.data.index import open_index
from tailfin.data.smooth_tail import choose, divide_by_rank, planned_steps, random_scores, rank_exemplars
from tailfin.errors import UserError
from tailfin.methods.stepwise import class_parts
from tailfin.models.distillation import logit_distance
from tailfin.schema.stepwise import Stepwise
from tailfin.stats import ClassStats

LST = [
    "method=stepwise", "stepwise.parts=rank", "stepwise.division=[1, 2]", "stepwise.base=head", "stepwise.head=null",
    "stepwise.exemplars.order=random", "detector.classifier={name: cosine, temperature: 10}", "sampler=plain",
    "stepwise.tail={per_head_class: balanced, trains: [rpn, head, classifier, box], epochs: 1, lr: 0.01, rfs: plain, "
    "milestones: [], photometric: false, distillation: {feature: 0, classes: 1, distance: l2, shared_queries: false}}",
    "schedule.epochs=1",
]  # fmt: skip


def test_parts_by_rank():
    assert divide_by_rank([5, 90, 7, 7, 1, 40], (2, 4)).tolist() == [2, 0, 1, 1, 2, 0]
    counts = np.random.default_rng(0).integers(0, 30, 1230)
    parts = divide_by_rank(counts, (270, 430, 590, 750, 910, 1070))
    assert np.bincount(parts).tolist() == [270, *[160] * 6]
    for part in range(6):
        assert counts[parts == part].min() >= counts[parts == part + 1].max()


def test_replay_is_as_much_as_the_new_classes_have():
    settings = Stepwise.model_validate(
        {"parts": "rank", "division": [2, 4], "head": None, "tail": {"per_head_class": "balanced"}}
    )
    instances = [90, 40, 7, 6, 2, 1]
    first, second = planned_steps(settings, divide_by_rank(instances, (2, 4)), instances)
    assert first.counts.tolist() == [6, 6, -1, -1, 0, 0], "mean of 7 and 6; later classes are not shown"
    assert second.counts.tolist() == [2, 2, 2, 2, -1, -1], "of 2 and 1"
    assert first.old.tolist() == [True] * 2 + [False] * 4 and second.old.tolist() == [True] * 4 + [False] * 2


def test_whole_pictures_are_replayed(tiny_set):
    """Cut in the middle of one picture at most, another seed draws others."""
    index = open_index(tiny_set[0])
    rows = index.clean().rows
    drawn = []
    for seed in (0, 1):
        scores = random_scores(index, rows, seed)
        made = rank_exemplars(index, rows, scores, threshold=1.0, distinct_images=False)
        kept = choose(made, index, np.full(3, 6))
        for label in range(3):
            own = rows[index.labels[rows] == label]
            shares = [kept[own[index.image_of[own] == image]].mean() for image in np.unique(index.image_of[own])]
            assert sum(0 < share < 1 for share in shares) <= 1
        drawn.append(kept)
    assert (drawn[0] != drawn[1]).any() and (drawn[0].sum() == drawn[1].sum())


def test_logit_distance_by_hand():
    student = torch.tensor([[[1.0, 2.0, 9.0], [0.0, 0.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[4.0, 6.0, 1.0], [0.0, 2.0, 5.0]]])
    value = logit_distance(student, teacher, torch.tensor([0, 1]))
    assert value.item() == pytest.approx((5 + 2) / 2)
    value.backward()
    assert student.grad[0, 0].tolist() == pytest.approx([-0.3, -0.4, 0.0])
    assert logit_distance(student, student, torch.tensor([0])).item() == pytest.approx(0, abs=1e-5)


def test_more_cuts_than_classes_are_refused():
    recipe = load_recipe("fod/stepwise_faster_rcnn_r18:lst")
    stats = ClassStats(image_count=[3] * 21, instance_count=[3] * 21, num_images=60)
    with pytest.raises(UserError, match="have 21 classes, the last cut leaves none behind it"):
        class_parts(recipe, stats)
    with pytest.raises(UserError, match="in step 1 no class is old"):
        load_recipe("fod/stepwise_faster_rcnn_r18", ["stepwise.head.per_head_class=balanced"])


@pytest.mark.usefixtures("quick_training")
def test_phases_train(tiny_set, tiny_recipe, tmp_path):
    """Every phase sees its classes and the replay alone; backbone and pyramid stay as the base left them."""
    out = tmp_path / "run"
    tailfin.train(tiny_recipe, train=tiny_set[0], val=tiny_set[1], out=out, overrides=LST)
    names = sorted(path.name for path in (out / "stages").iterdir())
    assert names == ["1-base", "2-tail1", "3-tail2"]
    base, last = (load_file(out / "stages" / name / "model.safetensors") for name in (names[0], names[-1]))
    moved = {key.split(".")[0] for key in base if not torch.equal(base[key], last[key])}
    assert moved == {"rpn", "roi_heads"}
    instances = np.array(ClassStats.from_index(open_index(tiny_set[0])).instance_count)
    order = np.argsort(-instances, kind="stable")
    for number, name in enumerate(names[1:], start=1):
        facts = json.loads((out / "stages" / name / "step.json").read_text())
        assert facts["own"] == [order[number]] and sorted(facts["old"]) == sorted(order[:number].tolist())
        assert facts["annotations"][order[number]] == instances[order[number]]
        assert all(facts["annotations"][label] == instances[order[number]] for label in order[:number])
        log = [json.loads(line) for line in (out / "stages" / name / "metrics.jsonl").read_text().splitlines()]
        assert any("loss_class_distillation" in line for line in log)
    assert json.loads((out / "exemplars.json").read_text())["order"] == "random"
