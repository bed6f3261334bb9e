"""Arms x seeds of one comparison: every cell trained once, one line of JSON each, means and paired intervals.

    python benchmarks/evidence/cells.py OUT/cells.jsonl --control none      # the table of what is there

`bacl.py` and `drcl.py` say which arms there are. A cell is a run folder OUT/ARM/seed-N made by `tailfin train`, with
its output beside it. A finished cell has a line in OUT/cells.jsonl and is not trained again; a cell that was stopped
(Ctrl-C, SIGTERM, `timeout`) goes on where it was. Seeds are the outer loop, so that what is there is paired as early as
possible. Arms that have stages in common train them once per seed (`tailfin train --reuse`).

`--set` says whose recipes are taken; `--data` may be any folder with train.json and val.json, for example one of
`tailfin data synth`, and `--change` fits the recipes to it (`sampler.threshold`).

The interval of a difference is that of its mean over the seeds that both arms have, by Student's t (95 %): the arms of
a seed have the same start and, as far as their samplers allow, the same order. With one seed there is none.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

import tailfin

METRICS = ("AP", "AP50", "APr", "APc", "APf")
# Where each set's recipes are, and the threshold of RFS that repeats some of its classes
SETS = {"road12": ("road12/packaged", 0.08), "fod": ("fod/packaged", 0.03)}


@dataclass(frozen=True)
class Arm:
    """One recipe of a comparison."""

    name: str
    recipe: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    shares: str = ""  # arms with the same word have their first stages in common
    files: Mapping[str, Path] = field(default_factory=dict)  # overrides that name a file of this machine


def parser(doc: str | None, out: str) -> argparse.ArgumentParser:
    """The options of every comparison."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--data", type=Path, required=True, help="folder of the set, with train.json and val.json")
    found.add_argument("--set", choices=SETS, default="road12", help="whose recipes are taken")
    found.add_argument("--out", type=Path, default=Path(out), help="folder of the cells")
    found.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    found.add_argument("--arms", nargs="+", help="only these")
    found.add_argument("--epochs", type=float, default=24, help="of every arm, all its stages together")
    found.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--change", nargs="*", default=[], metavar="KEY=VALUE", help="overrides of every arm")
    found.add_argument("--list", action="store_true", help="print the commands and train nothing")
    return found


def schedule(epochs: float, prefix: str = "") -> dict[str, Any]:
    """So many epochs, the rate's steps after 8/12 and 11/12 of them; recipes with a cosine do not look at these."""
    steps = [round(epochs * share / 12, 3) for share in (8, 11)]
    return {f"{prefix}schedule.epochs": epochs, f"{prefix}schedule.milestones": steps}


def run(arms: Sequence[Arm], control: str, options: argparse.Namespace) -> None:
    """Train what is missing, then print the table."""
    names = [arm.name for arm in arms]
    if unknown := [name for name in options.arms or () if name not in names]:
        sys.exit(f"there is no arm {unknown[0]} (arms: {', '.join(names)})")
    arms = [arm for arm in arms if not options.arms or arm.name in options.arms]
    options.data, options.out = options.data.absolute(), options.out.absolute()
    log = options.out / "cells.jsonl"
    done = {(cell["arm"], cell["seed"]): cell for cell in read([log])}
    failed = False
    for seed in options.seeds:
        for arm in arms:
            command = command_of(arm, seed, options)
            if options.list:
                print(shlex.join(["tailfin", *command]))
            elif (arm.name, seed) in done:
                if done[arm.name, seed]["command"] != command:
                    sys.exit(f"{log}: {arm.name}, seed {seed} was trained by another command; take another --out")
            else:
                cell = train(arm, seed, command, options)
                failed |= cell is None
                if cell is not None:
                    with log.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(cell) + "\n")
    if not options.list:
        show(read([log]), control)
    sys.exit(failed)


def command_of(arm: Arm, seed: int, options: argparse.Namespace) -> list[str]:
    """The arguments of `tailfin` without what names a folder of this machine, as a cell's line has them."""
    values = {"seed": seed, "data.sizes": [options.size], **arm.overrides}
    texts = [f"{key}={'null' if value is None else json.dumps(value)}" for key, value in values.items()]
    return ["train", arm.recipe, *(text.replace('"', "") for text in texts), *options.change]


