"""What has become of a study's cells, read from disk: finished, running, stopped, failed or waiting.

Beside a run folder `seed-0` lies `seed-0.json`, written by the process that runs the cell (`work.py`): its command and
its sessions, one for every time that it was begun. How far a stage is, and what its steps took, is in the run's logs.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from tailfin.errors import UserError
from tailfin.files import read_object
from tailfin.report.runs import read_run
from tailfin.study.cells import Cell

State = Literal["finished", "running", "stopped", "failed", "waiting"]
FINISHED: Final = "finished"
STOPPED = (130, 143, 137, 124, -2, -9, -15)  # exit codes of a process that was ended from outside: it goes on
LAST = 4000  # characters of a log that are looked at for its last line


@dataclass(frozen=True)
class Fate:
    """What is known of a cell."""

    state: State
    line: str = ""  # the last line of one that failed
    done: int = 0  # optimiser steps so far, of all its stages
    seconds: float = 0.0  # that these steps took, those of stages from other cells included
    note: dict[str, Any] = field(default_factory=dict)


def fate(cell: Cell) -> Fate:
    """The state of a cell.

    Raises:
        UserError: it was begun by another command than the study has now.
    """
    note = read_object(cell.note) if cell.note.is_file() else {}
    if note and note.get("words") != list(cell.words):
        raise UserError(
            f"{cell.folder} was begun by another command (tailfin {' '.join(note.get('words', []))}): take another "
            f"--out, or delete {cell.folder} and {cell.note}"
        )
    done, seconds = progress(cell.folder)
    sessions = note.get("sessions") or []
    if not sessions:
        return Fate("waiting")
    last = sessions[-1]
    code = last.get("code")
    if code == 0 and (cell.folder / "metrics.json").is_file():
        return Fate(FINISHED, done=done, seconds=seconds, note=note)
    if code is None:
        return Fate("running" if _alive(last) else "stopped", done=done, seconds=seconds, note=note)
    if code in STOPPED:
        return Fate("stopped", done=done, seconds=seconds, note=note)
    return Fate("failed", last_line(cell.log) or f"exit code {code}", done, seconds, note)


def progress(folder: Path) -> tuple[int, float]:
    """Optimiser steps of a run folder so far, and the seconds that they took."""
    steps, seconds = 0, 0.0
    for path in sorted(folder.glob("stages/*/metrics.jsonl")):
        last = 0
        for text in path.read_text("utf-8", "replace").splitlines():
            try:
                line = json.loads(text)
            except ValueError:  # it is being written
                continue
            if isinstance(line, dict) and "loss" in line:
                last = max(last, int(line.get("iteration", 0)))
                seconds += float(line.get("seconds", 0.0))
        steps += last
    return steps, seconds


def stage_steps(folder: Path) -> dict[str, int]:
    """Optimiser steps by stage, as the logs of a finished run have them."""
    stages = {}
    for stage in read_run(folder).stages:
        iterations = stage.training.get("iteration")
        stages[stage.name] = int(iterations.max()) if iterations is not None and len(iterations) else 0
    return stages


def last_line(log: Path) -> str:
    """The last line of a cell's log that says something."""
    if not log.is_file():
        return ""
    lines = [line.strip() for line in log.read_text("utf-8", "replace")[-LAST:].splitlines()]
    told = [line for line in lines if line]
    errors = [line for line in told if line.startswith("error: ")]
    return (errors or told or [""])[-1]


def _alive(session: dict[str, Any]) -> bool:
    """Whether the process of a session is there; one of another machine is taken to be."""
    if session.get("host") != socket.gethostname():
        return True
    try:
        os.kill(int(session["pid"]), 0)
    except (OSError, ValueError, KeyError):
        return False
    return True
