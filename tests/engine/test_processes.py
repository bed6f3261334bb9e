"""Two processes (gloo, under torchrun) do what one does: the same pictures, the same results, and exact resumes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from tailfin import api, checkpoint
from tailfin.config import recipe_from_file
from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.errors import UserError
from tailfin.processes import new_accelerator, slow_precision
from tailfin.run import batch_plan
from tailfin.stats import ClassStats

# notes the pictures of every step of its rank, then is the command line
RECORDER = """
import atexit, json, os, sys
import torch
from tailfin.cli.main import main
from tailfin.models.faster_rcnn import FasterRCNN

seen, forward = [], FasterRCNN.forward

def noting(self, images, targets=None, limits=None):
    if self.training:
        seen.append([int(target["image_id"]) for target in targets])
    return forward(self, images, targets, limits)

FasterRCNN.forward = noting
folder = sys.argv.pop(1)

def at_exit():
    json.dump(seen, open(f"{folder}/seen-{os.environ['RANK']}.json", "w"))
    json.dump(torch.distributed.is_initialized(), open(f"{folder}/group-{os.environ['RANK']}.json", "w"))

atexit.register(at_exit)
main()
"""
CHANGES = ["schedule.epochs=3", "schedule.ema=0.9", "evaluation.batch=1", "evaluation.every=2", "schedule.lr=0.02"]


def start(*words: object, **more: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **more},
    )


def torchrun(*words: object) -> subprocess.Popen:
    """Two processes under their launcher."""
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words)


def pair(*words: object) -> list[subprocess.Popen]:
    """The same two processes without a launcher, as a cluster's scheduler would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    return [start("-m", "tailfin", *words, **common, RANK=rank, LOCAL_RANK=rank) for rank in ("0", "1")]


def finished(process: subprocess.Popen) -> str:
    """Output of a process that must end well."""
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


def lines(run: Path) -> list[dict]:
    path = run / "stages/1-train/metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(process: subprocess.Popen, run: Path, iteration: int) -> None:
    deadline = time.monotonic() + 150
    while time.monotonic() < deadline and process.poll() is None:
        if any(line["iteration"] >= iteration for line in lines(run)):
            return
        time.sleep(0.02)
    process.kill()
    raise AssertionError(process.communicate()[0])


