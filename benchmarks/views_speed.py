"""How fast pairs of views come from the loader: pictures/s against the plain loader, and where the time goes.

    python benchmarks/views_speed.py                                       # the embedded synthetic set
    python benchmarks/views_speed.py --short                               # the same without workers, CPU seconds
    python benchmarks/views_speed.py --train DATA/coco-sample/train.json --size 640 672 704 736 768 800
    python benchmarks/views_speed.py --train DATA/fod31-lt/train.json --size 128 --need fod/drcl_r18

A picture of a pair counts once, so "plain" and "pairs" are both pictures that reach the training step per second.
`--need RECIPE` also times the recipe's pre-training step on this machine, with one thread, on pictures that are already
loaded: the loader is no bottleneck where its rate is higher.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from short_form import line, short

from tailfin.config import load_recipe
from tailfin.data.dataset import Source, TrainingDataset, open_source, training_loader
from tailfin.data.photometric import photometric
from tailfin.data.proposals import open_proposals
from tailfin.data.synth import demo_set
from tailfin.data.views import PretrainingDataset, paired_geometries
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.data import Data
from tailfin.schema.pretraining import Pretraining, Proposals, Views
from tailfin.schema.stages import stages
from tailfin.schema.training import Sampler
from tailfin.stats import ClassStats

PRESETS = ("drcl", "aligndet", "moco_v2", "soco")


def main() -> None:
    """Print the rates of the loaders, the parts of a sample and, where asked, the need of the step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--size", type=int, nargs="+", default=[128])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=320, help="pictures per measurement")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--need", default="", help="a recipe whose pre-training step is timed")
    short(parser, workers=0, pictures=96)
    options = parser.parse_args()
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as folder:
        train = options.train or demo_set(Path(folder) / "data")[0]
        data = Data.model_validate(
            {"train": {"annotations": str(train)}, "sizes": options.size, "workers": options.workers}
        )
        source = open_source(data.train, "", "train")
        table = Table("loader", "pictures/s", "of plain", title=f"{train}, {options.workers} workers")
        plain = rate(TrainingDataset(source, data, 0), options)
        table.add_row("plain", f"{plain:.1f}", "1.00")
        pairs = 0.0
        for preset in PRESETS:
            found = rate(pretraining_set(source, data, preset), options)
            pairs = found if preset == "drcl" else pairs
            table.add_row(f"pairs, {preset}", f"{found:.1f}", f"{found / plain:.2f}")
            if options.short:
                ours, theirs = (f"{speed:.1f} pictures per CPU s" for speed in (found, plain))
                what = f"pairs of views, {preset}, {options.size[0]} px"
                line(what, ours, f"plain loader {theirs}", f"{found / plain:.2f}")
        console = Console(width=120)
        console.print(table)
        console.print(parts(pretraining_set(source, data, "drcl")))
        if options.need:
            need = step_rate(options.need, source, data, options.batch)
            verdict = "the loader keeps up" if pairs > need else "the loader is the bottleneck"
            console.print(
                f"{options.need}: the step takes {need:.1f} pictures/s, the loader gives {pairs:.1f}: {verdict}"
            )


def pretraining_set(source: Source, data: Data, preset: str) -> PretrainingDataset:
    """The preset's samples at the sizes of `data`, with jittered annotations as proposals."""
    config = Pretraining.model_validate({"preset": preset})
    sizes = {} if config.views.sizes else {"sizes": data.sizes}
    views = Views.model_validate({**config.views.model_dump(), **sizes})
    proposals = open_proposals(Proposals(source="gt_jitter"), source)
    options = {"third": config.third_view, "weak": config.weak_view}
    return PretrainingDataset(source, data, 0, views, proposals, **options)


def rate(dataset: TrainingDataset, options: argparse.Namespace) -> float:
    """Pictures per second of the loader, from its second batch on."""
    index = dataset.source.index
    epochs = max(1.0, 2 * (options.pictures + options.batch) / len(dataset.rows()))
    stats = ClassStats.from_index(index)
    plan = BatchPlan(index, dataset.rows(), stats, Sampler(), options.batch, epochs, 0)
    with closing(training_loader(dataset, plan, start=0, rank=0, processes=1, accumulation=1)) as batches:
        for _ in range(4 * max(1, options.workers)):  # what was fetched ahead while the workers started
            next(batches)
        clock = time.perf_counter if options.workers else time.process_time
        began, done = clock(), 0
        while done < options.pictures:
            done += len(next(batches)[0])
        return done / (clock() - began)


def parts(dataset: PretrainingDataset, number: int = 40) -> Table:
    """Milliseconds of a sample's parts in one thread."""
    rows = dataset.rows()[:: max(1, len(dataset.rows()) // number)][:number].tolist()
    seconds = dict.fromkeys(("decode", "geometry", "resize", "photometric", "whole sample"), 0.0)
    rng = np.random.default_rng(0)
    for row in rows:
        began = time.perf_counter()
        image = dataset.source.read(row, dataset.config.max_pixels)
        seconds["decode"] += time.perf_counter() - began
        truth = np.array(dataset.clean.boxes[dataset.clean.offsets[row] : dataset.clean.offsets[row + 1]])
        began = time.perf_counter()
        boxes = dataset.proposals.candidates(row, truth, image, rng)
        size = (image.shape[-2], image.shape[-1])
        geometries, _ = paired_geometries(size, boxes, dataset.views, rng, dataset.sizes, dataset.bound)
        seconds["geometry"] += time.perf_counter() - began
        began = time.perf_counter()
        views = [geometry.pixels(image) for geometry in geometries]
        seconds["resize"] += time.perf_counter() - began
        pairs = zip(views, geometries, strict=True)
        smaller = [
            view if view[0].numel() < own.width * own.height else image[:, : own.height, : own.width]
            for view, own in pairs
        ]
        began = time.perf_counter()
        for view in smaller:
            photometric(view, rng)
        seconds["photometric"] += time.perf_counter() - began
        began = time.perf_counter()
        dataset.sample(0, row, 0)
        seconds["whole sample"] += time.perf_counter() - began
    table = Table("part (both views)", "ms", title="one thread, preset drcl")
    for name, value in seconds.items():
        table.add_row(name, f"{1000 * value / len(rows):.1f}")
    return table


def step_rate(name: str, source: Source, data: Data, batch: int, iterations: int = 5) -> float:
    """Pictures per second of a recipe's pre-training step, forward and backward, without loading."""
    from tailfin.models import build_detector
    from tailfin.models.faster_rcnn import FasterRCNN
    from tailfin.pretraining.shell import PreTrainer

    recipe = load_recipe(name, ())
    config = recipe.pretraining
    if config is None:
        raise SystemExit(f"{name} has no section `pretraining`")
    detector = build_detector(stages(recipe)[0].recipe, ClassStats.from_index(source.index))[0]
    assert isinstance(detector, FasterRCNN)
    shell = PreTrainer(detector, config, iterations=1000).train()
    dataset = pretraining_set(source, data, config.preset)
    samples = [dataset.sample(0, int(row), 0) for row in dataset.rows()[:batch]]
    images, targets = [image for image, _ in samples], [target for _, target in samples]
    seconds = []
    for _ in range(iterations):
        began = time.perf_counter()
        torch.stack(list(shell(images, targets).values())).sum().backward()
        seconds.append(time.perf_counter() - began)
    return batch / float(np.median(seconds[1:]))


if __name__ == "__main__":
    main()
