"""How long does the order of one epoch take, and how much memory, from 10^5 to 10^7 pictures and 20,000 classes?

    python benchmarks/sampler_speed.py
    python benchmarks/sampler_speed.py --pictures 10000000 --policies plain rfs class_aware

Three annotations a picture, classes by 1 / rank. `order` is the batches of one epoch (`BatchPlan.epoch`, which every
process computes for itself), after what is the same for every epoch (`first`: pairs of class and picture, repeat
factors' counts). Seconds are of the processor, memory is the growth of the peak over that of the columns.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from tailfin.samplers import BatchPlan
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

CLASSES, PER_PICTURE = 20_000, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--policies", nargs="+", default=["plain", "rfs", "class_aware"])
    parser.add_argument("--one", nargs=2, metavar=("POLICY", "PICTURES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    table = Table(title=f"{CLASSES:,} classes, {PER_PICTURE} annotations a picture, batch 16")
    for column in ("sampler", "pictures", "first, s", "order, s", "peak, MB", "bytes a picture"):
        table.add_column(column, justify="left" if column == "sampler" else "right")
    for policy in options.policies:
        for pictures in options.pictures:
            command = [sys.executable, __file__, "--one", policy, str(pictures)]
            row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            peak = row["peak"]
            numbers = (f"{row['first']:.2f}", f"{row['order']:.2f}", f"{peak / 1e6:.0f}", f"{peak / pictures:.0f}")
            table.add_row(policy, f"{pictures:,}", *numbers)
    Console().print(table)


def measure(policy: str, pictures: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    chances = 1 / np.arange(1, CLASSES + 1)
    labels = rng.choice(CLASSES, PER_PICTURE * pictures, p=chances / chances.sum()).astype(np.int32)
    image_of = np.repeat(np.arange(pictures, dtype=np.int32), PER_PICTURE)
    counts = np.bincount(labels, minlength=CLASSES)
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=pictures)
    index: Any = Columns(labels, image_of, pictures)
    before = peak()
    start = time.process_time()
    plan = BatchPlan(index, np.arange(pictures), stats, Sampler(name=policy), 16, 1.0, seed=0)  # type: ignore[arg-type]
    plan.iterations  # noqa: B018, computed once and kept
    if policy == "class_aware":
        plan._pairs  # noqa: B018
    first = time.process_time()
    plan.epoch(0)
    end = time.process_time()
    return {"first": first - start, "order": end - first, "peak": peak() - before}


class Columns(SimpleNamespace):
    """What a plan reads of an index."""

    def __init__(self, labels: np.ndarray, image_of: np.ndarray, pictures: int) -> None:
        sides = np.resize(np.array([640, 480], np.int32), pictures)
        super().__init__(labels=labels, image_of=image_of, widths=sides, heights=sides[::-1], path="made")
        self.pictures = pictures

    def __len__(self) -> int:
        return self.pictures

    def clean(self) -> Any:
        return SimpleNamespace(rows=np.arange(len(self.labels)))


def peak() -> float:
    """Bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


if __name__ == "__main__":
    main()