@pytest.fixture(scope="module")
def arguments(tiny_set, tiny_recipe):
    return [tiny_recipe, "--train", tiny_set[0], "--val", tiny_set[1], *CHANGES]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, arguments) -> Path:
    """A run of two processes from start to end, beside the pictures that each has seen."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "recorder.py").write_text(RECORDER)
    output = finished(torchrun(folder / "recorder.py", folder, "train", *arguments, "--out", folder / "run"))
    left = [json.loads((folder / f"group-{rank}.json").read_text()) for rank in (0, 1)]
    assert left == [False, False]  # each process has ended its group
    assert output.count("stage train:") == 1 and output.count("report  ") == 1  # one voice
    return folder / "run"


def test_two_processes_train_measure_and_report(straight):
    assert {"model.safetensors", "metrics.json", "results.bbox.json", "report.html"} <= {
        p.name for p in straight.iterdir()
    }
    assert not (straight / "results.shards").exists()
    assert json.loads((straight / "environment.json").read_text())["devices"]["processes"] == 2
    steps = [line for line in lines(straight) if "loss" in line]
    assert [line["iteration"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [line["epoch"] for line in lines(straight) if "eval" in line] == [2.0]


def test_their_pictures_are_the_batches_of_one_process(straight):
    recipe = recipe_from_file(straight / "recipe.yaml")
    source = open_source(recipe.data.train, recipe.data.root, "train")
    plan = batch_plan(recipe, TrainingDataset(source, recipe.data, recipe.seed), ClassStats.from_index(source.index))
    expected = [[row for _, row, _ in keys] for keys in plan.keys(0, slice(0, 1), 1)]
    ranks = [json.loads((straight.parent / f"seen-{rank}.json").read_text()) for rank in (0, 1)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == expected


def test_their_results_are_those_of_one_process(straight, tmp_path):
    """The same weights give the same detections, each picture once, whatever the number of processes."""
    model, files = straight / "model.safetensors", api.validation_files(straight)
    alone = api.predict_to_results(model, *files, tmp_path, max_dets=20)["bbox"]
    key = lambda entry: (entry["image_id"], -entry["score"], entry["bbox"])  # noqa: E731
    first, second = (sorted(json.loads(path.read_text()), key=key) for path in (alone, straight / "results.bbox.json"))
    assert first and len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        assert (one["image_id"], one["category_id"]) == (two["image_id"], two["category_id"])
        assert one["score"] == pytest.approx(two["score"], abs=1e-6)
        assert one["bbox"] == pytest.approx(two["bbox"], abs=2e-3)


def test_kill_9_of_both_and_resume(straight, arguments, tmp_path):
    out = tmp_path / "run"
    both = pair("train", *arguments, "--out", out)
    wait_for(both[0], out, 12)
    for process in both:
        process.kill()
    for process in both:
        process.communicate(timeout=60)
    assert not (out / "model.safetensors").exists()
    for process in pair("train", "--resume", out):
        finished(process)
    before, after = load_file(straight / "model.safetensors"), load_file(out / "model.safetensors")
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert (out / "results.bbox.json").read_bytes() == (straight / "results.bbox.json").read_bytes()
    timeless = [[{**line, "seconds": 0, "images_per_second": 0} for line in lines(run)] for run in (out, straight)]
    assert timeless[0] == timeless[1]


def test_four_pictures_cannot_be_shared_by_three(straight, tmp_path, monkeypatch):
    shutil.copytree(straight, tmp_path / "run")
    (tmp_path / "run/stages/1-train/model.safetensors").unlink()
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(
        UserError, match="schedule.batch 4 cannot be shared out evenly over 3 processes x 1 accumulation"
    ):
        api.train("", out=tmp_path / "run", resume=True)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_sigterm_and_resume_on_one_process(straight, arguments, tmp_path):
    """Both ranks stop after the same iteration, though the signal meets only one of them; the rest may run on another
    number of processes, over the same pictures."""
    out = tmp_path / "run"
    both = pair("train", *arguments, "--out", out)
    wait_for(both[0], out, 8)
    both[1].send_signal(signal.SIGTERM)
    for rank, process in enumerate(both):
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 128 + signal.SIGTERM, output
        said = f"stopped by SIGTERM; go on with: tailfin train --resume {out}" in output
        assert said == (rank == 0), output  # one message, whichever process the signal met
        assert "error: " not in output and "Traceback" not in output
    state = checkpoint.load_resume_point(out / "stages/1-train")
    assert state["processes"] == 2
    assert state["iteration"] == lines(out)[-1]["iteration"] >= 8
    api.train("", out=out, resume=True)
    assert [line["iteration"] for line in lines(out)] == [line["iteration"] for line in lines(straight)]
    assert (out / "metrics.json").exists()
    # the same schedule over the same pictures: the losses agree as closely as other draws of RoI rows let them
    one, two = ([line["loss"] for line in lines(run) if "loss" in line] for run in (out, straight))
    assert one[:8] == two[:8]
    assert sum(one) == pytest.approx(sum(two), rel=0.1)


@pytest.mark.parametrize("instructions", [False, True])
def test_half_precision_without_instructions_for_it_is_told(instructions, monkeypatch):
    """Such a processor multiplies matrices of bfloat16 one number at a time."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: instructions)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told = slow_precision(new_accelerator("bf16", cpu=True))
    assert ("schedule.precision=auto" in told) == (not instructions)
    for precision in ("no", "auto"):
        assert slow_precision(new_accelerator(precision, cpu=True)) == ""
