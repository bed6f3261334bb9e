"""One cell, run by the process that an executor gives it: begun, or gone on with where it was stopped.

A cell is what `tailfin` does on the command line, in processes of its own: `train`; or `calibrate`, and then `train`
with what was found on the stages of the trained cell.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from tailfin.checkpoint import load_model_file
from tailfin.files import read_object, write_json
from tailfin.provenance import now

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know of a cell; plain values, for other machines."""

    words: tuple[str, ...]
    files: tuple[str, ...]
    folder: str
    note: str
    log: str
    threads: int
    launcher: tuple[str, ...] = ()  # in the place of this Python
    reuse: str = ""  # a run whose stages are taken
    of: tuple[str, ...] = ()  # of a calibration: words and files of the trained cell, whose folder `reuse` is
    train: str = ""  # and the annotations that it is searched on


RUNNING: set[subprocess.Popen[bytes]] = set()  # of this process, for `stop`


def run_job(job: Job) -> int:
    """Run a cell to its end, whatever that is; returns the exit code, which the note beside the folder has too."""
    note, folder = Path(job.note), Path(job.folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    facts: dict[str, Any] = read_object(note) if note.is_file() else {"words": list(job.words), "sessions": []}
    session: dict[str, Any] = {"started": now(), "host": socket.gethostname(), "pid": os.getpid(), "code": None}
    facts["sessions"].append(session)
    write_json(note, facts, indent=1)
    start = time.monotonic()
    try:
        with Path(job.log).open("a", encoding="utf-8") as log:
            code = _calibrated(job, log) if job.of else _trained(job, log)
    except Exception as error:
        with Path(job.log).open("a", encoding="utf-8") as log:
            log.write(f"error: {type(error).__name__}: {error}\n")
        code = 1
    session.update(code=code, seconds=round(time.monotonic() - start, 1))
    write_json(note, facts, indent=1)
    return code


def stop() -> None:
    """Ask the cells of this process to stop: they write resume points."""
    for process in list(RUNNING):
        process.send_signal(signal.SIGTERM)


def _trained(job: Job, log: TextIO) -> int:
    """Train, or go on with what is there."""
    if (Path(job.folder) / "recipe.yaml").is_file():
        return tailfin(job, log, ["train", "--resume", job.folder])
    reuse = ["--reuse", job.reuse] if job.reuse else []
    return tailfin(job, log, [*job.words, *job.files, "--out", job.folder, *reuse])


def _calibrated(job: Job, log: TextIO) -> int:
    """Calibrate the trained cell, then measure its weights with what was found, in a run folder of its own."""
    if (Path(job.folder) / "recipe.yaml").is_file():
        return tailfin(job, log, ["train", "--resume", job.folder])
    model = Path(job.folder).with_suffix(".calibrated.safetensors")
    calibrate = ["calibrate", str(Path(job.reuse) / "model.safetensors"), "--out", str(model), "--overwrite"]
    options = list(job.words[2:])
    if code := tailfin(job, log, [*calibrate, "--train", job.train, *options]):
        return code
    found = load_model_file(model).recipe.calibration
    values = None if found is None else found.model_dump(mode="json")
    model.unlink()
    return tailfin(job, log, [*job.of, f"calibration={json.dumps(values)}", "--out", job.folder, "--reuse", job.reuse])


def tailfin(job: Job, log: TextIO, arguments: list[str]) -> int:
    """The exit code of a `tailfin` command."""
    command = [*(job.launcher or (sys.executable,)), "-m", "tailfin", *arguments]
    log.write(f"$ {shlex.join(command)}\n")
    log.flush()
    environment = {**os.environ, **dict.fromkeys(THREADS, str(job.threads))}
    with subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT) as process:
        RUNNING.add(process)
        try:
            return process.wait()
        finally:
            RUNNING.discard(process)
