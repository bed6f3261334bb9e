"""What does each classification loss cost beside plain sigmoid cross-entropy?

    python benchmarks/loss_speed.py                          # 1,024 rows, 1,203 classes, one thread
    python benchmarks/loss_speed.py --threads 4 --check      # exit code 1 where a target is missed
    python benchmarks/loss_speed.py --short                  # 5 rounds
    python benchmarks/loss_speed.py --device cuda
    python benchmarks/loss_speed.py --only gap --row-by-row  # and gap written as a loop over the foreground rows

Time is that of forward and backward in training mode, running statistics included. The peer is the loss "objectness"
(torch's fused BCE on one-hot targets, C + 1 logits), which takes turns with every other loss in the same process, so
that a machine that slows down slows both: the ratio is the median of the rounds' ratios. Methods that work in phases
are measured in the dearest one (pcb: after its start, last step of the head). A quarter of the rows are foreground, of
classes as in a long-tailed set; logits are spread like those of a classifier in mid-training.

Peak memory is what one forward and backward allocates at most beyond the logits, from the allocations that torch's
profiler records on the CPU, from the allocator on a GPU; buffers that a loss keeps are not part of it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from short_form import short, table_lines
from torch import Tensor

from tailfin import losses
from tailfin.losses import ClassificationLoss
from tailfin.stats import ClassStats

PEER = "objectness"
TARGETS = {"fcbl": 2.5, "eqlv2": 2.5, "efl": 4.0, "eqfl": 4.0, "pcb": 4.0, "bags": 4.0, "gap": 10.0, "rog": 10.0}
ELEMENTWISE = 1.5  # of every other loss
WIDTH = 110  # characters of the table
MORE_OPTIONS: dict[str, list[dict[str, Any]]] = {  # rows beside the one with default options
    "pcb": [{"base": "seesaw"}, {"base": "eqlv2"}],
    "rog": [{"base": "seesaw"}],
}

Step = Callable[[], float]  # one forward and backward; seconds


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    stats = long_tail(options.classes)
    rows = [(name, more) for name in options.only for more in ({}, *MORE_OPTIONS.get(name, []))]
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"{options.rows} rows, {options.classes} classes, float32, forward and backward; {device}; "
        f"torch {torch.__version__}; {platform.system()}, {options.rounds} rounds"
    )
    table = Table()
    for name in ("loss", "ms", f"x {PEER}", "of the rounds", "target", "peak MiB", f"x {PEER}"):
        table.add_column(name, justify="left" if name == "loss" else "right")
    peer = build(PEER, {}, stats, options)
    peer_memory = peak_memory(peer, options.device)
    missed = []
    for name, more in rows:
        step = build(name, more, stats, options)
        label = " ".join([name, *(f"{key}={value}" for key, value in more.items())])
        ratio = add_row(table, label, TARGETS.get(name, ELEMENTWISE), step, peer, peer_memory, options)
        if ratio > TARGETS.get(name, ELEMENTWISE):
            missed.append(label)
    if options.row_by_row:
        step = partial(timed, partial(row_by_row, *inputs(losses.build("gap", stats), options)), options.device)
        options.rounds = 3
        add_row(table, "gap, row by row", None, step, peer, peer_memory, options)
    Console(width=WIDTH).print(table)
    if options.short:
        what = f"loss, {options.rows:,} rows, {options.classes:,} classes, beside `{PEER}`: "
        table_lines(table, what, unit=" ms", peer=None, ratio=2, spread=3)
    if missed:
        print(f"over the target: {', '.join(missed)}")
    sys.exit(bool(missed) and options.check)


def add_row(
    table: Table,
    label: str,
    target: float | None,
    step: Step,
    peer: Step,
    peer_memory: float,
    options: argparse.Namespace,
) -> float:
    """Measure, print, and return the ratio of times."""
    memory = peak_memory(step, options.device)
    pairs = [(step(), peer()) if number % 2 else (peer(), step())[::-1] for number in range(options.rounds)]
    ratios = [own / other for own, other in pairs]
    ratio = statistics.median(ratios)
    table.add_row(
        label,
        f"{1000 * statistics.median(own for own, _ in pairs):.1f}",
        f"{ratio:.2f}",
        f"{min(ratios):.2f} to {max(ratios):.2f}",
        "" if target is None else f"{target:g}",
        f"{memory:.1f}",
        f"{memory / peer_memory:.2f}",
    )
    return ratio


def build(name: str, more: dict[str, Any], stats: ClassStats, options: argparse.Namespace) -> Step:
    """A loss in training mode on fixed rows."""
    loss = losses.build(name, stats, **more).to(options.device)
    logits, labels = inputs(loss, options)
    keywords = prepare(name, loss, labels)

    def run() -> None:
        logits.grad = None
        loss(logits, labels, **keywords).backward()

    for _ in range(3):
        run()
    return partial(timed, run, options.device)


def prepare(name: str, loss: ClassificationLoss, labels: Tensor) -> dict[str, Any]:
    """Keywords of the call, and the state of a training under way."""
    if name == "pcb":
        loss.get_buffer("fg_confusion_matrix").fill_(1 / loss.num_classes)
        loss.get_buffer("num_inst_cnt").fill_(1)
        return {"epoch": 20}
    if name == "ebl":
        foreground = labels < loss.num_classes
        return {"gt_index": torch.where(foreground, torch.arange(len(labels), device=labels.device) // 4, -1)}
    if name == "eqfl":
        return {"quality": torch.rand(len(labels), device=labels.device)}
    return {}


def inputs(loss: ClassificationLoss, options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Logits [N, num_logits] that ask for a gradient, and labels [N]."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((options.rows, loss.num_logits), generator=generator) * 2 - 4
    labels = torch.full((options.rows,), loss.num_classes)
    foreground = torch.rand(options.rows // 4, generator=generator)
    labels[: len(foreground)] = (foreground**3 * loss.num_classes).long()
    return logits.to(options.device).requires_grad_(), labels.to(options.device)


def long_tail(classes: int) -> ClassStats:
    """Counts that fall from 10,000 images to 1."""
    images = [max(1, round(10 ** (4 * (1 - place / classes)))) for place in range(classes)]
    return ClassStats(image_count=images, instance_count=[3 * count for count in images], num_images=100_000)


def timed(run: Callable[[], None], device: str) -> float:
    """Seconds of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    # other work on the machine does not count in the time of one thread
    clock = time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_memory(step: Step, device: str) -> float:
    """MiB allocated at most during one step, beyond what was allocated before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    now = peak = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak / 2**20


def row_by_row(logits: Tensor, labels: Tensor, gamma: float = 1.0, delta: float = 0.5, lam: float = 0.1) -> None:
    """gap's value and gradient in the form it is usually written: every foreground row against all its negatives."""
    classes = logits.shape[1] - 1
    scores = logits.detach()[:, :classes]
    foreground = torch.where(labels < classes)[0]
    negative = torch.ones_like(scores, dtype=torch.bool)
    negative[foreground, labels[foreground]] = False
    count = torch.bincount(labels, minlength=classes + 1)[:-1].clamp(min=1).to(scores.dtype).pow(-gamma)
    weight = count * (classes / count.sum())
    gradient = torch.zeros_like(scores)
    value = scores.new_zeros(())
    present = labels[foreground].unique()
    for label in present:
        rows = torch.where(labels == label)[0]
        own = scores[rows, label]
        relevant = negative & (scores >= own.min() - delta)
        others = scores[relevant]
        share = lam * weight[label] / (len(rows) * len(present))
        down = torch.zeros_like(others)
        for row, threshold in zip(rows, own, strict=True):
            above = ((others - threshold) / (2 * delta) + 0.5).clamp_(0, 1)
            false_positives = above.sum()
            rank = ((own - threshold) / (2 * delta) + 0.5).clamp_(0, 1).sum() + false_positives
            value += false_positives / rank / (len(rows) * len(present))
            gradient[row, label] -= share * false_positives / rank
            down += above * (share / rank)
        gradient[relevant] += down


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", choices=losses.names(), default=losses.names(), metavar="LOSS")
    parser.add_argument("--row-by-row", action="store_true", help="also gap as a loop over the foreground rows (slow)")
    parser.add_argument("--check", action="store_true", help="exit code 1 where a target is missed")
    short(parser, rounds=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
