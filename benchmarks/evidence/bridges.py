"""How 2DRCL's generator best reaches a backbone of stride 32: its three bridges side by side.

    python benchmarks/evidence/bridges.py --data DATA                    # road12 at 128 px, about a minute of one core

Four doublings make 16 of the 32. `first_stride4` lets the first convolution quadruple, `bilinear` enlarges the result,
`half_target` compares with a picture of half the size. A frozen backbone with packaged ImageNet weights gives features
of training and validation pictures; each generator learns the training ones for as many steps from the same draws.
Printed: mean squared error on validation pictures over their variance (1 is the mean colour), of the whole picture and
of its coarse part (averaged over 8 x 8 pixels); the energy of the results in periods of 2 to 4 pixels, where transposed
convolutions leave their pattern, over that of the pictures; and the time of a step in CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from tailfin.config import load_recipe
from tailfin.data.dataset import open_source, to_test_size
from tailfin.data.index import open_index
from tailfin.models import build_detector
from tailfin.pretraining.reconstruction import Generator
from tailfin.pretraining.shell import deepest
from tailfin.schema.data import DataFiles
from tailfin.stats import ClassStats

BRIDGES = ("first_stride4", "bilinear", "half_target")
BATCH = 16


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    sets, channels, stride = features(options)
    table = Table(
        title=f"{options.steps} steps of {BATCH}, {options.size} px, widths 128, 64, 32, seeds {options.seeds}"
    )
    for name in ("bridge", "error / variance", "coarse part", "fine energy over that of pictures", "ms a step"):
        table.add_column(name, justify="left" if name == "bridge" else "right")
    for bridge in BRIDGES:
        rows = [measured(bridge, sets, channels, stride, options, seed) for seed in range(options.seeds)]
        each = torch.tensor(rows, dtype=torch.float64)
        low, high = each.amin(0), each.amax(0)
        texts = [f"{mean:.3f} ({a:.3f} to {b:.3f})" for mean, a, b in zip(each.mean(0)[:3], low, high, strict=False)]
        table.add_row(bridge, *texts, f"{each[:, 3].median():.1f}")
    Console(width=150).print(table)


@torch.no_grad()
def features(options: argparse.Namespace) -> tuple[list[tuple[Tensor, Tensor]], int, int]:
    """(deepest features, normalised pictures) of training and of validation pictures; channels and stride."""
    recipe = load_recipe("road12/packaged", [f"data.sizes=[{options.size}]"])
    index = open_index(options.data / "train.json")
    model, _ = build_detector(recipe, ClassStats.from_index(index))
    model.eval()
    body = model.backbone.body
    found = []
    for split, count in (("train", options.pictures), ("val", options.pictures // 2)):
        source = open_source(DataFiles(annotations=f"{split}.json"), str(options.data), split)
        rows = torch.linspace(0, len(source.index) - 1, count).long().tolist()
        pictures = [to_test_size(source.read(row, recipe.data.max_pixels), recipe.data) for row in rows]
        batches = [model.batch(pictures[first : first + BATCH]).tensors for first in range(0, count, BATCH)]
        layers = [body.layers(batch)[body.layer_names[-1]] for batch in batches]
        found.append((torch.cat(layers), torch.cat(batches)))
    return found, *deepest(body)


def measured(
    bridge: str, sets: list[tuple[Tensor, Tensor]], channels: int, stride: int, options: argparse.Namespace, seed: int
) -> list[float]:
    """Error, coarse error, fine energy, milliseconds."""
    torch.manual_seed(seed)
    generator = Generator(channels, stride=stride, bridge=bridge, widths=(128, 64, 32))
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
    (given, wanted), (others, truth) = sets
    began = time.process_time()
    draws = torch.Generator().manual_seed(seed)
    for _ in range(options.steps):
        rows = torch.randperm(len(given), generator=draws)[:BATCH]
        made = generator(given[rows])
        loss = F.mse_loss(made, resized(wanted[rows], made.shape[-2:]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    milliseconds = (time.process_time() - began) / options.steps * 1e3
    with torch.no_grad():
        made = resized(generator(others), truth.shape[-2:])
    variance = truth.var()
    coarse = F.avg_pool2d(made - truth, 8).square().mean() / F.avg_pool2d(truth, 8).var()
    fine = float(fine_energy(made) / fine_energy(truth))
    return [float((made - truth).square().mean() / variance), float(coarse), fine, milliseconds]


def resized(pictures: Tensor, size: torch.Size) -> Tensor:
    """Pictures at another size: smaller ones by area, larger ones bilinear."""
    if pictures.shape[-2:] == size:
        return pictures
    if size[0] < pictures.shape[-2]:
        return F.interpolate(pictures, size=size, mode="area")
    return F.interpolate(pictures, size=size, mode="bilinear", align_corners=False)


def fine_energy(pictures: Tensor) -> Tensor:
    """Energy of periods up to 4 pixels."""
    spectrum = torch.fft.rfft2(pictures).abs().square()
    down = torch.fft.fftfreq(pictures.shape[-2]).abs()
    across = torch.fft.rfftfreq(pictures.shape[-1])
    return spectrum[..., torch.maximum(down[:, None], across) >= 0.25].sum()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of road12-masks-lt")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--pictures", type=int, default=256, help="training pictures; half as many for validation")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    main()
