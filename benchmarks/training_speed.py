"""Is tailfin's Faster R-CNN as fast and as small as torchvision's own, in training and in inference?

    python benchmarks/training_speed.py                                   # R18-FPN, 160 px, 16 pictures, 31 classes
    python benchmarks/training_speed.py --short [--precision bf16 --channels-last]
    python benchmarks/training_speed.py --r50                             # R50-FPN, 800 px, 2 pictures, 1,203 classes
    python benchmarks/training_speed.py --r50 --device cuda --batch 16 --precision bf16

The peer is `torchvision.models.detection.FasterRCNN` of the installed torchvision on its own backbone, with the same
anchors, samplers and thresholds, in the same process, on the same pictures, boxes and starting weights. The two take
turns (A B, B A, ...), so that a machine that slows down slows both; the ratio is the median of the rounds' ratios.
tailfin's step is the engine's (Accelerate, finite check, clipping), the peer's the same lines in plain torch. Loading
and augmenting pictures is not part of it. Targets: at least 0.95 of torchvision's images per second, at most 1.05 of
its memory.

Peak memory comes from fresh processes, three per detector: growth of the resident set on the CPU, the allocator's own
peak on a GPU. Inference is measured with 31 and with 1,203 classes, with logits spread like those of a trained
classifier; the number of candidates above the score threshold is printed, since it decides what NMS costs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
import torchvision
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table
from short_form import short, table_lines
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN as TorchvisionFasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from tailfin.config import load_recipe
from tailfin.engine import detector_step
from tailfin.models import build_detector
from tailfin.models.backbones import pyramid_backbone, resnet_body
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.folding import for_inference
from tailfin.models.frozen_norms import FrozenNorm, separate
from tailfin.models.images import batch_images
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

SMALL, LARGE = "fod/faster_rcnn_r18_softmax", "lvis_v1/faster_rcnn_r50"
NAMES = ("tailfin", "torchvision")
RATE, CLIP = 1e-3, 10.0
LOGIT_SPREAD, DELTA_SPREAD = 3.0, 0.2  # standard deviations of logits (over the classes) and box deltas in inference

Targets = list[dict[str, Tensor]]
Step = Callable[[], object]


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    if options.memory:
        print(json.dumps(peak_memory(options.memory, options)))
        return
    recipe, pictures, _ = workload(options)
    hardware = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"{recipe.backbone}-FPN, {len(pictures)} pictures of {options.size} px, precision {options.precision}, "
        f"channels last {options.channels_last}; {hardware}; torch {torch.__version__}; "
        f"peer torchvision {torchvision.__version__} FasterRCNN; {options.rounds} rounds of {options.steps} steps, "
        f"{'CPU' if options.cpu_time else 'wall-clock'} seconds"
    )
    table = Table()
    for name in ("", "tailfin", "torchvision", "ratio", "over the rounds", "target"):
        table.add_column(name, justify="left" if name == "" else "right")
    if not options.skip_training:
        speed_row(table, "training, images/s", options, training_pair(options), "at least 0.95")
    if not options.skip_memory:
        memory_row(table, options)
    for classes in options.inference:
        first, second, candidates = inference_pair(options, classes)
        title = f"inference, {classes:,} classes, images/s\n({candidates:,.0f} candidates per picture)"
        speed_row(table, title, options, (first, second), "")
    Console(width=130).print(table)
    if options.short:
        detector = f"Faster R-CNN R{50 if options.r50 else 18}"
        what = f"{detector}, {options.batch} x {options.size} px, {options.precision_name}: "
        table_lines(table, what, spread=4, who="torchvision")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r50", action="store_true", help=f"the detector of {LARGE}, 800 px, 2 pictures")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels")
    parser.add_argument("--batch", type=int, help="pictures per step")
    parser.add_argument("--classes", type=int, help="classes in training")
    parser.add_argument("--inference", type=int, nargs="*", default=[31, 1203], help="classes in inference")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help="steps of one detector per round")
    parser.add_argument(
        "--cpu-time", action="store_true", help="CPU seconds instead of the wall clock: for a machine with other work"
    )
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--skip-memory", action="store_true")
    parser.add_argument("--memory", choices=NAMES, help=argparse.SUPPRESS)
    short(parser, threads=1, rounds=3, steps=1, cpu_time=True)
    options = parser.parse_args()
    options.precision_name = "float32" if options.precision == "no" else options.precision
    for name, small, large in (("size", 160, 800), ("batch", 16, 2), ("classes", 31, 1203), ("steps", 3, 1)):
        if getattr(options, name) is None:
            setattr(options, name, large if options.r50 else small)
    return options


# ---- the two detectors -----------------------------------------------------------------------------------------------


def torchvision_twin(model: FasterRCNN, recipe: Recipe) -> TorchvisionFasterRCNN:
    """torchvision's detector with the settings of `recipe` and a copy of `model`'s weights.

    Its classes are shifted by one (background is class 0) and it has box deltas for background too, which nothing
    reads; pictures keep the size that they come in, as in tailfin's.
    """
    config, evaluation = recipe.detector, recipe.evaluation
    body = resnet_body(recipe.backbone, norm=config.norm)
    body.freeze(config.frozen_layers)
    backbone = pyramid_backbone(body, layers=config.fpn_layers, channels=config.fpn_channels, pool=config.fpn_pool)
    for module in body.modules():  # norms as torchvision's own `resnet_fpn_backbone` has them
        if isinstance(module, nn.Conv2d):
            separate(module)
        elif isinstance(module, FrozenNorm):
            module.__class__ = FrozenBatchNorm2d
    twin = TorchvisionFasterRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), (tuple(config.anchor_ratios),) * len(config.anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=config.rpn_pre_nms[0],
        rpn_pre_nms_top_n_test=config.rpn_pre_nms[1],
        rpn_post_nms_top_n_train=config.rpn_post_nms[0],
        rpn_post_nms_top_n_test=config.rpn_post_nms[1],
        rpn_nms_thresh=config.rpn_nms,
        rpn_fg_iou_thresh=config.rpn_fg_iou,
        rpn_bg_iou_thresh=config.rpn_bg_iou,
        rpn_batch_size_per_image=config.rpn_batch,
        rpn_positive_fraction=config.rpn_fg_fraction,
        box_roi_pool=MultiScaleRoIAlign(
            [str(level) for level in range(len(config.fpn_layers))], config.roi_size, config.roi_sampling
        ),
        box_head=TwoMLPHead(config.fpn_channels * config.roi_size**2, config.head_channels),
        box_predictor=FastRCNNPredictor(config.head_channels, model.roi_heads.loss.num_logits),
        box_score_thresh=evaluation.score_threshold,
        box_nms_thresh=evaluation.nms,
        box_detections_per_img=evaluation.max_dets,
        box_fg_iou_thresh=config.roi_fg_iou,
        box_bg_iou_thresh=config.roi_fg_iou,
        box_batch_size_per_image=config.roi_batch,
        box_positive_fraction=config.roi_fg_fraction,
    )
    twin.transform = _KeepSize(1, 1, twin.transform.image_mean, twin.transform.image_std)
    twin.load_state_dict(torchvision_names(model.state_dict()))
    return twin.train(model.training)


def torchvision_names(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights or gradients of tailfin's detector by torchvision's names and order of classes."""
    renamed = {}
    for name, value in values.items():
        if ".cls_score." in name:
            value = value.roll(1, 0)
        elif ".predictor.bbox_pred." in name:
            value = torch.cat([torch.zeros_like(value[:4]), value])
        renamed[name.replace("roi_heads.head.", "roi_heads.box_head.").replace(".predictor.", ".box_predictor.")] = (
            value
        )
    return renamed


