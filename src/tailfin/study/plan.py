"""Before and while a study runs: its cells with their steps, what has become of them, and how many minutes are left.

Minutes are those of training. They come from steps that the same arm, or else the median arm of the set, has taken in
this study; where nothing was trained yet, from a few steps that are measured (`measured_step`).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.table import Table

from tailfin.errors import UserError
from tailfin.study.cells import Cell, donor, shared
from tailfin.study.state import FINISHED, Fate, last_line, progress
from tailfin.study.work import THREADS

MEASURED = 12  # steps that are taken to measure one
SHOWN = 160  # characters of a failed cell's line


def seconds_per_step(cells: Sequence[Cell], fates: Mapping[str, Fate]) -> dict[tuple[str, str], float]:
    """Seconds of a training step by set and arm, from cells that have taken some; arm "" is the median of the set."""
    found: dict[tuple[str, str], float] = {}
    for cell in cells:
        own = fates[cell.name]
        if own.done and own.seconds and cell.calibrate is None:
            found.setdefault((cell.set, cell.arm), own.seconds / own.done)
    for name in {cell.set for cell in cells}:
        rates = [rate for (own, _), rate in found.items() if own == name]
        if rates:
            found[name, ""] = statistics.median(rates)
    return found


def to_train(cell: Cell, cells: Sequence[Cell], fates: Mapping[str, Fate], others: Sequence[Cell] = ()) -> int:
    """Steps that a cell still has to take: not those that it has taken, nor those of stages that an earlier one has, or
    one of `others`, which do not run now."""
    own = fates[cell.name]
    if own.state == FINISHED or cell.calibrate is not None:
        return 0
    before = cells[: next(number for number, other in enumerate(cells) if other.folder == cell.folder)]
    common = max(
        [donor(cell, [*cells, *others])[1], *(shared(cell, other) for other in before if other.calibrate is None)]
    )
    taken = sum(list(cell.steps.values())[:common])
    return max(0, cell.total_steps - max(taken, own.done))


def minutes_left(
    cells: Sequence[Cell],
    fates: Mapping[str, Fate],
    rates: Mapping[tuple[str, str], float],
    workers: int,
    others: Sequence[Cell] = (),
) -> float | None:
    """Minutes of training to come; none where nothing is known of a step."""
    total = 0.0
    for cell in cells:
        steps = to_train(cell, cells, fates, others)
        rate = rates.get((cell.set, cell.arm), rates.get((cell.set, "")))
        if steps and rate is None:
            return None
        total += steps * (rate or 0.0)
    return total / 60 / workers


def plan_table(
    cells: Sequence[Cell],
    fates: Mapping[str, Fate],
    rates: Mapping[tuple[str, str], float],
    title: str,
    others: Sequence[Cell] = (),
) -> Table:
    """One line per cell: steps by stage, those that are taken from other cells, and minutes."""
    table = Table("cell", "method", "steps", "to train", "minutes", "state", title=title, title_justify="left")
    for cell in cells:
        steps = to_train(cell, cells, fates, others)
        rate = rates.get((cell.set, cell.arm), rates.get((cell.set, "")))
        minutes = "" if rate is None and steps else f"{steps * (rate or 0) / 60:.1f}"
        later = ["?"] * (cell.recipe.stepwise is not None)  # steps of step-wise learning are known when they begin
        stages = " + ".join([*(str(count) for count in cell.steps.values()), *later])
        method = "calibration" if cell.calibrate is not None else cell.recipe.method
        table.add_row(cell.name, method, stages, str(steps), minutes, fates[cell.name].state)
    return table


def status_lines(
    cells: Sequence[Cell], fates: Mapping[str, Fate], workers: int, others: Sequence[Cell] = ()
) -> list[str]:
    """What `tailfin study show` says."""
    by_state: dict[str, list[Cell]] = {}
    for cell in cells:
        by_state.setdefault(fates[cell.name].state, []).append(cell)
    counts = ", ".join(f"{len(own)} {state}" for state, own in by_state.items())
    lines = [f"{len(cells)} cells: {counts}"]
    for state in ("running", "stopped"):
        for cell in by_state.get(state, ()):
            now = last_line(cell.log) if state == "running" and not fates[cell.name].done else ""
            lines.append(f"  {state} {cell.name}: step {fates[cell.name].done} of {cell.total_steps} {now}".rstrip())
    for cell in by_state.get("failed", ()):
        lines.append(f"  failed {cell.name}: {fates[cell.name].line[:SHOWN]} (see {cell.log})")
    left = minutes_left(cells, fates, seconds_per_step(cells, fates), workers, others)
    if len(by_state.get(FINISHED, ())) < len(cells):
        lines.append("minutes left: not known yet" if left is None else f"minutes of training left: about {left:.0f}")
    return lines


def measured_step(cell: Cell, threads: int) -> float:
    """Seconds of a training step of a cell: the median of a few that are taken in a folder which is then removed."""
    steps = sum(cell.steps.values())
    share = min(1.0, MEASURED / max(steps, 1))
    short = [f"schedule.epochs={cell.recipe.schedule.epochs * share:.6f}", "logging.every=1", "method=baseline"]
    none = ["second=null", "stepwise=null", "pretraining=null", "data.val={}"]
    with tempfile.TemporaryDirectory(prefix="tailfin-study-") as folder:
        words = [*cell.words, *cell.files, *short, *none, "--out", str(Path(folder) / "run")]
        environment = {**os.environ, **dict.fromkeys(THREADS, str(threads))}
        done = subprocess.run(
            [sys.executable, "-m", "tailfin", *words], env=environment, capture_output=True, text=True
        )
        taken, seconds = progress(Path(folder) / "run")
        if done.returncode or not taken:
            raise UserError(
                f"{cell.name}: a step cannot be measured: {(done.stderr.strip() or 'no step').splitlines()[-1]}"
            )
    return seconds / taken
