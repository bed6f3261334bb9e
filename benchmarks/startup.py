"""How long until `tailfin` answers, and until a training has made its first step?

    python benchmarks/startup.py                 # five starts of `tailfin --help`, three of a training on the demo set
    python benchmarks/startup.py --short

Seconds from the start of the process by the wall, and of the processor in that process: of `tailfin --help` until
it ends, of `tailfin train` until the first line of its log, the index of the annotation files cached. The least of
the starts counts. Targets: 0.3 s, 5 s.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from short_form import line, short

from tailfin.data.index import open_index
from tailfin.data.synth import demo_set

RECIPE = "demo/faster_rcnn_r18_softmax"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, nargs=2, default=[5, 3], metavar=("HELP", "TRAIN"))
    short(parser, starts=[5, 2])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["TAILFIN_CACHE"] = str(folder / "cache")
        files = demo_set(folder / "data")
        for file in files:
            open_index(file)
        command = [sys.executable, "-m", "tailfin"]
        starts = [until([*command, "--help"], lambda: False) for _ in range(options.starts[0])]
        rows.append(("tailfin --help", starts, 0.3))
        starts = []
        for number in range(options.starts[1]):
            run = folder / f"run{number}"
            train = [*command, "train", RECIPE, f"data.root={folder / 'data'}", "logging.every=1", "--out", str(run)]
            starts.append(until(train, lambda run=run: any(file.stat().st_size for file in logs(run))))
        rows.append(("first step of a training, index cached, demo set", starts, 5.0))
    table = Table(title="seconds, the least of some starts")
    for column in ("", "by the wall", "of the processor", "target"):
        table.add_column(column, justify="left" if column == "" else "right")
    for what, found, target in rows:
        wall, processor = (min(own[place] for own in found) for place in (0, 1))
        table.add_row(what, f"{wall:.2f}", f"{processor:.2f}", f"{target:g}")
        if options.short:
            line(f"`{what}`" if what.startswith("tailfin") else what, f"{wall:.2f} s, {processor:.2f} CPU s")
    Console().print(table)


def logs(run: Path) -> list[Path]:
    return list(run.glob("stages/*/metrics.jsonl"))


def until(command: list[str], done: Callable[[], bool]) -> tuple[float, float]:
    """(by the wall, of the processor) seconds until `done`, or the end; the process and its children are then ended."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    ended, stopped, wall = 0, False, 0.0
    while not ended:
        ended, status, used = os.wait4(process.pid, 0 if stopped else os.WNOHANG)
        wall = wall if stopped else time.perf_counter() - began
        if not ended and done():
            os.killpg(process.pid, signal.SIGKILL)
            stopped = True
        elif not ended:
            time.sleep(0.005)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode and not stopped:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return wall, used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
