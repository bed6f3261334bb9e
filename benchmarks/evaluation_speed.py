"""How long does an LVIS-size evaluation take, from files to numbers, and in how much memory?

    python benchmarks/evaluation_speed.py                 # 2,000 images x 300 detections x 1,203 classes
    python benchmarks/evaluation_speed.py --images 500
    python benchmarks/evaluation_speed.py --short         # 200 images beside pycocotools, then LVIS val from shards
    python benchmarks/evaluation_speed.py --images 2000 5000 19809 --shards   # from what `train` writes, LVIS val

Makes synthetic annotations and results (seeded), then evaluates them in fresh processes: tailfin with the LVIS and the
COCO protocol, and pycocotools with the COCO protocol, on the same files. Prints a table with seconds, peak memory and
the ratio to pycocotools. Where both apply the same protocol the two AP must agree. With `--shards` the detections are
in the shards of `ResultWriter`, as inference leaves them, and tailfin alone reads them.
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

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table
from short_form import line, short

from tailfin.evaluation.results import ResultWriter

CLASSES, DETECTIONS = 1203, 300
RUNS = (("tailfin", "lvis"), ("tailfin", "coco"), ("pycocotools", "coco"))
PUBLISHED = (57.5, 2.34)  # seconds and GB of lvis-api, which does not run on numpy 2 without changes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[2000])
    parser.add_argument("--shards", action="store_true", help="detections in shards; tailfin alone")
    parser.add_argument("--repeat", type=int, default=3, help="runs of tailfin, of which the fastest counts")
    parser.add_argument("--skip-pycocotools", action="store_true")
    parser.add_argument("--one", nargs=4, metavar=("TOOL", "PROTOCOL", "GT", "RESULTS"), help=argparse.SUPPRESS)
    short(parser, images=[200], repeat=1)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    compare(options)
    if options.short:
        options.images, options.shards = [19_809], True
        compare(options)


def compare(options: argparse.Namespace) -> None:
    for images in options.images:
        with tempfile.TemporaryDirectory() as folder:
            annotations, results = synthesize(Path(folder), images, shards=options.shards)
            size = sum(path.stat().st_size for path in [results, *results.glob("*")] if path.is_file()) / 2**20
            print(
                f"{images:,} images x {DETECTIONS} detections x {CLASSES:,} classes, results {size:.0f} MiB, "
                f"{os.cpu_count()} CPU cores"
            )
            rows = []
            for tool, protocol in RUNS:
                if tool == "pycocotools" and (options.skip_pycocotools or options.shards):
                    continue
                repeat = options.repeat if tool == "tailfin" else 1
                found = [in_new_process(tool, protocol, annotations, results) for _ in range(repeat)]
                rows.append((tool, protocol, min(found, key=lambda row: row["seconds"])))
        report(rows, images)
        if options.short:
            peer = next((row for tool, _, row in rows if tool == "pycocotools"), None)
            for protocol, row in ((protocol, row) for tool, protocol, row in rows if tool == "tailfin"):
                where = "shards" if options.shards else "a results file"
                what = f"evaluation, {images:,} images x {DETECTIONS} of {CLASSES:,} classes, from {where}, {protocol}"
                ours, theirs = (
                    f"{own['processor']:.2f} CPU s, {own['gib']:.2f} GiB" if own else "" for own in (row, peer)
                )
                if peer is None or protocol != "coco":
                    line(what, ours)
                else:
                    line(what, ours, f"pycocotools {theirs}", f"{row['processor'] / peer['processor']:.3f}")


def synthesize(folder: Path, images: int, seed: int = 0, *, shards: bool = False) -> tuple[Path, Path]:
    """An annotation file with LVIS's fields and a results file, or a folder of shards: a third of the detections near
    an annotation."""
    rng = np.random.default_rng([seed, images])
    popularity = 1 / np.arange(1, CLASSES + 1) ** 0.8
    popularity = rng.permutation(popularity / popularity.sum())
    document = {"images": [], "annotations": [], "categories": []}
    document["categories"] = [
        {"id": c + 1, "name": f"class {c + 1}", "frequency": "rcf"[c % 3], "image_count": 10, "instance_count": 20}
        for c in range(CLASSES)
    ]
    detections: list[dict[str, Any]] = []
    writer = ResultWriter(folder / "results") if shards else None
    for image in range(images):
        judged = rng.choice(CLASSES, 12, replace=False, p=popularity) + 1
        present, absent = judged[:4], judged[4:]
        document["images"].append(
            {
                "id": image + 1,
                "width": 640,
                "height": 480,
                "neg_category_ids": absent.tolist(),
                "not_exhaustive_category_ids": present[:1].tolist() if image % 8 == 0 else [],
            }
        )
        corner, size = rng.random((12, 2)) * (440, 330), np.exp(rng.normal(4, 0.8, (12, 2))).clip(4, 150)
        truth = np.concatenate([corner, size], 1).round(2)
        classes = present[rng.integers(0, 4, 12)]
        document["annotations"] += [
            {"id": 12 * image + k + 1, "image_id": image + 1, "category_id": c, "bbox": box, "area": box[2] * box[3]}
            for k, (c, box) in enumerate(zip(classes.tolist(), truth.tolist(), strict=True))
        ]
        boxes = np.concatenate([rng.random((DETECTIONS, 2)) * (500, 400), rng.random((DETECTIONS, 2)) * 140 + 4], 1)
        labels = rng.choice(CLASSES, DETECTIONS, p=popularity) + 1
        near = rng.integers(0, 12, DETECTIONS // 3)
        boxes[: len(near)] = (truth[near] + rng.normal(0, 4, (len(near), 4))).clip(1)
        labels[: len(near)] = classes[near]
        scores = rng.random(DETECTIONS, dtype=np.float32).astype(np.float64)
        if writer is not None:
            writer.add(image + 1, boxes + np.pad(boxes[:, :2], ((0, 0), (2, 0))), scores, labels)
            continue
        detections += [
            {"image_id": image + 1, "category_id": c, "bbox": box, "score": score}
            for c, box, score in zip(labels.tolist(), boxes.round(2).tolist(), scores.tolist(), strict=True)
        ]
    paths = folder / "annotations.json", folder / ("results" if shards else "results.json")
    paths[0].write_bytes(msgspec.json.encode(document))
    if writer is not None:
        writer.close()
    else:
        paths[1].write_bytes(msgspec.json.encode(detections))
    return paths


def measure(tool: str, protocol: str, annotations: str, results: str) -> dict[str, float]:
    """Seconds from files to numbers (imports not counted) by the wall and of the processor, peak memory of the process
    in GiB, and AP."""
    begin = 0.0, 0.0
    if tool == "tailfin":
        from tailfin.evaluation import evaluate

        begin = time.perf_counter(), time.process_time()
        ap = evaluate(annotations, results, protocol)["bbox"]["AP"]
    else:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        sys.stdout, shown = sys.stderr, sys.stdout
        begin = time.perf_counter(), time.process_time()
        truth = COCO(annotations)
        for annotation in truth.dataset["annotations"]:
            annotation["iscrowd"] = 0
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        ap, sys.stdout = float(evaluation.stats[0]), shown
    seconds, processor = time.perf_counter() - begin[0], time.process_time() - begin[1]
    return {"seconds": seconds, "processor": processor, "gib": peak_bytes() / 2**30, "AP": ap}


def peak_bytes() -> int:
    """Highest resident memory of this process; Linux starts `ru_maxrss` at the parent's, so it is not used there."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_new_process(tool: str, protocol: str, annotations: Path, results: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", tool, protocol, str(annotations), str(results)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    return json.loads(output.strip().splitlines()[-1])


