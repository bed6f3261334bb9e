"""BACL's classifier stage end to end: what is frozen stays, several processes do what one does, resumes are exact."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tailfin
from same_draws import first_rows
from tailfin import checkpoint
from tailfin.models.features import box_generator
from tailfin.models.features.feature_memory import FeatureMemory
from tailfin.models.features.hallucination import FeatureHallucination, FeatureStatistics
from tailfin.training_log import TrainingLog

pytestmark = pytest.mark.usefixtures("quick_training")
BACL = [
    "method=bacl",
    "loss=objectness",
    "schedule.epochs=1",
    "second.loss=fcbl",
    "second.features={name: hallucination, sampled_num_classes: 4, sampled_num_features: 6}",
    "second.sampler={name: rfs, threshold: 0.5}",
    "second.schedule={epochs: 2, batch: 4, lr: 0.01, warmup: 2, milestones: [1]}",
]
BACL_DEFAULT = [*BACL[:4], "second.features=hallucination", *BACL[5:]]
LOCE = [
    *("method=decoupled", "loss=objectness", "schedule.epochs=1", "second.loss=ebl"),
    *("second.features=feature_memory", "second.trains=[classifier,box,rpn]", *BACL[5:]),
]
TRAINS = ("roi_heads.predictor.", "rpn.")
INDICATOR = "roi_heads.loss.cm_numerator"
SCORE, WRITTEN = "roi_heads.loss.mean_score", "roi_heads.extra_rows.memory.written"
MEAN = "roi_heads.extra_rows.hallucination.statistics.mean"


def changed(first: dict[str, torch.Tensor], last: dict[str, torch.Tensor]) -> set[str]:
    return {key for key in first if key not in last or not torch.equal(first[key], last[key])}


@pytest.fixture(scope="module")
def stage_one(tmp_path_factory, tiny_set, tiny_recipe) -> Path:
    """A run of both stages; later ones take its first stage."""
    out = tmp_path_factory.mktemp("bacl") / "run"
    return tailfin.train(tiny_recipe, train=tiny_set[0], out=out, overrides=BACL)


@pytest.mark.parametrize(
    "changes",
    [
        ["second.schedule.weight_decay=0.1", "second.schedule.norm_decay=true"],
        ["second.schedule.optimizer=adamw", "second.schedule.weight_decay=0.1", "second.schedule.ema=0.9"],
        ["second.schedule.ema=0.5", "second.schedule.clip=1", "second.schedule.channels_last=true"],
        ["second.trains=[classifier]", "second.schedule.weight_decay=0.1", "second.schedule.ema=0.9"],
    ],
    ids=["sgd with decay", "adamw with decay and average", "average, clipping, channels last", "classifier alone"],
)
def test_frozen_tensors_keep_their_bits(tmp_path, tiny_set, tiny_recipe, stage_one, changes):
    """Weights and buffers, those of batch norm too, against decay, momentum and averages."""
    overrides = [*BACL, "second.schedule.epochs=1", *changes]
    out = tailfin.train(tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=overrides, stage1=stage_one)
    first = load_file(stage_one / "stages" / "1-representation" / "model.safetensors")
    last = load_file(out / "model.safetensors")
    trains = ("roi_heads.predictor.cls_score.",) if "second.trains=[classifier]" in changes else TRAINS
    frozen = [key for key in first if not key.startswith((*trains, "roi_heads.loss."))]
    norms = [key for key in frozen if key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(norms) == 45 and len(frozen) > 60  # 15 norms up to layer3 of ResNet-18
    assert all(first[key] > 0 for key in norms if key.endswith("num_batches_tracked"))  # the first stage moved them
    assert changed({key: first[key] for key in frozen}, last) == set()
    assert {key for key in first if key not in last} == set()
    assert all(not torch.equal(first[key], last[key]) for key in first if key.startswith(trains))


def iterations(run: Path) -> list[int]:
    path = run / "stages" / "2-classifier" / "metrics.jsonl"
    return [json.loads(line)["iteration"] for line in path.read_text().splitlines()]


class Stopped(Exception):
    pass


def test_stopped_inside_stage_two_and_resumed(tmp_path, tiny_set, tiny_recipe, stage_one, monkeypatch):
    """Indicator and hallucination statistics are part of the resume point: the very bits of the run that went on."""
    out, add = tmp_path / "run", TrainingLog.add

    def stopping(self, parts, rate, done):
        add(self, parts, rate, done)
        if done == 8:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(TrainingLog, "add", stopping)
        tailfin.train(tiny_recipe, train=tiny_set[0], out=out, overrides=BACL, stage1=stage_one)
    point = checkpoint.load_resume_point(out / "stages" / "2-classifier")
    assert point["iteration"] == 5
    assert point["model"][INDICATOR].any() and point["model"][MEAN].any()
    tailfin.train("", out=out, resume=True)
    straight, resumed = (load_file(run / "model.safetensors") for run in (stage_one, out))
    assert straight.keys() == resumed.keys()
    assert changed(straight, resumed) == set()
    assert iterations(out) == iterations(stage_one)


def number_all_draws(rank: int, world: int) -> None:
    """The same batch gives the same losses whoever has it: samplers take the first rows and anchors, boxes shift by a
    half, and the draws are numbered over all processes, each having its share."""

    first_rows()
    shifted, sample, begin = box_generator.perturbed_boxes, FeatureHallucination.sample, FeatureStatistics.__init__
    stored = FeatureMemory.sample

    def shifted_by_a_half(boxes, size, **_):
        return shifted(boxes, size, draws=torch.full((4, 16), 0.5))

    def own_classes(number):
        return ((torch.arange(world * number) + 0.5) / (world * number))[rank::world]

    def numbered(self, indicator, classes, **options):
        uniform, place = own_classes(classes), torch.arange(self.sampled_num_features)
        phase = (1 + uniform)[:, None, None] * (1 + place)[:, None] * torch.arange(self.statistics.mean.shape[1])
        return sample(self, indicator, draws=(uniform, phase.flatten(0, 1).sin()))

    def all_used(self, *arguments, **options):
        begin(self, *arguments, **options)
        self.used.fill_(True)  # no row is missing on one process only

    def numbered_rows(self, mean_score, classes, **options):
        uniform = own_classes(classes)
        rows = (7 * uniform[:, None] + 0.37 * torch.arange(self.sampled_num_features)) % 1
        return stored(self, mean_score, draws=(uniform, rows))

    FeatureMemory.sample = numbered_rows
    box_generator.perturbed_boxes = shifted_by_a_half
    FeatureHallucination.sample = numbered
    FeatureStatistics.__init__ = all_used


@pytest.mark.parametrize(("method", "state"), [(BACL_DEFAULT, (INDICATOR, MEAN)), (LOCE, (SCORE, WRITTEN))])
def test_two_processes_train_the_classifier_that_one_trains(
    tmp_path, tiny_set, tiny_recipe, stage_one, method, state, train_on_ranks: Callable
):
    """Half the batch each, with default counts: weights, indicator, class statistics and memory agree with those of one
    process."""

    def train(rank: int) -> None:
        world = int(os.environ["WORLD_SIZE"])
        number_all_draws(rank, world)
        out = tmp_path / str(world)
        overrides = [*method, "second.schedule.epochs=1"]
        tailfin.train(tiny_recipe, train=tiny_set[0], out=out, overrides=overrides, stage1=stage_one)

    for world in (1, 2):
        train_on_ranks(train, world)
        environment = json.loads((tmp_path / str(world) / "environment.json").read_text())
        assert environment["devices"]["processes"] == world
    first = load_file(stage_one / "stages" / "1-representation" / "model.safetensors")
    alone, joined = (load_file(tmp_path / str(world) / "model.safetensors") for world in (1, 2))
    assert alone.keys() == joined.keys()
    for key, value in alone.items():
        torch.testing.assert_close(joined[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    # the tolerance is far below what the stage changes
    for key in ("roi_heads.predictor.cls_score.weight", "roi_heads.predictor.bbox_pred.weight"):
        assert (alone[key] - joined[key]).abs().max() < 0.01 * (alone[key] - first[key]).abs().max()
    resumes = [checkpoint.load_resume_point(tmp_path / world / "stages" / "2-classifier") for world in ("1", "2")]
    for key in state:
        one, other = (point["model"][key].double() for point in resumes)
        assert (one - one.flatten()[0]).any()
        torch.testing.assert_close(other, one, rtol=1e-3, atol=1e-5)
