"""What grows with the number of classes and of processes, at two smaller sizes and at the one that is claimed?

python benchmarks/scaling.py                              # 1,203, 5,000 and 20,000 classes; 1 and 2 processes
python benchmarks/scaling.py --classes 1203 5000 --processes 1 2 4
python benchmarks/scaling.py --parts losses
python benchmarks/scaling.py --short                      # processes alone: 1, 2 and 4

classifier  the linear classifier of 1,024 features on 1,024 rows (two pictures): its weights with gradient and
            momentum, its rows' logits with gradient, and what a resume point grows by
losses      statistics of each loss that keeps some: bytes in the model, bytes that a process sends in a step
processes   a small training (demo set, 96 px, 16 pictures a process, gloo): pictures per second by the wall, and CPU
            seconds of all processes per picture, from a long and a short run, so that the start does not count
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from short_form import line, short
from torch import Tensor

from tailfin.losses import LOSSES, build
from tailfin.stats import ClassStats

FEATURES, ROWS = 1024, 1024
PARTS = ("classifier", "losses", "processes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1203, 5000, 20_000])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    short(parser, processes=[1, 2, 4], parts=["processes"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        Console(width=110).print({"classifier": classifier, "losses": losses, "processes": processes}[part](options))


def classifier(options: argparse.Namespace) -> Table:
    table = Table(title=f"{FEATURES} features, {ROWS} rows, float32, MB")
    for name in ("classes", "weights, gradient, momentum", "logits, gradient", "resume point", "step, s"):
        table.add_column(name, justify="right")
    for count in options.classes:
        layer = torch.nn.Linear(FEATURES, count + 1)
        loss = build("softmax", statistics(count))
        optimizer = torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)
        rows, labels = torch.randn(ROWS, FEATURES), torch.randint(count + 1, (ROWS,))
        times = []
        for _ in range(3):
            start = time.process_time()
            optimizer.zero_grad()
            loss.loss(layer(rows), labels).backward()
            optimizer.step()
            times.append(time.process_time() - start)
        weights = sum(own.numel() * own.element_size() for own in layer.parameters())
        logits = ROWS * (count + 1) * 4
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "state"
            torch.save({"model": layer.state_dict(), "optimizer": optimizer.state_dict()}, file)
            stored = file.stat().st_size
        numbers = (3 * weights / 1e6, 2 * logits / 1e6, stored / 1e6)
        table.add_row(f"{count:,}", *(f"{number:.0f}" for number in numbers), f"{min(times):.2f}")
    return table


def losses(options: argparse.Namespace) -> Table:
    table = Table(title="statistics of losses: MB in the model / MB that a process sends in a step")
    table.add_column("loss")
    for count in options.classes:
        table.add_column(f"{count:,} classes", justify="right")
    for name in LOSSES:
        cells = [cell(name, count) for count in options.classes]
        if any(cells):
            table.add_row(name, *(f"{kept / 1e6:.2f} / {sent / 1e6:.2f}" for kept, sent in cells if kept or sent))
    return table


def cell(name: str, count: int) -> tuple[int, int] | None:
    """Bytes of a loss's stored buffers, and of what it hands to the collectives in one step; none where it has none."""
    loss = build(name, statistics(count)).train()
    kept = sum(own.numel() * own.element_size() for own in loss.state_dict().values())
    sent: list[int] = []

    def noted(*values: Tensor) -> tuple[Tensor, ...]:
        sent.append(sum(value.numel() * value.element_size() for value in values))
        return values

    module: Any = sys.modules[type(loss).__module__]
    before = {key: getattr(module, key) for key in ("sum_over_ranks", "gather_over_ranks") if hasattr(module, key)}
    for key in before:
        setattr(module, key, noted)
    try:
        labels = torch.cat([torch.arange(64) % count, torch.full((64,), count)])
        loss.loss(torch.zeros(128, loss.num_logits, requires_grad=True), labels).sum().backward()
    finally:
        for key, value in before.items():
            setattr(module, key, value)
    return (kept, sum(sent)) if kept or sent else None


def statistics(count: int) -> ClassStats:
    images = np.maximum(1, 10_000 // np.arange(1, count + 1))
    return ClassStats(image_count=images, instance_count=2 * images, num_images=int(images.sum()))


def processes(options: argparse.Namespace) -> Table:
    cores = len(os.sched_getaffinity(0))
    table = Table(title=f"weak scaling, 16 pictures of 96 px a process, one thread each, {cores} cores")
    for name in ("processes", "pictures per second", "of one alone", "CPU ms a picture", "of one alone"):
        table.add_column(name, justify="right")
    first: tuple[float, float] | None = None
    for number in options.processes:
        speed, work = trained(number)
        first = first or (speed / number, work)
        cells = (f"{speed:.1f}", f"{speed / number / first[0]:.2f}", f"{1000 * work:.1f}", f"{work / first[1]:.2f}")
        table.add_row(str(number), *cells)
        if options.short:
            crowded = f" on {cores} cores" if number > cores else ""
            what = f"training of {number} process{'es' if number > 1 else ''}{crowded}, 16 x 96 px each"
            base = "" if number == 1 else f"one process {1000 * first[1]:.1f} CPU ms a picture"
            line(what, f"{cells[2]} CPU ms a picture, {cells[0]} pictures/s", base, cells[3] if base else "")
    return table


def trained(number: int) -> tuple[float, float]:
    """(pictures per second by the wall of the middle of a short training, CPU seconds of all processes per picture)."""
    with tempfile.TemporaryDirectory() as folder:
        data, seconds, steps, speeds = Path(folder) / "data", [], [], []
        run([sys.executable, "-m", "tailfin", "data", "synth", str(data), "--images", "400", "--val-images", "20"])
        for epochs in (0.6 * number, 0.1 * number):
            out = Path(folder) / f"run{len(steps)}"
            port = f"--master_port={29611 + number}"
            launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}", port]
            start = [*launcher, "-m", "tailfin"] if number > 1 else [sys.executable, "-m", "tailfin"]
            changes = [
                f"schedule.batch={16 * number}",
                f"schedule.epochs={epochs}",
                "data.sizes=[96]",
                "data.workers=0",
            ]
            changes += [f"data.root={data}", "logging.every=1", "schedule.warmup=5", "evaluation.every=0"]
            before = children()
            run([*start, "train", "demo/faster_rcnn_r18_softmax", *changes, "--out", str(out)])
            seconds.append(children() - before)
            lines = [json.loads(line) for line in next(out.glob("stages/*/metrics.jsonl")).read_text().splitlines()]
            steps.append(max(line["iteration"] for line in lines))
            speeds.append([line["images_per_second"] for line in lines if "images_per_second" in line])
        work = (seconds[0] - seconds[1]) / (steps[0] - steps[1]) / (16 * number)
        return float(np.median(speeds[0][len(speeds[0]) // 4 :])), work


def children() -> float:
    """CPU seconds of the processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command)}: {found.stdout[-500:]}{found.stderr[-1500:]}")


if __name__ == "__main__":
    main()