def report(rows: list[tuple[str, str, dict[str, float]]], images: int) -> None:
    peer = next((row for tool, _, row in rows if tool == "pycocotools"), None)
    table = Table(title="from files to numbers")
    for name in ("tool", "protocol", "seconds", "of the processor", "peak GiB", "times faster", "times smaller", "AP"):
        table.add_column(name, justify="left" if name in ("tool", "protocol") else "right")
    for tool, protocol, row in rows:
        ratios = ["-", "-"] if peer is None else [f"{peer[key] / row[key]:.1f}" for key in ("seconds", "gib")]
        table.add_row(
            tool,
            protocol,
            f"{row['seconds']:.2f}",
            f"{row['processor']:.2f}",
            f"{row['gib']:.2f}",
            *ratios,
            f"{row['AP']:.6f}",
        )
    console = Console(width=100)
    console.print(table)
    print("times faster and smaller: against pycocotools in this run")
    if images == 2000:
        print("lvis-api at this size, published, not measured here: {:.1f} s, {:.2f} GB".format(*PUBLISHED))
    same = [row["AP"] for _, protocol, row in rows if protocol == "coco"]
    if len(same) == 2:
        print(f"AP of the two COCO evaluations differs by {abs(same[0] - same[1]):.1e}")


if __name__ == "__main__":
    main()
