"""What does a loader's worker keep for itself, and the process that trains, as the number of pictures grows?

    python benchmarks/worker_memory.py                             # 10^4, 10^5, 10^6 and 10^7 pictures; 3 GB of disk
    python benchmarks/worker_memory.py --pictures 10000 --sampler class_aware
    python benchmarks/worker_memory.py --short                     # up to 10^6

Annotation files are made with one object a picture, of 1,000 classes with a long tail; every picture is the same file.
In a process of its own for each size the index is opened, as `tailfin train` opens it, and one worker reads batches of
the plan. "first open" is the time and the highest memory of the process that parses the file; the others read the
stored index. A process's own memory are the pages that it has written and shares with nobody (Private_Dirty in
/proc/PID/smaps_rollup: Linux alone); those of the index are the file system's, for all.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from short_form import line, short

SIDE, CLASSES, BATCH, BATCHES = 64, 1000, 16, 80
PART = 100_000  # pictures that are written at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, nargs="+", default=[10**power for power in range(4, 8)])
    parser.add_argument("--sampler", default="rfs")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    short(parser, pictures=[10**power for power in range(4, 7)])
    options = parser.parse_args()
    if options.measure:
        measure(*options.measure.split(",", 1), options.sampler)
        return
    table = Table(title=f"one worker, sampler {options.sampler}, MB")
    for name in ("pictures", "file", "first open, CPU s", "first open, peak", "worker", "process that trains"):
        table.add_column(name, justify="right")
    for count in options.pictures:
        with tempfile.TemporaryDirectory() as folder:
            Image.new("RGB", (SIDE, SIDE), (90, 120, 150)).save(Path(folder) / "picture.png")
            path = Path(folder) / "train.json"
            write_file(path, count)
            first, second = (run(what, path, options.sampler) for what in ("open", "train"))
            size = path.stat().st_size / 1e6
        numbers = (size, first["seconds"], first["peak"], second["worker"], second["own"])
        table.add_row(f"{count:,}", *(f"{number:,.1f}" for number in numbers))
        if options.short:
            what = f"a loader's worker, {count:,} pictures, {options.sampler}: memory of its own"
            line(what, f"{second['worker']:.0f} MB", f"the process that trains {second['own']:.0f} MB")
    Console(width=110).print(table)


def write_file(path: Path, count: int) -> None:
    """Pictures with an object each; class c is drawn with a chance of 1 / (c + 1)."""
    chance = 1 / np.arange(1, CLASSES + 1)
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write('{"categories": ')
        json.dump([{"id": number, "name": f"class {number}"} for number in range(1, CLASSES + 1)], file)
        file.write(', "images": [')
        for start in range(0, count, PART):
            ids = range(start + 1, min(start + PART, count) + 1)
            own = (f'{{"id":{i},"file_name":"picture.png","width":{SIDE},"height":{SIDE}}}' for i in ids)
            file.write(("," if start else "") + ",".join(own))
        file.write('], "annotations": [')
        for start in range(0, count, PART):
            ids = range(start + 1, min(start + PART, count) + 1)
            classes = rng.choice(CLASSES, size=len(ids), p=chance / chance.sum()) + 1
            own = (
                f'{{"id":{i},"image_id":{i},"category_id":{c},"bbox":[8,8,40,40],"area":1600,"iscrowd":0}}'
                for i, c in zip(ids, classes.tolist(), strict=True)
            )
            file.write(("," if start else "") + ",".join(own))
        file.write("]}")


def run(what: str, path: Path, sampler: str) -> dict[str, float]:
    environment = {**os.environ, "TAILFIN_CACHE": str(path.parent / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--measure", f"{what},{path}", "--sampler", sampler]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command)}: {found.stderr[-1500:]}")
    return json.loads(found.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def measure(what: str, path: str, name: str) -> None:
    import torch

    from tailfin.data.dataset import TrainingDataset, open_source, training_loader
    from tailfin.data.index import open_index
    from tailfin.samplers.plan import BatchPlan
    from tailfin.schema.data import Data, DataFiles
    from tailfin.schema.training import Sampler
    from tailfin.stats import ClassStats

    torch.set_num_threads(1)
    if what == "open":
        before, start = resident("VmRSS"), time.process_time()
        open_index(path)
        print(json.dumps({"seconds": time.process_time() - start, "peak": resident("VmHWM") - before}))
        return
    source = open_source(DataFiles(annotations=path), "", "train")
    dataset = TrainingDataset(source, Data(sizes=(SIDE,), workers=1), 0)
    stats = ClassStats.from_index(source.index)
    plan = BatchPlan(source.index, dataset.rows(), stats, Sampler(name=name), BATCH, 1.0, 0)  # type: ignore[arg-type]
    batches = training_loader(dataset, plan, start=0, rank=0, processes=1, accumulation=1)
    for _ in range(BATCHES):
        next(batches)
    (worker,) = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    print(json.dumps({"worker": private(worker), "own": private("self")}))
    batches.close()


def resident(what: str) -> float:
    """MB of this process, by the name of a line of its status."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) for row in rows if row.startswith(what)) / 1e3


def private(process: str) -> float:
    """MB of pages that a process has written and shares with none; clean ones are the file system's cache."""
    rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith("Private_Dirty")) / 1e3


if __name__ == "__main__":
    main()
