"""What BACL costs beside a plain detector: inference with a classifier that floods NMS, and the classifier stage.

    python benchmarks/bacl_cost.py                       # all parts, about four minutes on one core
    python benchmarks/bacl_cost.py --parts inference --rounds 9
    python benchmarks/bacl_cost.py --parts training memory
    python benchmarks/bacl_cost.py --short

Inference: one detector (R18-FPN of the small recipes, 300 proposals a picture) with two heads that differ in the
classifier alone: plain softmax with logits spread like a trained one's, and BACL's sigmoid head with logits so level
that nearly every proposal passes the threshold of 1e-4 with every class. Both go through tailfin's selection; a third
line is BACL's head with NMS over every candidate (torchvision's `batched_nms`), which gives the same detections:
checked here, picture by picture. BACL's paper reports 0.36 of the baseline's pictures per second (1.2 against 3.3);
target: 0.9.

Training: the two stages of `fod/bacl_r18` on the same pictures and batch, the engine's step, hallucination included.
Target: a step of stage 2 takes at most 0.6 of one of stage 1. Memory: growth of the resident set over three steps in
processes of their own, and the bytes that autograd keeps for the backward pass, without weights. Target: below stage 1.

All take turns (A B, B A, ...), so that other work on the machine slows both; ratios are medians over the rounds, times
CPU seconds of this process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from short_form import short, table_lines
from torch import Tensor, nn
from torchvision.ops import batched_nms
from training_speed import Targets, detector, peak_memory_of, settle, tailfin_step, workload

from tailfin.config import load_recipe
from tailfin.engine import detector_step
from tailfin.methods.decoupled import second_detector
from tailfin.models import build_detector
from tailfin.models import detections as selection
from tailfin.models.detector import Limits
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.heads import roi_heads
from tailfin.schema.stages import stages as recipe_stages
from tailfin.stats import ClassStats

RECIPE = "fod/bacl_r18"
STAGES = ("stage 1", "stage 2")
LEVEL, SPREAD = -4.0, 1.5  # of the balanced classifier's logits: a score of about 0.02, 1e-4 lies 3.5 spreads below

Step = Callable[[], object]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(peak_memory_of(training_steps(options)[options.child], options)))
        return
    table = Table(title=f"{options.threads} threads, torch {torch.__version__}, {options.rounds} rounds, CPU seconds")
    for name in ("", "BACL", "plain", "ratio", "over the rounds", "target"):
        table.add_column(name, justify="left" if name == "" else "right")
    if "inference" in options.parts:
        for classes in options.classes:
            inference_rows(table, options, classes)
    if "training" in options.parts:
        training_row(table, options)
    if "memory" in options.parts:
        memory_rows(table, options)
    Console(width=130).print(table)
    if options.short:
        table_lines(table, "BACL: ", spread=4, who="plain, or stage 1")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=("inference", "training", "memory"), default=None)
    parser.add_argument("--classes", type=int, nargs="*", default=[31, 1203], help="classes in inference")
    parser.add_argument("--proposals", type=int, default=300, help="proposals per picture in inference")
    parser.add_argument("--size", type=int, default=160, help="side of the pictures in pixels")
    parser.add_argument("--batch", type=int, default=16, help="pictures per training step")
    parser.add_argument("--pictures", type=int, default=8, help="pictures of one round in inference")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--child", choices=STAGES, help=argparse.SUPPRESS)
    short(parser, rounds=3, pictures=2)
    options = parser.parse_args()
    options.parts = options.parts or ["inference", "training", "memory"]
    # what the functions of training_speed.py ask for
    options.r50, options.device, options.channels_last, options.steps = False, "cpu", True, 1
    return options


# ---- inference -------------------------------------------------------------------------------------------------------


def inference_rows(table: Table, options: argparse.Namespace, classes: int) -> None:
    plain, balanced, pictures = inference_pair(options, classes)
    check_equal(balanced, pictures)
    steps = {
        "plain": lambda: predict(plain, pictures),
        "balanced": lambda: predict(balanced, pictures),
        "naive": lambda: predict(balanced, pictures, every_candidate),
    }
    seconds = rounds_of(steps, options.rounds)
    candidates = [count_candidates(model, pictures) for model in (balanced, plain)]
    title = (
        f"inference, {classes:,} classes, images/s\n({candidates[0]:,.0f} candidates a picture, {candidates[1]:,.0f})"
    )
    row(table, title, len(pictures), seconds["balanced"], seconds["plain"], "at least 0.9")
    row(table, "  with NMS over all candidates", len(pictures), seconds["naive"], seconds["plain"], "")


def inference_pair(options: argparse.Namespace, classes: int) -> tuple[FasterRCNN, FasterRCNN, list[Tensor]]:
    """The plain detector, and the same one with BACL's head, and pictures."""
    small = argparse.Namespace(**{**vars(options), "batch": options.pictures})
    recipe, pictures, _ = workload(small, classes)
    changes = {"rpn_pre_nms": (1000, 1000), "rpn_post_nms": (1000, options.proposals)}
    recipe = recipe.model_copy(update={"detector": recipe.detector.model_copy(update=changes)})
    plain = detector(recipe, classes)
    plain.to(memory_format=torch.channels_last)
    settle(plain, pictures)
    balanced, _ = build_detector(
        recipe.model_copy(update={"loss": load_recipe(RECIPE).second.loss}), stats_of(classes), start=False
    )
    assert isinstance(balanced, FasterRCNN)
    balanced.load_state_dict(
        {key: value for key, value in plain.state_dict().items() if ".loss." not in key}, strict=False
    )
    balanced.to(memory_format=torch.channels_last).eval()
    level(balanced, pictures)
    return plain.eval(), balanced, pictures


