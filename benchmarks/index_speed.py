"""How long opening an annotation file takes: `json.load` against the first open and the reopen of tailfin's index.

    python benchmarks/index_speed.py            # a quarter of LVIS train: 318,000 annotations
    python benchmarks/index_speed.py --short    # a tenth
    python benchmarks/index_speed.py --full     # LVIS train: 100,170 images, 1,270,141 annotations, about 360 MB

Every figure is taken in a fresh process: time of the one call (by the wall; CPU seconds with `--short`), and growth of
the resident memory (the highest value during the call for `json.load` and the first open, the value after the call
for the reopen). The file is made from a seed, with polygons, and its folder is removed at the end unless `--keep
FOLDER` names one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from short_form import line, short

FULL = (100_170, 1_270_141, 1203)  # images, annotations and categories of LVIS v1 train

MEASURE = """
import json, os, resource, sys, time
from pathlib import Path
def now_mb():
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    except OSError:
        return float("nan")
def peak_mb():
    try:  # Linux starts ru_maxrss at the parent's peak
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
what, path = sys.argv[1:]
if what == "json.load":
    call = lambda: json.load(open(path))
else:
    from tailfin.data.index import open_index
    call = lambda: open_index(path)
before = now_mb()
start, own = time.perf_counter(), time.process_time()
kept = call()
seconds, processor = time.perf_counter() - start, time.process_time() - own
if what == "segmentations":
    start, own = time.perf_counter(), time.process_time()
    parts = kept.segmentations()
    seconds, processor = time.perf_counter() - start, time.process_time() - own
print(json.dumps({"seconds": seconds, "processor": processor, "peak": peak_mb() - before, "after": now_mb() - before}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the size of LVIS train")
    parser.add_argument("--scale", type=float, default=0.25, help="share of that size (default: 0.25)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the file, kept and reused")
    short(parser, scale=0.1)
    options = parser.parse_args()
    scale = 1.0 if options.full else options.scale
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"lvis_size_{scale:g}_{options.seed}.json"
        if not path.exists():
            write_file(path, *(max(1, round(size * scale)) for size in FULL[:2]), FULL[2], options.seed)
        environment = {**os.environ, "TAILFIN_CACHE": str(Path(scratch) / "cache")}
        path.read_bytes()  # the file system's cache is warm for all
        rows = [
            (name, measure(what, path, environment), memory)
            for name, what, memory in (
                ("json.load", "json.load", "peak"),
                ("open_index, first", "first", "peak"),
                ("open_index, again", "again", "after"),
                ("segmentations, first", "segmentations", "peak"),
                ("segmentations, again", "segmentations", "after"),
            )
        ]
        base = rows[0][1]["seconds"]
        print(f"{path.stat().st_size / 1e6:.0f} MB, {round(FULL[1] * scale):,} annotations, seed {options.seed}")
        print(f"{'':22}{'seconds':>10}{'of json.load':>14}{'memory MB':>11}")
        for name, row, memory in rows:
            print(f"{name:22}{row['seconds']:10.4f}{row['seconds'] / base:14.4f}{row[memory]:11.0f}")
        if options.short:
            (_, peer, _), *rest = rows
            theirs = f"json.load {peer['processor']:.2f} CPU s, {peer['peak']:.0f} MB"
            for name, row, memory in rest:
                ours = f"{row['processor']:.4f} CPU s, {row[memory]:.0f} MB"
                ratio = f"{row['processor'] / peer['processor']:.4f}"
                line(f"annotation file, {round(FULL[1] * scale):,} annotations: {name}", ours, theirs, ratio)


def measure(what: str, path: Path, environment: dict[str, str]) -> dict[str, float]:
    """Seconds and memory of one call in a fresh process."""
    command = [sys.executable, "-c", MEASURE, what, str(path)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def write_file(path: Path, images: int, annotations: int, classes: int, seed: int) -> None:
    """A seeded file with LVIS's fields: Zipf-like class counts and polygons of 4 to 20 points."""
    rng = np.random.default_rng([seed, images, annotations])
    weights = 1.0 / np.arange(1, classes + 1)
    labels = rng.choice(classes, annotations, p=weights / weights.sum()) + 1
    owners = rng.integers(1, images + 1, annotations)
    with path.open("w") as file:
        file.write('{"info": {"description": "synthetic, LVIS size"}, "categories": ')
        categories = [
            {"id": i, "name": f"class_{i}", "synset": f"class_{i}.n.01", "synonyms": [f"class {i}"], "frequency": "f"}
            for i in range(1, classes + 1)
        ]
        json.dump(categories, file)
        file.write(', "images": [')
        for i in range(1, images + 1):
            image = {
                "id": i,
                "width": 640,
                "height": 480,
                "coco_url": f"http://images.cocodataset.org/train2017/{i:012d}.jpg",
                "neg_category_ids": (rng.integers(1, classes + 1, 5)).tolist(),
                "not_exhaustive_category_ids": [],
                "license": 1,
            }
            file.write(("," if i > 1 else "") + json.dumps(image))
        file.write('], "annotations": [')
        for i in range(annotations):
            points = int(rng.integers(4, 21))
            x, y, width, height = rng.uniform((0, 0, 2, 2), (440, 280, 200, 200)).round(2).tolist()
            angles = np.sort(rng.uniform(0, 2 * np.pi, points))
            outline = np.stack([x + width / 2 * (1 + np.cos(angles)), y + height / 2 * (1 + np.sin(angles))], 1)
            annotation = {
                "id": i + 1,
                "image_id": int(owners[i]),
                "category_id": int(labels[i]),
                "bbox": [x, y, width, height],
                "area": round(width * height * 0.78, 2),
                "segmentation": [outline.round(2).ravel().tolist()],
            }
            file.write(("," if i else "") + json.dumps(annotation))
        file.write("]}")


if __name__ == "__main__":
    main()
