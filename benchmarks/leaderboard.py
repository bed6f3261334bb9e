"""docs/leaderboard.md and docs/claims.md from the stored numbers of studies, and nothing else.

    tailfin study benchmarks/studies/methods.yaml --sets road12 --data road12=DATA --out OUT --tables
    cp OUT/study.csv benchmarks/studies/results/road12.csv
    cp OUT/differences.csv benchmarks/studies/results/road12.differences.csv
    python benchmarks/leaderboard.py            # write both; --check: exit code 1 where they are other than that

Where a processor lacks bfloat16, `precision: auto` is float32, and numbers are others: such cells are a set of their
own, `sed 's/^road12,/"road12, float32",/'` on both files, as road12-float32.csv.

`benchmarks/studies/results` has per set a line per trained cell and the differences of arms to their controls;
`benchmarks/studies/claims.yaml` has the papers' claims and the comparisons that test them.
"""

from __future__ import annotations

import argparse
import csv
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "studies" / "results"
CLAIMS = ROOT / "benchmarks" / "studies" / "claims.yaml"
Line = dict[str, str]
TRAIN = "tailfin train"
NOT_RUN, NOT_TESTABLE = "not run yet", "not testable here"

BOARD = """# Leaderboard

Made by `python benchmarks/leaderboard.py` from `benchmarks/studies/results`; nothing is written by hand. Fractions of
1, LVIS protocol, boxes of the validation pictures, means over the seeds that are named, sorted by AP. Minutes are those
of training on one thread of a shared processor (those of the sets in float32 were halted at times and say little);
stages that arms have in common are counted for each. A command is that of the first seed, without the words that stand
above the table; DATA is the folder of the set.
[study.md](study.md) says how a study is run, [claims.md](claims.md) what follows for the papers' claims.
"""
LIST = """# Claims of the three papers on small data

Made by `python benchmarks/leaderboard.py` from `benchmarks/studies/claims.yaml` and the stored differences of studies.
Differences are to the arm that is named, in points of 100, with two 95 % intervals where there are such: over seeds
(Student's t, from two seeds on) and over pictures (paired bootstrap, the mean of the seeds). Sets: `road12`, `fod` and
`synth` are the studies of `benchmarks/studies/methods.yaml`; those in words are tables of `docs/results.md`, whose
differences `benchmarks/studies/results/earlier.differences.csv` repeats; `road12, float32` is the study on a processor
without bfloat16.

* **Reproduced**: the sign is the claimed one, and the interval over seeds excludes zero.
* **Not reproduced**: it excludes zero on the other side.
* **Not told apart**: it holds zero.

With one seed the interval over pictures decides, and the verdict says so: another seed may turn it. One seed without
any interval is told by its direction alone, which says little. All of this is of small pictures, few classes and
hundreds of steps: a claim about LVIS at 12 to 24 epochs is neither confirmed nor refuted by it.
"""


def read(name: str) -> list[Line]:
    """The lines of all stored files that end so."""
    found: list[Line] = []
    for path in sorted(RESULTS.glob(f"*{name}")):
        if name == ".csv" and path.name.endswith(".differences.csv"):
            continue
        with path.open(encoding="utf-8", newline="") as file:
            found += csv.DictReader(file)
    return found


def leaderboard(cells: Sequence[Line]) -> str:
    """The page of tables, one per set."""
    parts = [BOARD]
    for name in dict.fromkeys(cell["set"] for cell in cells):
        own = [cell for cell in cells if cell["set"] == name]
        arms = {arm: [cell for cell in own if cell["arm"] == arm] for arm in dict.fromkeys(cell["arm"] for cell in own)}
        order = sorted(arms, key=lambda arm: -mean(arms[arm], "AP"))
        trained = [shlex.split(rows[0]["command"]) for rows in arms.values() if rows[0]["command"].startswith(TRAIN)]
        shared = (
            [word for word in trained[0][3:] if all(word in other for other in trained)] if len(trained) > 1 else []
        )
        lines = [f"Every `{TRAIN}` has `{shlex.join(shared)}` too.", ""] if shared else []
        lines += [
            "| method | AP | AP_r | AP_c | AP_f | seeds | minutes | steps | commit | command |",
            f"|{'---|' * 10}",
        ]
        for arm in order:
            first = arms[arm][0]
            numbers = [f"{mean(arms[arm], key):.3f}" for key in ("AP", "APr", "APc", "APf")]
            seeds = ", ".join(cell["seed"] for cell in arms[arm])
            minutes = f"{mean(arms[arm], 'minutes'):.1f}"
            commits = ", ".join(dict.fromkeys(cell["commit"][:7] for cell in arms[arm]))
            command = f"`{without(first['command'], shared)}`"
            lines.append(f"| {' | '.join([arm, *numbers, seeds, minutes, first['steps'], commits, command])} |")
        parts += [f"## {name}", "", *lines, ""]
    return "\n".join(parts)