@torch.no_grad()
def level(model: FasterRCNN, pictures: list[Tensor]) -> None:
    """Logits of every class about LEVEL with SPREAD, the background's at 0: a balanced classifier."""
    predictor = model.roi_heads.predictor.cls_score
    logits = torch.cat([logits_of(model, [picture]) for picture in pictures])
    predictor.weight *= SPREAD / logits.std(dim=0).mean()
    predictor.bias.zero_()
    logits = torch.cat([logits_of(model, [picture]) for picture in pictures])
    predictor.bias.copy_(LEVEL - logits.mean(dim=0))
    predictor.bias[-1] -= LEVEL


def logits_of(model: FasterRCNN, pictures: list[Tensor]) -> Tensor:
    from tailfin.models.images import batch_images

    batch = batch_images(pictures, channels_last=True)
    features = model.backbone(batch.tensors)
    proposals, _ = model.rpn(batch, features)[1].split()
    return model.roi_heads.predict(features, proposals, batch.image_sizes)[0]


@torch.no_grad()
def count_candidates(model: FasterRCNN, pictures: list[Tensor]) -> float:
    """Proposals times classes above the threshold, mean per picture."""
    heads = model.roi_heads
    return statistics.mean(
        int((heads.loss.scores(logits_of(model, [picture])) > model.limits.score_threshold).sum())
        for picture in pictures
    )


@torch.no_grad()
def predict(model: FasterRCNN, pictures: list[Tensor], select: Callable | None = None) -> list[dict[str, Tensor]]:
    """Detections picture by picture, with another selection for the while."""
    before = roi_heads.select_detections
    roi_heads.select_detections = select or before
    try:
        return [model([picture])[0] for picture in pictures]
    finally:
        roi_heads.select_detections = before


def every_candidate(
    proposals: Tensor,
    scores: Tensor,
    deltas: Tensor,
    box_coder: Any,
    image_size: tuple[int, int],
    limits: Limits,
) -> dict[str, Tensor]:
    """What the selection stands for: decode everything, one NMS per class over all candidates, keep the best."""
    score_threshold, max_dets, nms_iou = limits
    classes = scores.shape[1]
    boxes = box_coder.decode_single(deltas.flatten(1), proposals).view(len(proposals), -1, 4).expand(-1, classes, 4)
    height, width = image_size
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
    rows, labels = torch.where(scores > score_threshold)
    boxes, scores = boxes[rows, labels], scores[rows, labels]
    solid = ((boxes[:, 2:] - boxes[:, :2]) >= selection.MIN_SIDE).all(dim=1)
    boxes, scores, labels = boxes[solid], scores[solid], labels[solid]
    keep = batched_nms(boxes.double(), scores.double(), labels, nms_iou)[:max_dets]
    return {"boxes": boxes[keep], "scores": scores[keep], "labels": labels[keep]}


