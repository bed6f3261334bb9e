"""How much memory, and how long, does one encoder layer of Deformable DETR take in training at 800 x 1333?

    python benchmarks/deformable_memory.py                   # 22,223 cells on four levels, 256 channels, one picture
    python benchmarks/deformable_memory.py --short           # 400 x 672

Three layers with the same weights: `transformers`, its own; `autograd`, tailfin's layer whose sampling keeps what
autograd keeps; `tailfin`, whose sampling keeps its inputs alone. Each runs in a process of its own; memory is the
growth of the process's peak over forward and backward, time the median of the rounds, CPU seconds. `held` is what is
kept for backward, each storage counted once.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from short_form import line, short
from transformers import DeformableDetrConfig
from transformers.models.deformable_detr.modeling_deformable_detr import DeformableDetrEncoderLayer

from tailfin.models import deformable_attention
from tailfin.models.detr_geometry import grid

KINDS = ("transformers", "autograd", "tailfin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--height", type=int, default=800)
    parser.add_argument("--width", type=int, default=1333)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    short(parser, height=400, width=672, rounds=2)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options)))
        return
    rows = {}
    for kind in KINDS:
        command = [
            sys.executable,
            __file__,
            "--one",
            kind,
            *(f"--{key}={getattr(options, key)}" for key in ("height", "width", "rounds")),
        ]
        rows[kind] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    first = rows["tailfin"]
    table = Table(
        title=f"one encoder layer, {first['cells']:,} cells, forward and backward, {first['threads']} thread(s)"
    )
    for column in ("layer", "peak MiB", "held MiB", "seconds"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for kind, row in rows.items():
        table.add_row(kind, f"{row['peak']:.0f}", f"{row['held']:.0f}", f"{row['seconds']:.2f}")
    Console().print(table)
    worst = max(abs(row["sum"] - first["sum"]) / abs(first["sum"]) for row in rows.values())
    if options.short:
        what = f"one encoder layer of Deformable DETR, {first['cells']:,} cells: "
        own, theirs = rows["tailfin"], rows["transformers"]
        for name, key, unit in (
            ("peak memory", "peak", "MiB"),
            ("kept for backward", "held", "MiB"),
            ("time", "seconds", "s"),
        ):
            figures = (f"{row[key]:.0f} {unit}" if unit == "MiB" else f"{row[key]:.2f} {unit}" for row in (own, theirs))
            ours, peer = figures
            line(what + name, ours, f"transformers {peer}", f"{own[key] / theirs[key]:.2f}")
    print(f"squares of outputs and gradients agree to {worst:.1e}")


def measure(options: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    config = DeformableDetrConfig(
        backbone_config=None, use_timm_backbone=False, use_pretrained_backbone=False, dropout=0.0
    )
    kind = DeformableDetrEncoderLayer if options.one == "transformers" else deformable_attention.EncoderLayer
    layer = kind(config)
    if options.one != "transformers":
        state = layer.self_attn.state_dict()
        layer.self_attn = deformable_attention.DeformableAttention(config, 8, 4)
        layer.self_attn.load_state_dict(state)
    if options.one == "autograd":
        deformable_attention._LeanSampling.apply = staticmethod(deformable_attention._sampled)
    torch.manual_seed(1)
    shapes = [(-(-options.height // stride), -(-options.width // stride)) for stride in (8, 16, 32, 64)]
    cells = sum(height * width for height, width in shapes)
    ratios = torch.ones(1, 4, 2)
    centres = torch.cat([grid(shape, ratios[:, number]) for number, shape in enumerate(shapes)], dim=1)
    sides = torch.tensor(shapes)
    given = {
        "spatial_position_embeddings": torch.randn(1, cells, 256),
        "reference_points": centres[:, :, None].expand(-1, -1, 4, -1),
        "spatial_shapes": sides,
        "spatial_shapes_list": shapes,
        "level_start_index": torch.cat([sides.new_zeros(1), sides.prod(1).cumsum(0)[:-1]]),
    }
    tokens, mask = torch.randn(1, cells, 256, requires_grad=True), torch.ones(1, cells, dtype=torch.bool)
    upstream = torch.randn(1, cells, 256)
    before, times = peak(), []
    for _ in range(options.rounds):
        tokens.grad = None
        start = time.process_time()
        kept: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, kept=kept: noted(tensor, kept), lambda tensor: tensor
        ):
            found = layer(tokens, mask, **given)
        found = found if isinstance(found, torch.Tensor) else found[0]
        (found * upstream).sum().backward()
        times.append(time.process_time() - start)
    total = float(found.detach().double().square().sum() + tokens.grad.double().square().sum())
    return {
        "peak": peak() - before,
        "held": sum(kept.values()) / 2**20,
        "seconds": statistics.median(times),
        "sum": total,
        "cells": cells,
        "threads": torch.get_num_threads(),
    }


def noted(tensor: torch.Tensor, kept: dict[int, int]) -> torch.Tensor:
    """The tensor, its storage's bytes written down."""
    storage = tensor.untyped_storage()
    kept[storage.data_ptr()] = storage.nbytes()
    return tensor


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
