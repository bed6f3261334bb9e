"""BACL's classifier stage end to end: what is frozen stays, several processes do what one does, resumes are exact."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tailfin
from tailfin import checkpoint

BACL = [
    "method=bacl",
    "loss=objectness",
    "schedule.epochs=1",
    "second.loss=fcbl",
    "second.hallucination={sampled_num_classes: 4, sampled_num_features: 6}",
    "second.sampler={name: rfs, threshold: 0.5}",
    "second.schedule={epochs: 3, batch: 4, lr: 0.01, warmup: 2, milestones: [2]}",
]
TRAINS = ("roi_heads.predictor.", "rpn.")
STATE = ("roi_heads.loss.", "roi_heads.extra_rows.")  # indicator and hallucination
INDICATOR = "roi_heads.loss.cm_numerator"
MEAN = "roi_heads.extra_rows.hallucination.statistics.mean"

# The same batch gives the same losses whoever has it: samplers take the first rows and anchors, boxes shift by a half,
# and the draws are numbered over all processes, each having its share.
NUMBERED = """
import os, signal, sys
import torch
from tailfin.cli.main import main
from tailfin.models import extra_rows
from tailfin.modules.hallucination import FeatureHallucination, FeatureStatistics
from tailfin.training_log import TrainingLog

rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
torch.randperm = lambda n, **options: torch.arange(n)

shifted = extra_rows.perturbed_boxes
extra_rows.perturbed_boxes = lambda boxes, size, **options: shifted(boxes, size, draws=torch.full((4, 16), 0.5))

sample = FeatureHallucination.sample

def numbered(self, indicator, **options):
    every = (torch.arange(world * self.sampled_num_classes) + 0.5) / (world * self.sampled_num_classes)
    uniform = every[rank::world]
    chosen, place = torch.arange(len(uniform)), torch.arange(self.sampled_num_features)
    phase = (1 + uniform)[:, None, None] * (1 + place)[:, None] * torch.arange(self.statistics.mean.shape[1])
    return sample(self, indicator, draws=(uniform, phase.flatten(0, 1).sin()))

FeatureHallucination.sample = numbered
begin = FeatureStatistics.__init__

def all_used(self, *arguments, **options):
    begin(self, *arguments, **options)
    self.used.fill_(True)  # no row is missing on one process only

FeatureStatistics.__init__ = all_used
stop = int(sys.argv.pop(1))
add = TrainingLog.add

def stopping(self, parts, rate, done):
    add(self, parts, rate, done)
    if done == stop and rank == world - 1:
        os.kill(os.getpid(), signal.SIGTERM)

TrainingLog.add = stopping
main()
"""


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
    out = tailfin.train(
        tiny_recipe, train=tiny_set[0], out=tmp_path / "run", overrides=[*BACL, *changes], stage1=stage_one
    )
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
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["iteration"] for line in lines if line.endswith("}")]


def test_kill_inside_stage_two_and_resume(tmp_path, tiny_set, tiny_recipe, stage_one, start_tailfin):
    """Indicator and hallucination statistics are part of the resume point: the very bits of the run that went on."""
    out = tmp_path / "run"
    process = start_tailfin("train", tiny_recipe, "--train", tiny_set[0], "--out", out, "--stage1", stage_one, *BACL)
    deadline = time.monotonic() + 100
    while process.poll() is None and time.monotonic() < deadline and max(iterations(out), default=0) < 12:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "model.safetensors").exists(), process.stdout.read()
    point = checkpoint.load_resume_point(out / "stages" / "2-classifier")
    assert 10 <= point["iteration"] < iterations(stage_one)[-1]
    assert point["model"][INDICATOR].any() and point["model"][MEAN].any()
    tailfin.train("", out=out, resume=True)
    straight, resumed = (load_file(run / "model.safetensors") for run in (stage_one, out))
    assert straight.keys() == resumed.keys()
    assert changed(straight, resumed) == set()
    assert iterations(out) == iterations(stage_one)


# ---- two processes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbered(tmp_path_factory, tiny_set, tiny_recipe, stage_one):
    """`run(out, processes, stop)`: stage 2 with numbered draws, 4 classes drawn per iteration over all processes."""
    script = tmp_path_factory.mktemp("numbered") / "numbered.py"
    script.write_text(NUMBERED)

    def run(out: Path, processes: int, stop: int = 0, resume: bool = False) -> None:
        words = ["--resume", out]
        if not resume:
            words = [tiny_recipe, "--train", tiny_set[0], "--out", out, "--stage1", stage_one, *BACL]
            words += [f"second.hallucination.sampled_num_classes={4 // processes}", "second.schedule.epochs=1"]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        command = list(map(str, [sys.executable, script, stop, "train", *words]))
        started = [
            subprocess.Popen(
                command,
                env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in range(processes)
        ]
        outputs = [process.communicate(timeout=200)[0] for process in started]
        codes = {process.returncode for process in started}
        assert codes == ({128 + signal.SIGTERM} if stop else {0}), "\n".join(outputs)

    return run


@pytest.fixture(scope="module")
def two(tmp_path_factory, numbered) -> Path:
    out = tmp_path_factory.mktemp("two") / "run"
    numbered(out, 2)
    return out


def test_two_processes_train_the_classifier_that_one_trains(tmp_path, numbered, two, stage_one):
    """Half the batch each: weights, indicator and class statistics agree with those of one process."""
    numbered(tmp_path / "one", 1)
    first = load_file(stage_one / "stages" / "1-representation" / "model.safetensors")
    alone, joined = (load_file(run / "model.safetensors") for run in (tmp_path / "one", two))
    assert alone.keys() == joined.keys()
    for key, value in alone.items():
        torch.testing.assert_close(joined[key], value, rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")
    # the tolerance is far below what the stage changes
    for key in ("roi_heads.predictor.cls_score.weight", "roi_heads.predictor.bbox_pred.weight"):
        assert (alone[key] - joined[key]).abs().max() < 0.01 * (alone[key] - first[key]).abs().max()
    assert alone[INDICATOR].sum() > 10 and alone[MEAN].any()


def test_two_processes_stopped_and_resumed(tmp_path, numbered, two):
    out = tmp_path / "run"
    numbered(out, 2, stop=4)
    point = checkpoint.load_resume_point(out / "stages" / "2-classifier")
    assert point["iteration"] == 4 and point["processes"] == 2
    numbered(out, 2, resume=True)
    straight, resumed = (load_file(run / "model.safetensors") for run in (two, out))
    assert changed(straight, resumed) == set()