def train(arm: Arm, seed: int, command: Sequence[str], options: argparse.Namespace) -> dict[str, Any] | None:
    """One cell, from the start or on from where it was; none where training failed."""
    folder = options.out / arm.name / f"seed-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    asked = folder.with_suffix(".command.json")
    if (folder / "recipe.yaml").is_file() and asked.is_file() and json.loads(asked.read_text()) == list(command):
        arguments = ["train", "--resume", str(folder)]
    else:
        asked.write_text(json.dumps(list(command)))
        files = [f"{key}={path}" for key, path in arm.files.items()]
        arguments = [*command, *files, f"data.root={options.data}", "--out", str(folder), "--overwrite"]
        if run_there := shared_run(arm, seed, options):
            arguments += ["--reuse", str(run_there)]
    print(f"{arm.name}, seed {seed}: {' '.join(command)}", flush=True)
    start, used = time.monotonic(), processor_seconds()
    environment = {**os.environ, **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(options.threads))}
    with folder.with_suffix(".log").open("a", encoding="utf-8") as output:
        code = watched([sys.executable, "-m", "tailfin", *arguments], environment, output)
    if not (folder / "metrics.json").is_file() or code:
        print(f"{arm.name}, seed {seed}: exit code {code}, see {folder.with_suffix('.log')}", flush=True)
        return None
    numbers = json.loads((folder / "metrics.json").read_text())["bbox"]
    environment_file = json.loads((folder / "environment.json").read_text())
    return {
        "arm": arm.name,
        "seed": seed,
        "set": options.set,
        **{name: numbers[name] for name in METRICS},
        "command": list(command),
        "iterations": iterations(folder),
        "reused": [stage["stage"] for stage in environment_file.get("reused", [])],
        "seconds": round(time.monotonic() - start),  # of the last part, where it was stopped in between
        "processor_seconds": round(processor_seconds() - used),  # likewise
        "threads": options.threads,
        "tailfin": tailfin.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
    }


def processor_seconds() -> float:
    """Of all programs that this one has run to their end; other programs beside them do not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def shared_run(arm: Arm, seed: int, options: argparse.Namespace) -> Path | None:
    """A run of this seed that has the arm's first stages."""
    if not arm.shares:
        return None
    for note in sorted(options.out.glob(f"*/seed-{seed}.shares")):
        folder = note.with_suffix("")
        if note.read_text() == arm.shares and any(folder.glob("stages/1-*/model.safetensors")):
            return folder
    (options.out / arm.name / f"seed-{seed}.shares").write_text(arm.shares)
    return None


def watched(command: Sequence[str], environment: Mapping[str, str], output: Any) -> int:
    """The exit code of a command that is stopped with this process: it then leaves a resume point."""
    stopped: list[int] = []
    with subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:

        def stop(number: int, _: object) -> None:  # no waiting in here: `wait` below holds its lock
            stopped.append(number)
            process.send_signal(signal.SIGTERM)

        before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    if stopped:
        sys.exit(128 + stopped[0])
    return code


def checked(command: Sequence[str], environment: Mapping[str, str], output: Any) -> None:
    """`watched`, and the end of this program where the command fails."""
    if code := watched(command, environment, output):
        sys.exit(f"{' '.join(command)}: exit code {code}, see {output.name}")


def iterations(folder: Path) -> dict[str, int]:
    """By stage the iterations of its log: epochs with repeated pictures have more of them."""
    found = {}
    for path in sorted(folder.glob("stages/*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        found[path.parent.name] = max((line.get("iteration", 0) for line in lines), default=0)
    return found


# ---- the table -------------------------------------------------------------------------------------------------------


def read(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """The cells of some files."""
    lines = [line for path in paths if path.is_file() for line in path.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.strip()]


def paired(cells: Sequence[Mapping[str, Any]], arm: str, control: str, metric: str) -> tuple[float, float | None, int]:
    """Mean difference to the control over common seeds (and sets), half its 95 % interval or none, their number."""
    by_arm = {
        name: {(cell["set"], cell["seed"]): cell[metric] for cell in cells if cell["arm"] == name}
        for name in (arm, control)
    }
    common = sorted(by_arm[arm].keys() & by_arm[control].keys())
    each = np.array([by_arm[arm][key] - by_arm[control][key] for key in common])
    if len(each) < 2:
        return (float(each.mean()) if len(each) else float("nan")), None, len(each)
    half = float(student.ppf(0.975, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)))
    return float(each.mean()), half, len(each)


def show(cells: Sequence[Mapping[str, Any]], control: str) -> None:
    """Means per arm and set, and AP's and APr's difference to the control, in the form of docs/results.md."""
    for name in sorted({cell["set"] for cell in cells}):
        own = [cell for cell in cells if cell["set"] == name]
        table = Table(title=f"{name}: means over seeds; differences to {control}, 95 % interval over common seeds")
        for column in ("arm", "seeds", *METRICS, "AP difference", "APr difference", "iterations"):
            table.add_column(column, justify="left" if column == "arm" else "right")
        for arm in dict.fromkeys(cell["arm"] for cell in own):
            rows = [cell for cell in own if cell["arm"] == arm]
            means = [f"{np.mean([cell[metric] for cell in rows]):.3f}" for metric in METRICS]
            steps = " + ".join(f"{count}" for count in rows[0]["iterations"].values())
            seeds = ",".join(str(cell["seed"]) for cell in rows)
            table.add_row(arm, seeds, *means, *(difference(own, arm, control, key) for key in ("AP", "APr")), steps)
        Console(width=150).print(table)


def difference(cells: Sequence[Mapping[str, Any]], arm: str, control: str, metric: str) -> str:
    """The paired difference as text."""
    if arm == control:
        return ""
    mean, half, count = paired(cells, arm, control, metric)
    if not count:
        return "-"
    return f"{mean:+.3f}" + (" (one seed)" if half is None else f" ± {half:.3f}")


if __name__ == "__main__":
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("cells", type=Path, nargs="+")
    own.add_argument("--control", required=True, help="the arm that the others are compared to")
    given = own.parse_args()
    show(read(given.cells), given.control)