def for_torchvision(targets: Targets) -> Targets:
    """The same targets with torchvision's labels, 1..C."""
    return [{**target, "labels": target["labels"] + 1} for target in targets]


class _KeepSize(GeneralizedRCNNTransform):
    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


def workload(options: argparse.Namespace, classes: int | None = None) -> tuple[Recipe, list[Tensor], Targets]:
    """The recipe, seeded pictures float [3, H, W] in 0..1 and their boxes and labels, on the CPU."""
    changes = {
        "weights": "none",
        "detector.norm": "bn",
        "detector.frozen_layers": 0,
        "detector.box_loss": "smooth_l1",  # torchvision's
        "schedule.channels_last": options.channels_last,
    }
    recipe = load_recipe(LARGE if options.r50 else SMALL, changes)
    generator = torch.Generator().manual_seed(0)
    pictures, targets = [], []
    for _ in range(options.batch):
        coarse = torch.rand((1, 3, 8, 8), generator=generator)
        picture = nn.functional.interpolate(coarse, size=(options.size, options.size), mode="bicubic")[0]
        picture = picture + 0.1 * torch.rand(picture.shape, generator=generator)
        sides = options.size * (0.1 + 0.4 * torch.rand((6, 2), generator=generator))
        corner = (options.size - sides) * torch.rand((6, 2), generator=generator)
        labels = torch.randint(classes or options.classes, (6,), generator=generator)
        pictures.append(picture.clamp(0, 1))
        targets.append({"boxes": torch.cat([corner, corner + sides], 1), "labels": labels})
    return recipe, pictures, targets


