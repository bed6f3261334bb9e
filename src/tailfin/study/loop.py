"""Running a study: cells that are ready are handed to the executor, until none is left.

A cell waits for one that is to train stages which both have, a calibration for the cell that it calibrates. One that
was stopped goes on as long as it got further; one that failed stays as it is until it is asked for again (`retry`). No
cell stops another.
"""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from tailfin.study.cells import Cell, donor, shared
from tailfin.study.executors import Pending, executor
from tailfin.study.spec import Study
from tailfin.study.state import FINISHED, Fate, fate
from tailfin.study.work import Job

POLL = 1.0  # seconds between two looks at what runs
TERMINATED = 143


class Terminated(BaseException):
    """SIGTERM: cells of this machine stop with resume points."""


def run_cells(
    study: Study,
    cells: Sequence[Cell],
    out: Path,
    *,
    others: Sequence[Cell] = (),
    retry: bool = False,
    most: int | None = None,
    say: Callable[[str], None] = print,
    poll: float = POLL,
) -> dict[str, Fate]:
    """Run what is not finished, at most `most` cells; returns how every cell has ended, by name.

    `others` are cells of the study that do not run now; stages that they have finished are taken all the same.
    """
    every = [*cells, *others]
    fates = {cell.name: fate(cell) for cell in cells}
    waiting = [cell for cell in cells if _wanted(fates[cell.name], retry)]
    waiting = waiting if most is None else waiting[:most]
    running: dict[str, tuple[Cell, Pending, int]] = {}
    handed = executor(
        study.executor, workers=study.workers, threads=study.threads, resources=study.resources, logs=out / "jobs"
    )
    with terminable(), handed as submit:
        while waiting or running:
            for cell in list(waiting):
                if len(running) >= study.workers:
                    break
                busy = [one for one, _, _ in running.values()]
                if why := _blocked(cell, cells, fates, [*busy, *waiting]):
                    say(f"{cell.name}: left out, {why}")
                    waiting.remove(cell)
                elif ready(cell, every, busy, waiting):
                    waiting.remove(cell)
                    say(f"{cell.name}: begins ({len(waiting)} to come)")
                    running[cell.name] = (cell, submit(job_of(cell, every, study)), fates[cell.name].done)
            ended = [name for name, (_, pending, _) in running.items() if pending.done()]
            if not ended:
                time.sleep(poll)
            for name in ended:
                cell, pending, before = running.pop(name)
                pending.result()  # an executor that has lost the cell says so
                fates[name] = own = fate(cell)
                say(f"{name}: {own.state}" + (f": {own.line}" if own.line else ""))
                if own.state == "stopped" and own.done > before:
                    waiting.append(cell)
    return fates


def job_of(cell: Cell, cells: Sequence[Cell], study: Study) -> Job:
    """What a worker has to know of a cell."""
    job = Job(
        cell.words,
        cell.files,
        str(cell.folder),
        str(cell.note),
        str(cell.log),
        study.threads,
        tuple(shlex.split(study.launcher)),
    )
    if cell.of is not None:
        base = next(one for one in cells if one.folder == cell.of)
        return replace(job, of=(*base.words, *base.files), reuse=str(cell.of), train=cell.train)
    found, _ = donor(cell, cells)
    return replace(job, reuse=str(found.folder) if found is not None else "")


def ready(cell: Cell, cells: Sequence[Cell], running: Sequence[Cell], waiting: Sequence[Cell]) -> bool:
    """Whether nothing that a cell takes from another is still to come from one that runs, or that comes before it."""
    if cell.of is not None:
        return not any(other.folder == cell.of for other in (*running, *waiting))
    before = list(waiting[: waiting.index(cell)]) if cell in waiting else []
    have = donor(cell, cells)[1]
    return not any(shared(cell, other) > have for other in (*running, *before) if other.calibrate is None)


def _wanted(own: Fate, retry: bool) -> bool:
    return own.state in ("waiting", "stopped") or own.state == "failed" and retry


def _blocked(cell: Cell, cells: Sequence[Cell], fates: dict[str, Fate], to_come: Sequence[Cell]) -> str:
    """Why a calibration cannot begin, now or later; or empty."""
    if cell.of is None:
        return ""
    base = next(one for one in cells if one.folder == cell.of)
    own = fates[base.name]
    if own.state == FINISHED or any(other is base for other in to_come):
        return ""
    return f"{base.name} has failed: {own.line}" if own.state == "failed" else f"{base.name} is not finished"


def unfinished(fates: dict[str, Fate]) -> list[str]:
    """Names of cells that have not finished."""
    return [name for name, own in fates.items() if own.state != FINISHED]


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM as an exception, so that cells are asked to stop."""

    def stop(_: int, __: FrameType | None) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
