"""Is the dry run's estimate of a training step's memory true? It is compared with fresh processes that train.

    python benchmarks/memory_estimate.py                                      # all detectors, R18, 1,203 classes, CPU
    python benchmarks/memory_estimate.py --short                              # three detectors, 128 px
    python benchmarks/memory_estimate.py --backbone resnet50 --sizes 256 --detectors mask_rcnn atss
    python benchmarks/memory_estimate.py --estimate-only --backbone resnet50 --height 800 --width 1333 --batch 2

Measured is what building the detector and three steps of the engine add to the resident set of a process that has
loaded the libraries; the estimate is `tailfin.memory`'s, from one picture. Target: within 15 %.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from short_form import line, short
from torch import Tensor, nn
from training_speed import Targets, tailfin_step

from tailfin.config import check_recipe
from tailfin.memory import training_memory, watched_step
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.stats import ClassStats

DETECTORS = {
    "faster_rcnn": {"name": "faster_rcnn"},
    "mask_rcnn": {"name": "mask_rcnn"},
    "cascade_rcnn": {"name": "cascade_rcnn"},
    "cascade_mask_rcnn": {"name": "cascade_rcnn", "masks": True},
    "retinanet": {"name": "retinanet"},
    "atss": {"name": "atss"},
}
OBJECTS = 6  # of a picture


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measured(options)))
        return
    table = Table(title=f"{options.backbone}, {options.batch} pictures, {options.classes:,} classes, float32, MiB")
    for name in ("detector", "picture", "estimate", "of these held", "measured", "estimate / measured"):
        table.add_column(name, justify="left" if name == "detector" else "right")
    for name in options.detectors:
        for size in options.sizes:
            shape = (options.height or size, options.width or size)
            held, total = estimated(name, shape, options)
            found = None if options.estimate_only else median([run_child(name, shape) for _ in range(options.runs)])
            cells = ("", "") if found is None else (f"{found:.0f}", f"{total / found:.3f}")
            print(
                name, shape, f"estimate {total:.0f} MiB, {held:.0f} held; measured {found}", file=sys.stderr, flush=True
            )
            table.add_row(name, f"{shape[0]} x {shape[1]}", f"{total:.0f}", f"{held:.0f}", *cells)
            if options.short:
                what = f"dry run's estimate of a step's memory: {name}, {options.backbone}, {options.batch} x {size} px"
                line(what, f"{total:.0f} MiB", f"measured {cells[0]} MiB", cells[1])
    Console(width=110).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detectors", nargs="*", choices=tuple(DETECTORS), default=list(DETECTORS))
    parser.add_argument("--sizes", type=int, nargs="*", default=[160, 256], help="sides of square pictures in pixels")
    parser.add_argument("--height", type=int, help="instead of `--sizes`")
    parser.add_argument("--width", type=int)
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--runs", type=int, default=1, help="processes per line, of which the median counts")
    parser.add_argument("--estimate-only", action="store_true")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    short(parser, sizes=[128], detectors=["faster_rcnn", "mask_rcnn", "retinanet"])
    options = parser.parse_args()
    # what the functions of training_speed.py ask for
    options.device, options.precision, options.channels_last = "cpu", "no", False
    if options.height:
        options.sizes = [options.height]
    return options


def model_of(name: str, options: argparse.Namespace) -> Detector:
    """The detector as published recipes have it: frozen norms, two frozen layers."""
    loss = "focal" if name in ("retinanet", "atss") else "softmax"
    recipe = check_recipe(
        {"weights": "imagenet", "backbone": options.backbone, "detector": DETECTORS[name], "loss": loss}, "benchmark"
    )
    counts = [100] * options.classes
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=100 * options.classes)
    torch.manual_seed(0)
    model, _ = build_detector(recipe, stats, start=False)
    for module in model.modules():  # frozen norms of random weights: keep what passes through at the size of 1
        if hasattr(module, "running_var") and isinstance(module.running_var, Tensor):
            module.running_var.fill_(2.0)
    return model


def batch_of(name: str, shape: tuple[int, int], options: argparse.Namespace) -> tuple[list[Tensor], Targets]:
    generator = torch.Generator().manual_seed(0)
    pictures, targets = [], []
    size = torch.tensor([shape[1], shape[0]])
    for _ in range(options.batch):
        sides = size * (0.1 + 0.4 * torch.rand((OBJECTS, 2), generator=generator))
        corner = (size - sides) * torch.rand((OBJECTS, 2), generator=generator)
        labels = torch.randint(options.classes, (OBJECTS,), generator=generator)
        target = {"boxes": torch.cat([corner, corner + sides], 1), "labels": labels}
        if "mask" in name:
            target["masks"] = torch.ones((OBJECTS, *shape), dtype=torch.uint8)
        pictures.append(torch.rand((3, *shape), generator=generator))
        targets.append(target)
    return pictures, targets


def estimated(name: str, shape: tuple[int, int], options: argparse.Namespace) -> tuple[float, float]:
    """(MiB held whatever the pictures, MiB in all)."""
    model: nn.Module = model_of(name, options)
    pictures, targets = batch_of(name, shape, options)
    memory = training_memory(model, watched_step(model, pictures[0], targets[0]), options.batch, states=1)
    return memory.held / 2**20, memory.total / 2**20


def run_child(name: str, shape: tuple[int, int]) -> float:
    """`measured` in a process of its own."""
    # glibc gives large freed blocks back at once, so that the resident set holds what is in use and no chance gaps
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", name, *map(str, shape)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, env=environment).stdout))


def measured(options: argparse.Namespace) -> float:
    """MiB that the detector and three steps add to this process (Linux)."""
    name, shape = options.child[0], (int(options.child[1]), int(options.child[2]))
    small = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 14 * 14, 8))
    small(torch.rand(2, 3, 16, 16)).sum().backward()  # libraries that are loaded with the first use
    pictures, targets = batch_of(name, shape, options)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = memory_of("VmRSS")
    step = tailfin_step(model_of(name, options).train(), pictures, targets, options)
    for number in range(3):
        torch.manual_seed(number)
        step()
    return memory_of("VmHWM") - before


def memory_of(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 2**10


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


if __name__ == "__main__":
    main()
