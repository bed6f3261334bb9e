"""Trainings killed with `kill -9` at random moments and resumed, against one that was left alone.

    python benchmarks/faults/kill.py                     # 5 runs of the baseline, each killed 3 times
    python benchmarks/faults/kill.py --runs 20 --kills 4 --workers 2 --seed 3
    python benchmarks/faults/kill.py --recipe bacl       # or stepwise, drcl
    python benchmarks/faults/kill.py --table             # the row of docs/reliability.md

A run survives when its weights are equal to the last bit, its metrics are equal, and its folder holds the files of the
one left alone and no others. The data set is synthetic; a training takes some ten seconds on two cores.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tailfin.checkpoint import content_hash
from tailfin.data.synth import make_synthetic

RECIPE = """\
weights: none
backbone: resnet18
detector:
  norm: bn
  frozen_layers: 0
  fpn_channels: 16
  fpn_layers: [2, 3]
  fpn_pool: false
  anchor_sizes: [12, 24]
  roi_size: 3
  roi_batch: 16
  head_channels: 32
schedule: {epochs: 4, batch: 4, lr: 0.01, warmup: 4}
data: {resize: square, sizes: [64], workers: 0}
logging: {every: 1, checkpoint_every: 3}
evaluation: {every: 1, select: best}
"""


SCHEDULE = "{epochs: 2, batch: 4, lr: 0.01, warmup: 4}"
DETR = """\
weights: none
detector:
  {name: deformable_detr, norm: bn, frozen_layers: 0, widths: [32, 32, 32, 32, 32], blocks: [1, 1, 1, 1], levels: 2,
   channels: 32, encoder_layers: 1, decoder_layers: 2, heads: 4, points: 2, feedforward: 32, queries: 12}
loss: focal
data: {resize: square, sizes: [64], workers: 0}
evaluation: {max_dets: 20, batch: 2}
method: stepwise
schedule: {epochs: 2, batch: 4, optimizer: adamw, lr: 1e-3, warmup: 0, milestones: [], clip: 0.1}
stepwise:
  division: [10]
  exemplars: {shard: 4}
  head: {per_head_class: 8, per_tail_class: 2, lr: 1e-3}
  tail: {per_head_class: 4, lr: 1e-3, photometric: false}
logging: {every: 1, checkpoint_every: 3}
"""
PRETRAINING = f"""\
pretraining:
  views: {{resize: square, sizes: [64], min_side: 4}}
  proposals: {{source: gt_jitter}}
  image: {{queue: 24, hidden: 32, dim: 16}}
  box: {{queue: 50, hidden: 32, dim: 16}}
  reconstruction: {{widths: [16, 16, 8]}}
  schedule: {SCHEDULE}
"""
SECOND = f"""\
method: bacl
loss: objectness
second: {{loss: fcbl, features: hallucination, schedule: {SCHEDULE}}}
"""
RECIPES = {"baseline": RECIPE, "bacl": RECIPE + SECOND, "stepwise": DETR, "drcl": RECIPE + PRETRAINING}


def train(*words: object) -> subprocess.Popen:
    """The command in a process group of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tailfin", "train", *map(str, words)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(command, text=True, env=environment, start_new_session=True, **output)


def finish(process: subprocess.Popen, run: Path) -> None:
    """Wait for the end; a failure ends this script with the output of the command."""
    output, _ = process.communicate(timeout=600)
    if process.returncode:
        raise SystemExit(f"{run}: exit code {process.returncode}\n{output}")


def files(run: Path) -> set[str]:
    """Names of all files of a run."""
    return {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}


def differences(straight: Path, run: Path) -> list[str]:
    """What a resumed run has lost, in words; empty when it survived."""
    found = []
    if content_hash(straight / "model.safetensors") != content_hash(run / "model.safetensors"):
        found.append("other weights")
    if (straight / "metrics.json").read_bytes() != (run / "metrics.json").read_bytes():
        found.append("other metrics")
    if files(straight) != files(run):
        found.append(f"other files: {sorted(files(straight) ^ files(run))}")
    return found


def progress(run: Path) -> int:
    """Lines of the logs of all stages: one an iteration."""
    return sum(file.read_bytes().count(b"\n") for file in run.glob("stages/*/metrics.jsonl"))


def killed_run(run: Path, words: list[object], lines: int, kills: int, rng: random.Random) -> int:
    """Train to the end with up to `kills` kills, each a random number of the `lines` of a whole run's log after a start
    and up to 0.3 s later, some before the first line; returns how many hit a process that was alive."""
    hit = 0
    for _ in range(kills):
        process = train("--resume", run) if (run / "recipe.yaml").exists() else train(*words, "--out", run)
        there = progress(run)
        wanted = there + rng.randint(0, max(1, round(0.7 * (lines - there))))
        if wanted == there:
            time.sleep(rng.uniform(0.3, 6))
        while process.poll() is None and progress(run) < wanted:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.3))
        alive = process.poll() is None
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        hit += alive
        if not alive:
            break
    process = train("--resume", run) if (run / "recipe.yaml").exists() else train(*words, "--out", run)
    finish(process, run)
    return hit


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--kills", type=int, default=3, help="of each run, at most")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--recipe", choices=RECIPES, default="baseline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="print the row of docs/reliability.md")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_synthetic(folder / "set", images_train=40, images_val=12, classes=4, imbalance=4.0, size=96)
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPES[options.recipe])
        data = ["--train", folder / "set" / "train.json", "--val", folder / "set" / "val.json"]
        words = [recipe, *data, f"data.workers={options.workers}"]
        finish(train(*words, "--out", folder / "straight"), folder / "straight")
        lines = progress(folder / "straight")
        killed = lost = 0
        for number in range(options.runs):
            run = folder / f"run-{number}"
            killed += killed_run(run, words, lines, options.kills, random.Random(f"{options.seed} {number}"))
            if found := differences(folder / "straight", run):
                lost += 1
                print(f"run {number}: {'; '.join(found)}", file=sys.stderr)
    if options.table:
        print(
            f"| `kill -9` at random moments, then `--resume`; {options.recipe} | {killed} | {killed - lost} | {lost} |"
        )
    else:
        print(f"{options.runs} runs, {killed} kills of living processes, {lost} runs lost something")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(_main())
