"""Packaged ImageNet weights against a random start, in equal processor minutes, for four methods.

    python benchmarks/evidence/starts.py --data DATA --minutes 5 --size 96 --seeds 0          # road12: 8 cells
    python benchmarks/evidence/starts.py --data DATA --set fod --minutes 10
    python benchmarks/evidence/starts.py --data DATA --epochs 12                              # equal epochs

    softmax, rfs, bacl, stepwise                  EfficientNet-Lite0 from `weights: packaged`, frozen up to stride 4
    softmax_random, rfs_random, ...               the same network from random weights, all of it trained, batch norm

Minutes are those of a processor: before its cell an arm is trained twice, for a few passes, and what the difference
costs says how many epochs it gets. So a random start, which trains more layers, has fewer. Evaluation and
the start of the program are not counted. What a cell used in the end, with both, is `processor_seconds` of its line.
Step-wise learning has half of its epochs in step 0 (objectness), a sixth in step 1 and a third in step 2; BACL half in
each stage. Rates are the recipes' own. Differences are to `softmax_random`; see `cells.py` for resuming and intervals.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import cells
from cells import SETS, Arm, command_of, processor_seconds, schedule, watched

METHODS = ("softmax", "rfs", "bacl", "stepwise")
RANDOM: dict[str, Any] = {"weights": "none", "detector.norm": "bn", "detector.frozen_layers": 0}
DIVISION = {"road12": 40, "fod": 42}  # pictures of the largest class of the tail: half of the classes
TIMED = {"road12": (0.5, 3.0), "fod": (0.15, 0.75)}  # epochs of the two trainings that are timed


def arm_of(method: str, random: bool, epochs: float, name: str) -> Arm:
    """A method for so many epochs in all."""
    base, threshold = SETS[name]
    start = RANDOM if random else {}
    own: dict[str, Any] = schedule(epochs)
    recipe = base
    if method == "rfs":
        recipe = f"{base}:rfs"
    elif method == "bacl":
        recipe, own = f"{base}:bacl", {**schedule(epochs / 2), **schedule(epochs / 2, "second.")}
    elif method == "stepwise":
        bands = f"{{name: bands, bands: [{{images: {DIVISION[name]}, threshold: {threshold}, power: 0.5}}]}}"
        step = {"photometric": False, "rfs": bands}
        steps = {
            "head": {**step, "per_head_class": 100, "epochs": round(epochs / 6, 3), "lr": 2e-3},
            "tail": {**step, "per_head_class": 40, "epochs": round(epochs / 3, 3), "lr": 0.01, "milestones": []},
        }
        own = {**schedule(epochs / 2), "method": "stepwise", "loss": "objectness"}
        own["stepwise"] = (
            f"{{division: [{DIVISION[name]}], {', '.join(f'{key}: {_flow(v)}' for key, v in steps.items())}}}"
        )
    return Arm(f"{method}_random" if random else method, recipe, {**own, **start})


def _flow(values: dict[str, Any]) -> str:
    """A mapping as YAML on one line."""
    texts = (f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items())
    return f"{{{', '.join(texts)}}}"


def epochs_in(minutes: float, method: str, random: bool, options: argparse.Namespace) -> float:
    """How many epochs an arm trains in so many minutes of a processor, from two short trainings."""
    used, (short, long) = [], TIMED[options.set]
    for epochs in (short, long):
        arm = arm_of(method, random, epochs, options.set)
        with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log").open("w") as output:
            command = [*command_of(arm, 0, options), f"data.root={options.data}", "--out", f"{folder}/run"]
            environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))}
            before = processor_seconds()
            if code := watched([sys.executable, "-m", "tailfin", *command], environment, output):
                sys.exit(f"{arm.name}: exit code {code}\n{(Path(folder) / 'log').read_text()[-2000:]}")
            used.append(processor_seconds() - before)
    return round(60 * minutes * (long - short) / max(used[1] - used[0], 1e-3), 2)


def arms(options: argparse.Namespace) -> list[Arm]:
    """All arms; with `minutes` their epochs are measured once and kept in OUT/epochs.json."""
    kept = options.out / "epochs.json"
    known: dict[str, float] = json.loads(kept.read_text()) if kept.is_file() else {}
    found = []
    for method in METHODS:
        for random in (False, True):
            name = f"{method}_random" if random else method
            wanted = not options.arms or name in options.arms
            if options.minutes and wanted and name not in known and not options.list:
                known[name] = epochs_in(options.minutes, method, random, options)
                kept.parent.mkdir(parents=True, exist_ok=True)
                kept.write_text(json.dumps(known))
                print(f"{name}: {known[name]} epochs in {options.minutes:g} minutes", flush=True)
            found.append(arm_of(method, random, known.get(name, options.epochs), options.set))
    return found


if __name__ == "__main__":
    parser = cells.parser(__doc__, "evidence/starts")
    parser.add_argument("--minutes", type=float, default=0.0, help="of a processor for every arm; 0: equal epochs")
    given = parser.parse_args()
    given.data = given.data.absolute()
    cells.run(arms(given), "softmax_random", given)
