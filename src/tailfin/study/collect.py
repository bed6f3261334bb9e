"""The numbers of a study's finished cells: one row per cell, and per arm means, ranges and differences to its control.

The interval of a difference is that of its mean over the seeds that both arms have, by Student's t (95 %): cells of one
seed have the same start and, as far as their samplers allow, the same order. With one seed there is none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from tailfin.files import read_object
from tailfin.study.cells import Cell
from tailfin.study.state import FINISHED, Fate, progress

LEVEL = 0.95
Row = dict[str, Any]


@dataclass(frozen=True)
class Difference:
    """Of an arm to its control, in one metric, over the seeds of both."""

    mean: float
    half: float | None  # half the interval; none with one seed
    seeds: int

    @property
    def sign(self) -> int:
        """+1 or -1 where the interval excludes zero, else 0."""
        return 0 if self.half is None or abs(self.mean) <= self.half else int(math.copysign(1, self.mean))


def rows_of(cells: Sequence[Cell], fates: Mapping[str, Fate], metrics: Sequence[str]) -> list[Row]:
    """One row per finished cell, its metrics as fractions of 1."""
    found = []
    for cell in cells:
        if fates[cell.name].state != FINISHED:
            continue
        numbers = read_object(cell.folder / "metrics.json")["bbox"]
        facts = read_object(cell.folder / "environment.json")
        steps, seconds = progress(cell.folder)
        found.append(
            {
                "set": cell.set,
                "arm": cell.arm,
                "seed": cell.seed,
                "control": cell.control,
                **{name: _number(numbers.get(name)) for name in metrics},
                "minutes": round(seconds / 60, 2),
                "steps": steps,
                "taken": " ".join(stage["stage"] for stage in facts.get("reused", [])),
                "commit": facts.get("commit", ""),
                "tailfin": facts.get("versions", {}).get("tailfin", ""),
                "command": command_of(cell),
            }
        )
    return found


def command_of(cell: Cell) -> str:
    """The command that makes a cell, with DATA for the folder of its set."""
    if cell.calibrate is not None:  # RUN: the cell of the same seed
        options = [word for word in cell.words[2:] if not word.startswith("--by") or cell.calibrate.strength is None]
        return " ".join([f"tailfin calibrate RUN-OF-{cell.words[1]} --out FILE --train DATA/train.json", *options])
    return " ".join(["tailfin", *(_quoted(word) for word in cell.words), "data.root=DATA"])


def difference(rows: Sequence[Row], set_name: str, arm: str, control: str, metric: str) -> Difference | None:
    """The paired difference of two arms on a set; none where they have no seed in common."""
    values = {
        name: {
            row["seed"]: row[metric]
            for row in rows
            if row["set"] == set_name and row["arm"] == name and row[metric] is not None
        }
        for name in (arm, control)
    }
    common = sorted(values[arm].keys() & values[control].keys())
    if not common or arm == control:
        return None
    each = np.array([values[arm][seed] - values[control][seed] for seed in common])
    if len(each) < 2:
        return Difference(float(each[0]), None, 1)
    half = float(student.ppf((1 + LEVEL) / 2, len(each) - 1) * each.std(ddof=1) / np.sqrt(len(each)))
    return Difference(float(each.mean()), half, len(each))


def spread(rows: Sequence[Row], set_name: str, arm: str, metric: str) -> tuple[float, float, float, int] | None:
    """Mean, lowest, highest and number of an arm's values."""
    values = [row[metric] for row in rows if row["set"] == set_name and row["arm"] == arm and row[metric] is not None]
    return (float(np.mean(values)), min(values), max(values), len(values)) if values else None


def _number(value: Any) -> float | None:
    """A metric; none where the set has nothing to measure it on (COCO's -1)."""
    return round(float(value), 6) if isinstance(value, int | float) and value >= 0 else None


def _quoted(word: str) -> str:
    key, equals, value = word.partition("=")
    return f"'{key}={value}'" if equals and any(sign in value for sign in '{}[]" ') else word


def csv_value(value: Any) -> str:
    """A cell of a CSV file."""
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)
