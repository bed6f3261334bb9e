"""docs/performance.md from the short forms of the benchmarks: runs them one after another and takes what they print.

    make bench                                                # all, about a quarter of an hour on a free machine
    python benchmarks/performance.py --only detr_speed.py     # some; the lines of the others stay as they are

Each runs with one thread. Lines of four cells are those of the first table, lines of more cells those of the second;
`short_form.py` prints them. With TAILFIN_DATA photos and training files come from there, else from the demo set.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import resource
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
COMMANDS = (  # in the order of the page
    "training_speed.py",
    "training_speed.py --precision bf16 --channels-last --skip-memory --inference",
    "detector_speed.py --skip-memory",
    "detr_speed.py",
    "deformable_memory.py",
    "bacl_cost.py",
    "pretraining_speed.py",
    "step_profile.py",
    "predict_speed.py",
    "evaluation_speed.py",
    "index_speed.py",
    "input_speed.py",
    "views_speed.py",
    "selection_speed.py",
    "sampler_speed.py",
    "worker_memory.py",
    "scaling.py",
    "startup.py",
    "memory_estimate.py",
    "report_speed.py",
    "loss_speed.py",
)
HEAD = """# Speed and memory

Made by `make bench` (`python benchmarks/performance.py`) from what the short forms of the benchmarks print; nothing is
written by hand. One thread each; ours and the peer take turns in one process, a ratio is the median over the rounds,
with its range in brackets. Speeds are per CPU second, times CPU seconds, where nothing else is said: other work on the
machine moves these less. A ratio of speeds is ours over the peer's, as are all others. [results.md](results.md) has
longer runs and what follows from them; nothing was measured on a GPU.

| what | ours | peer | ratio | script |
|---|---|---|---|---|
"""
STEPS = """
What a training step would make an accelerator do, on the pretend device of `step_profile.py`: launches (operations that
do work; a list of tensors in one call is one), views, which launch nothing, reads back to the host, constants uploaded,
multiply-adds of matrix products and convolutions, bytes read and written. The aims at batch 16: half of torchvision's
launches, 8 reads back.

| recipe | stage | pictures | launches | views | reads back | uploads | multiply-adds | bytes | script |
|---|---|---|---|---|---|---|---|---|---|
"""
RUNS = """
| command (`python benchmarks/...`) | CPU seconds | date | machine |
|---|---|---|---|
"""
NOT_RUN = "not run"
CELLS = (4, 9, 3)  # of the lines of the three tables, without the last cell

Lines = dict[str, tuple[list[list[str]], list[list[str]], list[list[str]]]]  # by command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="SCRIPT", help="scripts, the whole command where there are two")
    options = parser.parse_args()
    kept = read(PAGE.read_text(encoding="utf-8")) if PAGE.is_file() else {}
    for command in COMMANDS:
        if options.only and command not in options.only and command.split()[0] not in options.only:
            continue
        print(f"python benchmarks/{command} --short", file=sys.stderr, flush=True)
        kept[command] = measured(command)
        PAGE.write_text(page(kept), encoding="utf-8")


def measured(command: str) -> tuple[list[list[str]], list[list[str]], list[list[str]]]:
    """Lines of the three tables of one script, run with one thread."""
    script, *more = command.split()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), "--short", *more],
        env={**os.environ, **threads}, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{command}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    rows = [cells(text) for text in done.stdout.splitlines() if text.startswith("| ")]
    about = [f"{seconds:.0f}", datetime.date.today().isoformat(), machine()]
    few, many = ([row for row in rows if len(row) == count] for count in CELLS[:2])
    if not few and not many:
        raise SystemExit(f"{command} printed no line for the page")
    return few, many, [about]


def page(found: Lines) -> str:
    """The whole page; every line ends with the command that it comes from."""
    tables: list[list[str]] = [[], [], []]
    for command in COMMANDS:
        for number, rows in enumerate(found.get(command, ())):
            shown = f"`{command}`"
            ordered = [[*row, shown] if number < 2 else [shown, *row] for row in rows]
            tables[number] += [f"| {' | '.join(row)} |\n" for row in ordered]
        if command not in found:
            tables[2].append(f"| `{command}` | {NOT_RUN} | | |\n")
    return "".join(part for head, rows in zip((HEAD, STEPS, RUNS), tables, strict=True) for part in (head, *rows))


def read(text: str) -> Lines:
    """What `page` has written."""
    found: Lines = {}
    for row in map(cells, text.splitlines()):
        for place, number in ((-1, 0), (-1, 1), (0, 2)):
            command = row[place].strip("`") if row else ""
            if command in COMMANDS and len(row) == CELLS[number] + 1 and row[1] != NOT_RUN:
                own = found.setdefault(command, ([], [], []))
                own[number].append(row[1:] if place == 0 else row[:-1])
    return found


def cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.strip().strip("|").split(" | ")] if text.startswith("| ") else []


def machine() -> str:
    """Processor, its cores, and torch."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = info.read_text().splitlines()
        model = next((own.partition(":")[2].strip() for own in lines if own.startswith("model name")), model)
    return f"{model}, {os.cpu_count()} cores, torch {torch.__version__}"


if __name__ == "__main__":
    main()
