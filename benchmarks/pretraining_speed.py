"""What does an iteration of 2DRCL pre-training cost over a supervised one, in time and memory, and where does it go?

    python benchmarks/pretraining_speed.py                                  # R18-FPN, 128 px, 16 pictures, CPU
    python benchmarks/pretraining_speed.py --cpu-time                       # on a machine with other work
    python benchmarks/pretraining_speed.py --short                          # without memory, 3 rounds
    python benchmarks/pretraining_speed.py --r50                            # R50-FPN, 800 px, 2 pictures
    python benchmarks/pretraining_speed.py --r50 --device cuda --batch 16 --precision bf16 --channels-last

The rows are added up from the supervised iteration (the detector alone on the first view) to the whole of 2DRCL, so
that the difference of two rows is what a part costs; AlignDet's and MoCo v2's iterations stand beside. All take turns
in one process on the same pictures and boxes; the ratio is the median of the rounds' ratios. Loading pictures is not
part of it. Peak memory is the allocator's on a GPU, and on the CPU the growth of the resident set of fresh processes.

Targets on a GPU: at most 1.5 of the supervised time, at most 1.15 of its memory. The paper (table A.4) needs 20.6 h
for 6+6 epochs where 12 supervised ones take 16.1 h, 1.56 per pre-training epoch, and 106 GB for 94; AlignDet 19.5 h
and 103 GB. AlignDet trains with a frozen backbone on R50, as published, and with all of it on R18, which starts at
random.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from short_form import line, short
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from tailfin.config import load_recipe
from tailfin.models import build_detector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.pretraining.shell import PreTrainer
from tailfin.stats import ClassStats

SMALL, LARGE = "fod/drcl_r18", "lvis_v1/faster_rcnn_r50:drcl"
OFF = {part: f"pretraining.weights.{part}=0" for part in ("hcl", "lcl", "ar", "sr")}
ROWS: dict[str, list[str] | None] = {  # row -> overrides; none is the detector alone
    "supervised": None,
    "+ holistic contrast": [OFF["lcl"], OFF["ar"], OFF["sr"]],
    "+ local contrast": [OFF["ar"], OFF["sr"]],
    "+ appearance": [OFF["sr"]],
    "+ semantic = 2DRCL": ["pretraining.reconstruction.share=1"],
    "2DRCL, SR on half the pictures": ["pretraining.reconstruction.share=0.5"],
    "2DRCL, SR on a quarter of the pictures": ["pretraining.reconstruction.share=0.25"],
    "AlignDet": ["pretraining.preset=aligndet"],
    "MoCo v2": ["pretraining.preset=moco_v2"],
}
PUBLISHED = {"+ semantic = 2DRCL": ((20.6 - 16.1 / 2) / (16.1 / 2), 106 / 94), "AlignDet": (11.45 / 8.05, 103 / 94)}


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(peak_memory(options.memory, options)))
        return
    steps = {name: step(name, options) for name in ROWS}
    seconds = measure(list(steps.values()), options)
    memory = {} if options.skip_memory else {name: in_new_process(name) for name in ROWS}
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"{'R50' if options.r50 else 'R18'}-FPN, {options.batch} pictures of {options.size} px, precision "
        f"{options.precision}, channels last {options.channels_last}; {hardware}; torch {torch.__version__}; "
        f"{options.rounds} rounds, {'CPU' if options.cpu_time else 'wall-clock'} seconds"
    )
    table = Table()
    for name in ("one iteration", "ms", "ratio", "published", "MiB", "ratio", "published"):
        table.add_column(name, justify="left" if name == "one iteration" else "right")
    for number, name in enumerate(ROWS):
        ratios = [own / base for own, base in zip(seconds[number], seconds[0], strict=True)]
        time_there, memory_there = PUBLISHED.get(name, (None, None))
        cells = [f"{statistics.median(seconds[number]) * 1e3:.0f}", f"{statistics.median(ratios):.2f}"]
        cells.append(f"{time_there:.2f}" if time_there else "")
        if memory:
            cells += [f"{memory[name] / 2**20:.0f}", f"{memory[name] / memory['supervised']:.2f}"]
            cells.append(f"{memory_there:.2f}" if memory_there else "")
        table.add_row(name, *cells)
        if options.short and number:
            size = f"{options.batch} x {options.size} px"
            own, base = (f"{statistics.median(seconds[row]) * 1e3:.0f} ms" for row in (number, 0))
            line(
                f"a pre-training iteration, R18, {size}, detection on view 1: {name}",
                own,
                f"supervised {base}",
                cells[1],
            )
    Console(width=110).print(table)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r50", action="store_true", help=f"the detector of {LARGE}, 800 px, 2 pictures")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels")
    parser.add_argument("--batch", type=int, help="pictures per iteration")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of the wall clock")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory", choices=tuple(ROWS), help=argparse.SUPPRESS)
    short(parser, threads=1, rounds=3, cpu_time=True, skip_memory=True)
    options = parser.parse_args()
    options.size = options.size or (800 if options.r50 else 128)
    options.batch = options.batch or (2 if options.r50 else 16)
    return options


def step(name: str, options: argparse.Namespace) -> Callable[[], object]:
    """One iteration of a row: losses, backward, optimiser step."""
    overrides = [*(ROWS[name] or []), f"schedule.channels_last={options.channels_last}"]
    if name == "AlignDet" and not options.r50:
        overrides.append("pretraining.freeze_backbone=false")
    recipe = load_recipe(LARGE if options.r50 else SMALL, overrides)
    classes = 1203 if options.r50 else 31
    stats = ClassStats(image_count=[30] * classes, instance_count=[50] * classes, num_images=1000)
    torch.manual_seed(0)
    detector, _ = build_detector(recipe, stats, start=False)
    assert isinstance(detector, FasterRCNN)
    for module in detector.modules():
        if isinstance(module, FrozenBatchNorm2d):  # no weights are loaded: keep a random network's features in range
            module.weight.fill_(0.4)
    model: nn.Module = detector
    if ROWS[name] is not None:
        assert recipe.pretraining is not None
        section = recipe.pretraining
        model = PreTrainer(detector, section, iterations=1000)
    model = model.to(options.device, memory_format=torch.channels_last if options.channels_last else None)
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-4, momentum=0.9)
    images, targets = workload(options, classes)

    def run() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            losses = model(images, targets)
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if options.device == "cuda":
            torch.cuda.synchronize()

    return run


def workload(options: argparse.Namespace, classes: int) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two views of each picture, 8 paired proposals and some objects, the same for all rows."""
    generator = torch.Generator().manual_seed(0)
    size, objects = options.size, 7 if options.r50 else 2

    def picture() -> Tensor:
        shape = (3, size, size)
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(options.device)

    def boxes(count: int) -> Tensor:
        corner = torch.rand(count, 2, generator=generator) * size * 0.5
        side = (0.08 + 0.4 * torch.rand(count, 2, generator=generator)) * size
        return torch.cat([corner, corner + side], 1).to(options.device)

    images = [picture() for _ in range(options.batch)]
    targets = [
        {
            "boxes": boxes(objects),
            "labels": torch.randint(classes, (objects,), generator=generator).to(options.device),
            "view": picture(),
            "proposals": boxes(8),
            "view_proposals": boxes(8),
        }
        for _ in range(options.batch)
    ]
    return images, targets


def measure(steps: list[Callable[[], object]], options: argparse.Namespace) -> list[list[float]]:
    """Seconds of each step in each round; the steps take turns, every other round backwards."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    for run in steps:
        run()
    seconds: list[list[float]] = [[] for _ in steps]
    for number in range(options.rounds):
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        for row in order:
            begin = clock()
            steps[row]()
            seconds[row].append(clock() - begin)
    return seconds


def peak_memory(name: str, options: argparse.Namespace) -> int:
    """Bytes that three iterations need at their peak beside what the process holds before."""
    before = resident("VmRSS")
    run = step(name, options)
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(3):
        run()
    return torch.cuda.max_memory_allocated() if options.device == "cuda" else resident("VmHWM") - before


def resident(what: str) -> int:
    status = Path("/proc/self/status")
    if not status.is_file():
        raise SystemExit("peak memory of a CPU process is read from /proc: use --skip-memory here")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(what))


def in_new_process(name: str) -> int:
    command = [sys.executable, __file__, *sys.argv[1:], "--memory", name]
    return int(json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout))


if __name__ == "__main__":
    main()
