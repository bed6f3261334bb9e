"""How many training pictures a second does one core read and augment, against torchvision's reference transforms?

    python benchmarks/input_speed.py --data FOLDER                 # with train.json and pictures, for example road12
    python benchmarks/input_speed.py --data FOLDER --size 640 --kinds flip masks jitter
    python benchmarks/input_speed.py --short                       # road12 of TAILFIN_DATA, else the demo set

The peer is `torchvision.datasets.CocoDetection` behind `wrap_dataset_for_transforms_v2` and the transforms of
torchvision's detection reference (presets "hflip" with `RandomShortestSize` of the model's transform in its place, and
"lsj"), in the same process, on the same pictures in the same order. The two take turns in blocks of pictures, so that a
machine that slows down slows both; the ratio is the median of the blocks' ratios.

    flip     shortest side, horizontal flip, boxes
    masks    the same with masks
    jitter   large-scale jitter on a square canvas, flip, masks
    paste    jitter and copy-paste along masks; the peer pastes per batch, as its reference does
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from short_form import data, short, table_lines
from torchvision import datasets, tv_tensors
from torchvision.transforms import v2

from tailfin.data.dataset import Source, TrainingDataset, open_source
from tailfin.data.synth import demo_set
from tailfin.schema.data import Data, DataFiles

KINDS = ("flip", "masks", "jitter", "paste")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--annotations", default="train.json")
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--block", type=int, default=8, help="pictures of a turn")
    parser.add_argument("--blocks", type=int, default=12)
    short(parser, blocks=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options.data = options.data or data("road12-masks-lt") or demo_set(Path(folder) / "demo")[0].parent
        compare(options)


def compare(options: argparse.Namespace) -> None:
    source = open_source(DataFiles(annotations=options.annotations), str(options.data), "train")
    table = Table(title=f"{options.data.name}, {options.size} px, pictures per second and core")
    for column in ("kind", "tailfin", "torchvision", "ratio", "over the blocks"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in options.kinds:
        table.add_row(kind, *row(ours(kind, source, options), theirs(kind, source, options), options))
    Console().print(table)
    if options.short:
        what = f"pictures of {options.data.name} read and augmented at {options.size} px, one core: "
        table_lines(table, what, unit=" pictures/s", spread=4, who="torchvision")


def row(first: Callable[[int], object], second: Callable[[int], object], options: argparse.Namespace) -> list[str]:
    times: list[tuple[float, float]] = []
    for block in range(-1, options.blocks):
        pair = {}
        for read in (first, second) if block % 2 else (second, first):
            start = time.process_time()
            for number in range(options.block):
                read(max(block, 0) * options.block + number)
            pair[read] = time.process_time() - start
        if block >= 0:
            times.append((pair[first], pair[second]))
    ratios = sorted(b / a for a, b in times)
    speeds = [options.block * len(times) / sum(column) for column in zip(*times, strict=True)]
    return [
        f"{speeds[0]:.1f}",
        f"{speeds[1]:.1f}",
        f"{statistics.median(ratios):.2f}",
        f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
    ]


def ours(kind: str, source: Source, options: argparse.Namespace) -> Callable[[int], object]:
    resizing = {"resize": "jitter", "canvas": True} if kind in ("jitter", "paste") else {"resize": "multiscale"}
    config = Data(sizes=(options.size,), max_size=2 * options.size, flip=0.5, copy_paste=kind == "paste", **resizing)
    dataset = TrainingDataset(source, config, 0)
    dataset = dataset if kind == "flip" else dataset.with_masks()
    rows = dataset.rows()
    return lambda number: dataset[0, int(rows[number % len(rows)]), 0]


def theirs(kind: str, source: Source, options: argparse.Namespace) -> Callable[[int], object]:
    keys = ["boxes", "labels", *(["masks"] if kind != "flip" else [])]
    plain = datasets.CocoDetection(str(source.images), str(options.data / options.annotations))
    wrapped = datasets.wrap_dataset_for_transforms_v2(plain, target_keys=keys)
    if kind in ("jitter", "paste"):
        fill: Any = {tv_tensors.Image: 0, tv_tensors.Mask: 0}
        shape = [
            v2.ScaleJitter(target_size=(options.size, options.size), antialias=True),
            v2.RandomCrop((options.size, options.size), pad_if_needed=True, fill=fill),
        ]
    else:
        shape = [v2.RandomShortestSize(min_size=(options.size,), max_size=2 * options.size, antialias=True)]
    last = [v2.ToDtype(torch.float32, scale=True), v2.SanitizeBoundingBoxes(), v2.ToPureTensor()]
    transform = v2.Compose([v2.ToImage(), *shape, v2.RandomHorizontalFlip(p=0.5), *last])
    place = {image: number for number, image in enumerate(plain.ids)}
    rows = TrainingDataset(source, Data(), 0).rows()
    order = [place[int(source.index.image_ids[row])] for row in rows]

    def read(number: int) -> object:
        image, target = transform(*wrapped[order[number % len(order)]])
        if kind == "paste" and "masks" in target:
            other, pasted = transform(*wrapped[order[(number + 1) % len(order)]])
            return pasted_on(image, target, other, pasted)
        return image, target

    return read


def pasted_on(image: Any, target: Any, other: Any, pasted: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The arithmetic of the reference's copy-paste: half of the objects pasted, hidden ones dropped."""
    chosen = torch.rand(len(pasted["masks"])) < 0.5
    masks = pasted["masks"][chosen]
    over = masks.any(0) if len(masks) else torch.zeros(image.shape[-2:], dtype=torch.bool)
    left = target["masks"] * ~over
    return torch.where(over, other, image), torch.cat([left[left.any(-1).any(-1)], masks])


if __name__ == "__main__":
    main()
