"""What the selection of exemplars costs: pictures/s of scoring every annotation against plain inference.

    python benchmarks/selection_speed.py                                        # the embedded synthetic set
    python benchmarks/selection_speed.py --short                                # the same, 40 pictures, CPU seconds
    python benchmarks/selection_speed.py --train DATA/fod31-lt/train.json
    python benchmarks/selection_speed.py --model RUN --train DATA/train.json --pictures 1000
    python benchmarks/selection_speed.py --recipe fod/faster_rcnn_r18_softmax --train DATA/fod31-lt/train.json

Both are what a run of step-wise learning does: pictures from the loader, the detector, and the files that are written.
Scoring matches queries (or proposals) with the annotations in the place of making detections of them. The two take
turns over the same pictures (A B, B A, ...), so that a machine that slows down slows both; the ratio is the median of
the rounds' ratios. Weights are random without `--model`, which matters little for Deformable DETR; Faster R-CNN's
random scores make its NMS slower than trained ones do. Target: at least 0.9 of inference.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from short_form import line, short
from torch import nn

from tailfin.api import load
from tailfin.config import load_recipe
from tailfin.data.dataset import Source
from tailfin.data.index import image_folder, open_index
from tailfin.data.smooth_tail import write_subset
from tailfin.data.synth import demo_set
from tailfin.exemplar_scores import read_scores, score_annotations
from tailfin.inference import infer
from tailfin.models import build_detector
from tailfin.processes import new_accelerator
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats


def main() -> None:
    """Print pictures per second of both, and their ratio."""
    options = parse()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = options.train or demo_set(folder / "data")[0]
        source = part_of(train, options.images, options.pictures, folder / "part.json")
        model, recipe = detector(options, ClassStats.from_index(source.index))
        accelerator = new_accelerator("no", cpu=options.device == "cpu")
        torch.set_num_threads(options.threads)
        model.to(accelerator.device).eval()
        data = recipe.data.model_copy(update={"workers": options.workers})
        names, count = source.index.names, len(source.index)

        def inference(out: Path) -> None:
            infer(model, source, data, out, names, accelerator=accelerator, batch=options.batch)

        def selection(out: Path) -> None:
            score_annotations(
                model, source, data, out, accelerator=accelerator, batch=options.batch, score=options.score
            )

        clock = time.process_time if options.cpu_time else time.perf_counter
        jobs = {"inference": inference, "selection": selection}
        for kind, job in jobs.items():
            seconds_of(job, folder / f"{kind}-warm", clock)
        read_scores(folder / "selection-warm", len(source.index.clean().rows))  # every annotation has its score
        rounds = []
        for number in range(options.rounds):
            order = list(jobs)[:: 1 if number % 2 else -1]
            rounds.append({kind: seconds_of(jobs[kind], folder / f"{kind}-{number}", clock) for kind in order})
    table = Table("", "pictures/s", "of inference", title=f"{train}: {count} pictures, {recipe.name}")
    rates = {}
    for kind in jobs:
        rate = statistics.median(count / row[kind] for row in rounds)
        ratio = statistics.median(row["inference"] / row[kind] for row in rounds)
        table.add_row(kind, f"{rate:.1f}", f"{ratio:.2f}")
        rates[kind] = rate
    if options.short:
        ours, theirs = (f"{rates[kind]:.1f} pictures per CPU s" for kind in ("selection", "inference"))
        line(f"scores of all objects for exemplars, {recipe.name}", ours, f"plain inference {theirs}", f"{ratio:.2f}")
    Console(width=120).print(table)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="annotation file")
    parser.add_argument("--images", type=Path, help="folder of its pictures")
    parser.add_argument("--model", type=Path, help="run or model file; else --recipe with random weights")
    parser.add_argument("--recipe", default="fod/deformable_detr_tiny")
    parser.add_argument("--score", choices=("max", "gt_class"), default="max")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for a machine with other work")
    short(parser, pictures=40, rounds=3, cpu_time=True)
    options = parser.parse_args()
    if options.cpu_time and options.workers:
        parser.error("--cpu-time does not see the loader's workers: --workers 0")
    return options


def part_of(train: Path, images: Path | None, pictures: int, path: Path) -> Source:
    """`pictures` annotated pictures of a set, evenly spread over it, all with the same folder."""
    index = open_index(train)
    rows = np.flatnonzero(np.diff(index.clean().offsets))
    rows = rows[np.linspace(0, len(rows) - 1, min(pictures, len(rows))).astype(int)]
    write_subset(path, index, np.isin(index.image_of, rows))
    return Source(open_index(path), image_folder(train, images))


def detector(options: argparse.Namespace, stats: ClassStats) -> tuple[nn.Module, Recipe]:
    """The trained model, or the recipe's with random weights."""
    if options.model is not None:
        found = load(options.model, "cpu")
        return found.model, found.recipe
    recipe = load_recipe(options.recipe, {"weights": "none"})
    torch.manual_seed(0)
    return build_detector(recipe, stats)[0], recipe


def seconds_of(job: Callable[[Path], None], out: Path, clock: Callable[[], float]) -> float:
    """Seconds of one pass over all pictures."""
    began = clock()
    job(out)
    return clock() - began


if __name__ == "__main__":
    main()