def without(command: str, shared: Sequence[str]) -> str:
    """A command of training without the words that all of them have."""
    if not command.startswith(TRAIN):
        return command
    return shlex.join(word for word in shlex.split(command) if word not in shared)


def mean(cells: Sequence[Line], key: str) -> float:
    """Of a column, over the cells that have it."""
    values = [float(cell[key]) for cell in cells if cell[key]]
    return float(np.mean(values)) if values else float("nan")


def claims_page(claims: Mapping[str, Any], differences: Sequence[Line]) -> str:
    """The page of claims, one table per paper; a claim has a line for every comparison that was run."""
    parts, counts = [], dict[str, int]()
    for paper in claims["papers"]:
        lines = ["| claim | published | tested by | difference | verdict | why |", f"|{'---|' * 6}"]
        for claim in paper["claims"]:
            tests = [{**claim, **other} for other in ({}, *claim.get("also", ()))]
            found = [judged(test, differences) for test in tests]
            ran = [one for one in found if one[2] not in (NOT_RUN, NOT_TESTABLE)] or found[:1]
            best = min(ran, key=lambda one: "one seed" in one[2])[2].partition(",")[0]
            counts[best] = counts.get(best, 0) + 1
            why = " ".join(claim.get("why", "").split())
            for number, one in enumerate(ran):
                said = [claim["claim"], claim.get("published", ""), *one, why]
                lines.append(f"| {' | '.join(said if not number else ['', '', *one, ''])} |")
        parts += [f"## {paper['title']}", "", *lines, ""]
    told = ", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items()))
    return "\n".join(
        [
            LIST,
            f"Of {sum(counts.values())} claims: {told} (of several comparisons the first with more than one seed).",
            "",
            *parts,
        ]
    )


def judged(claim: Mapping[str, Any], differences: Sequence[Line]) -> tuple[str, str, str]:
    """How a claim was tested, the difference with its intervals, and the verdict."""
    if "arm" not in claim:
        return claim.get("needs", ""), "", NOT_TESTABLE
    key = (claim["set"], claim["arm"], claim["control"], claim["metric"])
    tested = f"{claim['set']}: `{claim['arm']}` against `{claim['control']}`, {claim['metric']}"
    line = next((one for one in differences if (one["set"], one["arm"], one["control"], one["metric"]) == key), None)
    if line is None:
        return tested, "", NOT_RUN
    value = 100 * float(line["mean"])
    over_seeds = interval_of(value, 100 * float(line["half_interval"])) if line["half_interval"] else None
    ends = [100 * float(line[name]) for name in ("low_pictures", "high_pictures") if line[name]]
    over_pictures = (ends[0], ends[1]) if ends else None
    texts = [f"{value:+.1f}"]
    if over_seeds is not None:
        texts.append(f"seeds {over_seeds[0]:+.1f} to {over_seeds[1]:+.1f} ({line['seeds']})")
    if over_pictures is not None:
        texts.append(f"pictures {over_pictures[0]:+.1f} to {over_pictures[1]:+.1f}")
    one = "" if over_seeds is not None else ", one seed"
    as_claimed = (value > 0) == (claim["sign"] > 0)
    if over_seeds is None and over_pictures is None:
        return tested, "; ".join(texts), f"one seed alone, {'as claimed' if as_claimed else 'against it'}"
    low, high = over_seeds or over_pictures or (0.0, 0.0)
    if low <= 0 <= high:
        return tested, "; ".join(texts), f"not told apart{one}"
    verdict = "reproduced" if as_claimed else "not reproduced"
    return tested, "; ".join(texts), f"{verdict}{one}"


def interval_of(value: float, half: float) -> tuple[float, float]:
    """Its ends."""
    return value - half, value + half


def pages() -> dict[Path, str]:
    """What both pages are to be."""
    claims = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    return {
        ROOT / "docs" / "leaderboard.md": leaderboard(read(".csv")),
        ROOT / "docs" / "claims.md": claims_page(claims, read(".differences.csv")),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    made = pages()
    other = [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    if given.check:
        sys.exit(f"not what the script makes: {', '.join(map(str, other))}" if other else 0)
    for path in other:
        path.write_text(made[path], encoding="utf-8")
        print(path)
