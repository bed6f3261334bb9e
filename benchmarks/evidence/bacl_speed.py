"""BACL's table XI: pictures per second of a detector with BACL's classifier beside a plain one, R50, the paper's size.

    python benchmarks/evidence/bacl_speed.py                           # 1333 x 800, 1,000 proposals, 1,203 classes
    python benchmarks/evidence/bacl_speed.py --naive --pictures 1      # with NMS over every candidate too: minutes

The paper reports 1.2 pictures a second against 3.3 (0.36) on a GPU; on a processor only the ratio says something, and
less of it is NMS, since the backbone costs more there. The heads are not trained, they are made to behave so, as in
`bacl_cost.py`: the plain one's logits are spread like a trained softmax head's, those of BACL's sigmoid head are so
level that nearly every proposal passes the threshold with every class: the worst that a balanced classifier can do.
Both detectors share all other weights. They take turns; ratios are medians over the rounds, times CPU seconds of this
process. The parts are measured apart as well: all before the selection of detections, and the selection.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts beside this folder

from bacl_cost import RECIPE, count_candidates, every_candidate, level, predict, rounds_of, stats_of  # noqa: E402
from training_speed import LARGE, detector, settle  # noqa: E402

from tailfin.config import load_recipe  # noqa: E402
from tailfin.models import build_detector  # noqa: E402
from tailfin.models.faster_rcnn import FasterRCNN  # noqa: E402

SETTLING = (400, 400)  # of the pictures that running statistics come from: 20 passes


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    plain, balanced, pictures = pair(options)
    candidates = [count_candidates(model, pictures) for model in (balanced, plain)]
    steps = {"plain": lambda: predict(plain, pictures), "balanced": lambda: predict(balanced, pictures)}
    if options.naive:
        steps["naive"] = lambda: predict(balanced, pictures, every_candidate)
    trunk = {"trunk": lambda: outputs(plain, pictures)}
    seconds = rounds_of({**steps, **trunk}, options.rounds)
    title = (
        f"R50-FPN, {options.size[1]} x {options.size[0]}, {options.proposals:,} proposals, {options.classes:,} classes"
    )
    table = Table(title=f"{title}; {options.threads} threads, {options.rounds} rounds, CPU seconds")
    for name in ("pictures per second", "BACL", "plain", "ratio", "over the rounds", "paper"):
        table.add_column(name, justify="left" if name.startswith("pictures") else "right")
    titles = {
        "balanced": f"inference ({candidates[0]:,.0f} candidates a picture, {candidates[1]:,.0f})",
        "naive": "  with NMS over all candidates",
    }
    for name in list(steps)[1:]:
        ratios = sorted(plain / own for own, plain in zip(seconds[name], seconds["plain"], strict=True))
        each = [len(pictures) / statistics.median(seconds[own]) for own in (name, "plain")]
        middle = f"{statistics.median(ratios):.3f}"
        paper = "0.36" if name == "balanced" else ""
        span = f"{ratios[0]:.3f} to {ratios[-1]:.3f}"
        table.add_row(titles[name], *(f"{value:.3f}" for value in each), middle, span, paper)
    Console(width=130).print(table)
    before = statistics.median(seconds["trunk"]) / len(pictures)
    for name in steps:
        own = statistics.median(seconds[name]) / len(pictures)
        print(f"{name}: {own:.2f} s a picture, {max(own - before, 0):.2f} s of it the selection of detections")


def pair(options: argparse.Namespace) -> tuple[FasterRCNN, FasterRCNN, list[Tensor]]:
    """The plain detector, the same with BACL's head, and pictures [3, H, W]."""
    changes = {
        "weights": "none",
        "detector.norm": "bn",
        "detector.frozen_layers": 0,
        "detector.rpn_pre_nms": [2000, options.proposals],
        "detector.rpn_post_nms": [1000, options.proposals],
        "schedule.channels_last": True,
    }
    recipe = load_recipe(LARGE, changes)
    plain = detector(recipe, options.classes).to(memory_format=torch.channels_last)
    settle(plain, drawn(2, SETTLING))
    loss = load_recipe(RECIPE).second.loss
    balanced, _ = build_detector(recipe.model_copy(update={"loss": loss}), stats_of(options.classes), start=False)
    assert isinstance(balanced, FasterRCNN)
    shared = {key: value for key, value in plain.state_dict().items() if ".loss." not in key}
    balanced.load_state_dict(shared, strict=False)
    balanced.to(memory_format=torch.channels_last).eval()
    pictures = drawn(options.pictures, tuple(options.size))
    level(balanced, pictures)
    return plain.eval(), balanced, pictures


def drawn(number: int, size: tuple[int, int]) -> list[Tensor]:
    """Seeded pictures float [3, H, W] with something to see at every scale."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(number):
        picture = 0.1 * torch.rand((3, *size), generator=generator)
        for cells in (4, 16, 64):
            coarse = torch.rand((1, 3, cells, cells), generator=generator)
            picture += 0.3 * torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")[0]
        found.append(picture.clamp(0, 1))
    return found


@torch.no_grad()
def outputs(model: FasterRCNN, pictures: list[Tensor]) -> None:
    """All that comes before the selection of detections."""
    for picture in pictures:
        model.outputs([picture])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=2, default=[800, 1333], metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, default=1203)
    parser.add_argument("--proposals", type=int, default=1000)
    parser.add_argument("--pictures", type=int, default=2, help="of one round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--naive", action="store_true", help="NMS over every candidate too")
    return parser.parse_args()


if __name__ == "__main__":
    main()