def detector(recipe: Recipe, classes: int) -> FasterRCNN:
    """tailfin's detector with the weights of one seed."""
    torch.manual_seed(0)
    counts = [100] * classes
    model, _ = build_detector(recipe, ClassStats(image_count=counts, instance_count=counts, num_images=100 * classes))
    return model.train()


# ---- training --------------------------------------------------------------------------------------------------------


def training_pair(options: argparse.Namespace) -> tuple[Step, Step]:
    recipe, pictures, targets = workload(options)
    model = detector(recipe, options.classes)
    twin = torchvision_twin(model, recipe)
    return tailfin_step(model, pictures, targets, options), torchvision_step(twin, pictures, targets, options)


def tailfin_step(model: FasterRCNN, pictures: list[Tensor], targets: Targets, options: argparse.Namespace) -> Step:
    """One optimiser step as `tailfin.engine.fit` takes it."""
    accelerator = Accelerator(mixed_precision=options.precision, cpu=options.device == "cpu")
    pictures, targets = to_device(pictures, targets, options.device)
    wrapped, optimizer = accelerator.prepare(*placed(model, options))

    def step() -> None:
        losses = detector_step(wrapped, pictures, targets)
        loss = torch.stack(list(losses.values())).sum()
        assert math.isfinite(loss.item())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(wrapped.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def torchvision_step(
    model: TorchvisionFasterRCNN, pictures: list[Tensor], targets: Targets, options: argparse.Namespace
) -> Step:
    """The same step in plain torch, as torchvision's reference script writes it."""
    pictures, targets = to_device(pictures, for_torchvision(targets), options.device)
    model, optimizer = placed(model, options)
    scaler = torch.amp.GradScaler(options.device, enabled=options.precision == "fp16")

    def step() -> None:
        with autocast(options):
            losses = model(pictures, targets)
            loss = sum(losses.values())
        assert math.isfinite(loss.item())
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def placed(model: nn.Module, options: argparse.Namespace) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = model.to(options.device)
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model, torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)


def to_device(pictures: list[Tensor], targets: Targets, device: str) -> tuple[list[Tensor], Targets]:
    moved = [{key: value.to(device) for key, value in target.items()} for target in targets]
    return [picture.to(device) for picture in pictures], moved


def autocast(options: argparse.Namespace) -> AbstractContextManager:
    kind = torch.float16 if options.precision == "fp16" else torch.bfloat16
    return torch.autocast(options.device, kind, enabled=options.precision != "no")


# ---- inference -------------------------------------------------------------------------------------------------------


def inference_pair(options: argparse.Namespace, classes: int) -> tuple[Step, Step, float]:
    """Both detectors' steps and the mean number of candidates above the score threshold per picture."""
    recipe, pictures, targets = workload(options, classes)
    pictures, _ = to_device(pictures, targets, options.device)
    model, _ = placed(detector(recipe, classes), options)
    candidates = settle(model, pictures)
    twin, _ = placed(torchvision_twin(model, recipe), options)
    for_inference(model)  # as `tailfin predict` and exports have it; torchvision's is as it comes

    def step(chosen: nn.Module) -> Step:
        def run() -> object:
            with torch.no_grad(), autocast(options):
                return chosen(pictures)

        return run

    return step(model), step(twin), candidates


