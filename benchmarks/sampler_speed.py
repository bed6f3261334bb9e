"""How long does the order of an epoch take, and how much memory, from 10^5 to 10^7 pictures and 20,000 classes?

    python benchmarks/sampler_speed.py
    python benchmarks/sampler_speed.py --short                # 10^7 alone
    python benchmarks/sampler_speed.py --pictures 10000000 --policies plain rfs class_aware

Three annotations a picture, classes by 1 / rank. `once` is what is the same for every epoch (repeat factors and their
counts, pairs of class and picture), `epoch` what every process does when one begins (`BatchPlan.order`), `a picture`
what it then takes to look up each picture of a process's own share, as it is shown. Seconds are of the processor;
memory is what a plan keeps and the most it allocates, without the list of pictures (8 bytes each) and the columns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import tracemalloc
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from short_form import line, short

from tailfin.samplers.plan import AHEAD, BatchPlan
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

CLASSES, PER_PICTURE, BATCH, PROCESSES = 20_000, 3, 64, 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--policies", nargs="+", default=["plain", "rfs", "class_aware"])
    parser.add_argument("--one", nargs=2, metavar=("POLICY", "PICTURES"), help=argparse.SUPPRESS)
    short(parser, pictures=[10_000_000])
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    table = Table(title=f"{CLASSES:,} classes, {PER_PICTURE} annotations a picture, batch {BATCH}")
    for column in ("sampler", "pictures", "entries", "once, s", "epoch, s", "a picture, us", "kept, MB", "peak, MB"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for policy in options.policies:
        for pictures in options.pictures:
            command = [sys.executable, __file__, "--one", policy, str(pictures)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            numbers = (f"{row['once']:.2f}", f"{row['epoch']:.2f}", f"{1e6 * row['picture']:.2f}")
            memory = (f"{row['kept'] / 1e6:.0f}", f"{row['peak'] / 1e6:.0f}")
            if options.short:
                what = f"order of an epoch, `{policy}`, {pictures:,} pictures, {CLASSES:,} classes"
                line(what, f"{numbers[1]} CPU s as it begins, {numbers[2]} us a picture, {memory[0]} MB kept")
            table.add_row(policy, f"{pictures:,}", f"{row['entries']:,}", *numbers, *memory)
    Console(width=120).print(table)


def measure(policy: str, pictures: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    chances = 1 / np.arange(1, CLASSES + 1)
    labels = rng.choice(CLASSES, PER_PICTURE * pictures, p=chances / chances.sum()).astype(np.int32)
    image_of = np.repeat(np.arange(pictures, dtype=np.int32), PER_PICTURE)
    counts = np.bincount(labels, minlength=CLASSES)
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=pictures)
    index: Any = Columns(labels, image_of, pictures)
    rows = np.arange(pictures)

    def planned() -> tuple[BatchPlan, Any, list[float]]:
        times = [time.process_time()]
        plan = BatchPlan(index, rows, stats, Sampler(name=policy), BATCH, 1.0, seed=0)  # type: ignore[arg-type]
        plan.iterations  # noqa: B018, computed once and kept
        if policy == "class_aware":
            plan._pairs  # noqa: B018
        times.append(time.process_time())
        order = plan.order(0)
        times.append(time.process_time())
        return plan, order, times

    plan, order, times = planned()
    batches, columns = np.arange(min(20_000, plan.iterations)), np.arange(BATCH // PROCESSES)
    start = time.process_time()
    for first in range(0, len(batches), AHEAD // len(columns)):
        order.read(batches[first : first + AHEAD // len(columns)], columns)
    picture = (time.process_time() - start) / len(batches) / len(columns)
    entries = plan.iterations * BATCH
    del plan, order
    tracemalloc.start()
    held = planned()
    kept, peak = tracemalloc.get_traced_memory()
    del held
    numbers = {"once": times[1] - times[0], "epoch": times[2] - times[1], "picture": picture}
    return {**numbers, "entries": entries, "kept": kept, "peak": peak}


class Columns(SimpleNamespace):
    """What a plan reads of an index."""

    def __init__(self, labels: np.ndarray, image_of: np.ndarray, pictures: int) -> None:
        sides = np.resize(np.array([640, 480], np.int32), pictures)
        super().__init__(labels=labels, image_of=image_of, widths=sides, heights=sides[::-1], path="made")
        self.pictures = pictures
        self.trained = SimpleNamespace(rows=np.arange(len(labels)))

    def __len__(self) -> int:
        return self.pictures

    def clean(self) -> Any:
        return self.trained


if __name__ == "__main__":
    main()