def check_equal(model: FasterRCNN, pictures: list[Tensor]) -> None:
    """Both selections give the same detections."""
    for fast, slow in zip(predict(model, pictures), predict(model, pictures, every_candidate), strict=True):
        assert len(fast["scores"]) == model.limits.max_dets
        for key in ("scores", "labels"):
            assert torch.equal(fast[key], slow[key]), f"the selections differ in {key}"
        torch.testing.assert_close(fast["boxes"], slow["boxes"])


# ---- training --------------------------------------------------------------------------------------------------------


def training_steps(options: argparse.Namespace) -> dict[str, Step]:
    """One optimiser step of each stage on the same pictures."""
    models, pictures, targets = stages(options)
    return {name: tailfin_step(model, pictures, targets, options) for name, model in zip(STAGES, models, strict=True)}


def stages(options: argparse.Namespace) -> tuple[tuple[FasterRCNN, FasterRCNN], list[Tensor], Targets]:
    _, pictures, targets = workload(options, 31)
    recipe, stats = load_recipe(RECIPE), stats_of(31)
    torch.manual_seed(0)
    first, _ = build_detector(recipe, stats, start=False)
    own = next(stage.recipe for stage in recipe_stages(recipe) if stage.name == "classifier")
    second = second_detector(recipe, own, stats, first)
    assert isinstance(first, FasterRCNN) and isinstance(second, FasterRCNN)
    assert second.roi_heads.extra_rows is not None
    return (first.train(), second.train()), pictures, targets


def training_row(table: Table, options: argparse.Namespace) -> None:
    steps = training_steps(options)
    seconds = rounds_of(steps, options.rounds, warm=3)
    ratios = sorted(second / first for first, second in zip(*seconds.values(), strict=True))
    first, second = (options.batch / statistics.median(seconds[name]) for name in STAGES)
    table.add_row(
        f"training, stage 2 | stage 1, images/s\n(time of a step: ratio; {options.batch} x {options.size} px)",
        f"{second:.1f}",
        f"{first:.1f}",
        f"{statistics.median(ratios):.3f}",
        f"{ratios[0]:.3f} .. {ratios[-1]:.3f}",
        "at most 0.6",
    )


def memory_rows(table: Table, options: argparse.Namespace) -> None:
    # glibc gives large freed blocks back at once, so that the resident set holds what is in use and no chance gaps
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    peaks = {}
    for name in STAGES:
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", name]
        times = range(1 if options.short else 3)
        runs = [subprocess.run(command, check=True, capture_output=True, env=environment) for _ in times]
        peaks[name] = statistics.median(json.loads(run.stdout) for run in runs)
    models, pictures, targets = stages(options)
    kept = {name: saved_bytes(model, pictures, targets, options) for name, model in zip(STAGES, models, strict=True)}
    for title, values in (("peak memory of three steps, MiB", peaks), ("kept for the backward pass, MiB", kept)):
        table.add_row(
            f"training, stage 2 | stage 1, {title}",
            f"{values['stage 2']:.0f}",
            f"{values['stage 1']:.0f}",
            f"{values['stage 2'] / values['stage 1']:.3f}",
            "",
            "below 1",
        )


def saved_bytes(model: nn.Module, pictures: list[Tensor], targets: Targets, options: argparse.Namespace) -> float:
    """MiB of the storages that autograd keeps from one forward pass, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    torch.manual_seed(0)
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=options.precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        losses = detector_step(model, pictures, targets)
    assert torch.stack(list(losses.values())).sum().requires_grad
    return sum(kept.values()) / 2**20


# ---- details ---------------------------------------------------------------------------------------------------------


def stats_of(classes: int) -> ClassStats:
    counts = [100] * classes
    return ClassStats(image_count=counts, instance_count=counts, num_images=100 * classes)


def rounds_of(steps: dict[str, Step], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """CPU seconds of each step in every round, the order turned round each time."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(-warm, rounds):
        for name in list(steps) if number % 2 else reversed(list(steps)):
            torch.manual_seed(number + warm)
            begin = time.process_time()
            steps[name]()
            if number >= 0:
                seconds[name].append(time.process_time() - begin)
    return seconds


def row(table: Table, title: str, pictures: int, ours: Sequence[float], theirs: Sequence[float], target: str) -> None:
    ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
    table.add_row(
        title,
        *(f"{pictures / statistics.median(seconds):.1f}" for seconds in (ours, theirs)),
        f"{statistics.median(ratios):.3f}",
        f"{ratios[0]:.3f} .. {ratios[-1]:.3f}",
        target,
    )


if __name__ == "__main__":
    main()