@torch.no_grad()
def settle(model: FasterRCNN, pictures: list[Tensor]) -> float:
    """Make untrained weights behave like trained ones; returns the mean number of candidates per picture.

    Running statistics come from the pictures; the last layers are scaled so that logits and deltas have their spreads.
    """
    batch = batch_images(pictures)
    for _ in range(20):
        model.backbone(batch.tensors)
    model.eval()
    features = model.backbone(batch.tensors)
    _, deltas = model.rpn.head(list(features.values()))
    model.rpn.head.bbox_pred.weight *= DELTA_SPREAD / torch.cat([level.flatten() for level in deltas]).std()
    proposals, _ = model.rpn(batch, features)[1].split()
    predictor = model.roi_heads.predictor
    logits, deltas = model.roi_heads.predict(features, proposals, batch.image_sizes)
    predictor.cls_score.weight *= LOGIT_SPREAD / logits.std(dim=1).mean()
    predictor.bbox_pred.weight *= DELTA_SPREAD / deltas.std()
    logits, _ = model.roi_heads.predict(features, proposals, batch.image_sizes)
    scores = model.roi_heads.loss.scores(logits)
    return int((scores > model.limits.score_threshold).sum()) / len(pictures)


# ---- measuring -------------------------------------------------------------------------------------------------------


def speed_row(table: Table, title: str, options: argparse.Namespace, pair: tuple[Step, Step], target: str) -> None:
    """Take turns and add the medians, in images per second, and the median ratio with its range."""
    rounds = []
    for number in range(-1, options.rounds):  # the first round warms both up
        seconds = [0.0, 0.0]
        for which in (0, 1) if number % 2 else (1, 0):
            seconds[which] = timed(pair[which], options)
        rounds.append(seconds)
    pictures = options.batch * options.steps
    speeds = [statistics.median(pictures / seconds[which] for seconds in rounds[1:]) for which in (0, 1)]
    ratios = sorted(theirs / ours for ours, theirs in rounds[1:])
    table.add_row(
        title,
        *(f"{speed:.2f}" for speed in speeds),
        f"{statistics.median(ratios):.3f}",
        f"{ratios[0]:.3f} .. {ratios[-1]:.3f}",
        target,
    )


def timed(step: Step, options: argparse.Namespace) -> float:
    """Seconds of `options.steps` steps that draw the same random numbers for both detectors."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    seconds = 0.0
    for number in range(options.steps):
        torch.manual_seed(number)
        synchronise(options)
        begin = clock()
        step()
        synchronise(options)
        seconds += clock() - begin
    return seconds


def synchronise(options: argparse.Namespace) -> None:
    if options.device == "cuda":
        torch.cuda.synchronize()


def memory_row(
    table: Table,
    options: argparse.Namespace,
    script: str = __file__,
    more: Sequence[str] = (),
    prefix: str = "",
    target: str = "at most 1.05",
) -> None:
    """Peak memory of training, median of three fresh processes each, which run `script` with `more` options."""
    # glibc gives large freed blocks back at once, so that the resident set holds what is in use and no chance gaps
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**17)}
    peaks = []
    for name in NAMES:
        command = [sys.executable, str(Path(script).resolve()), *sys.argv[1:], *more, "--memory", name]
        times = range(1 if options.short else 3)
        runs = [subprocess.run(command, check=True, capture_output=True, env=environment) for _ in times]
        found = [json.loads(run.stdout) for run in runs]
        peaks.append(statistics.median(found))
    table.add_row(
        f"{prefix}training, peak memory, MiB",
        *(f"{peak:.0f}" for peak in peaks),
        f"{peaks[0] / peaks[1]:.3f}",
        "",
        target,
    )


def peak_memory(name: str, options: argparse.Namespace) -> float:
    """MiB that three training steps add to a process that holds the libraries, the pictures and both detectors."""
    return peak_memory_of(training_pair(options)[NAMES.index(name)], options)


def peak_memory_of(step: Step, options: argparse.Namespace) -> float:
    """MiB that three steps add to this process."""
    before = resident_peak(options)
    for number in range(3):
        torch.manual_seed(number)
        step()
    return resident_peak(options) - before


def resident_peak(options: argparse.Namespace) -> float:
    """Highest memory so far in MiB; not by `ru_maxrss` on Linux, where it starts at the parent process's."""
    if options.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
