"""Is tailfin's Deformable DETR as fast in training as transformers' own model with its own loss?

    python benchmarks/detr_speed.py                         # 128 px, 16 pictures, 1 + 2 layers, 96 channels, 31 classes
    python benchmarks/detr_speed.py --short [--precision bf16]
    python benchmarks/detr_speed.py --r50                   # R50, 6 + 6 layers, 300 queries, 1,203 classes, 512 px
    python benchmarks/detr_speed.py --r50 --device cuda --size 800 --precision bf16
    python benchmarks/detr_speed.py --overfit               # sixteen pictures by heart: AP50 after the given steps

The peer is `DeformableDetrForObjectDetection` of the installed transformers around the same backbone, with the same
sizes, dropout, auxiliary losses and matching costs, on the same pictures and boxes. Its loss has no term for the
encoder's proposals; tailfin's has, and is measured with it. A step is forward, loss, backward, clipping and AdamW. The
two take turns (A B, B A, ...), so that a machine that slows down slows both; the ratio is the median of the rounds'
ratios. Target: at least 0.95 of the peer's pictures per second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from short_form import short, table_lines
from torch import Tensor, nn
from torchvision.ops import box_convert
from transformers import DeformableDetrForObjectDetection, ResNetConfig

from tailfin import evaluate
from tailfin.config import load_recipe
from tailfin.models import build_detector
from tailfin.models.deformable_detr import DeformableDETR, transformers_config
from tailfin.models.images import batch_images
from tailfin.schema.recipe import Recipe
from tailfin.stats import ClassStats

SMALL, LARGE = "fod/deformable_detr_tiny", "lvis_v1/deformable_detr_r50"
CLIP = 0.1


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    changes: dict[str, Any] = {"weights": "none", "detector.norm": "bn", "detector.frozen_layers": 0}
    if options.overfit:
        overfit(options)
        return
    recipe = load_recipe(LARGE if options.r50 else SMALL, changes)
    ours, theirs = (step_of(kind, recipe, options) for kind in ("tailfin", "transformers"))
    clock = time.process_time if options.cpu_time else time.perf_counter
    for step in (ours, theirs):
        step()
        step()
    rounds = []
    for number in range(options.rounds):
        seconds = {}
        for name, step in (("tailfin", ours), ("transformers", theirs))[:: 1 if number % 2 else -1]:
            synchronise(options.device)
            began = clock()
            for _ in range(options.steps):
                step()
            synchronise(options.device)
            seconds[name] = (clock() - began) / options.steps
        rounds.append(seconds)
    ratios = sorted(row["transformers"] / row["tailfin"] for row in rounds)
    table = Table("", "tailfin", "transformers", "ratio", "over the rounds", "target")
    speeds = [f"{options.batch / statistics.median(row[n] for row in rounds):.2f}" for n in ("tailfin", "transformers")]
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    table.add_row("training, pictures/s", *speeds, f"{statistics.median(ratios):.2f}", spread, "at least 0.95")
    print(
        f"{options.batch} pictures of {options.size} px, {options.classes} classes, precision {options.precision}, "
        f"{options.device}, {options.threads} threads, torch {torch.__version__}, "
        f"{'CPU' if options.cpu_time else 'wall-clock'} seconds"
    )
    Console(width=120).print(table)
    if options.short:
        precision = "float32" if options.precision == "no" else options.precision
        what = (
            f"Deformable DETR, {'R50' if options.r50 else 'tiny'}, {options.batch} x {options.size} px, {precision}: "
        )
        table_lines(table, what, spread=4, who="transformers")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--r50", action="store_true", help=f"the detector of {LARGE}")
    parser.add_argument("--overfit", action="store_true", help="learn sixteen pictures by heart instead")
    parser.add_argument("--size", type=int, help="side of the pictures in pixels")
    parser.add_argument("--batch", type=int, help="pictures per step")
    parser.add_argument("--classes", type=int, help="classes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("no", "bf16"), default="no")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, help="steps of one detector per round")
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds: for a machine with other work")
    short(parser, threads=1, rounds=3, steps=1, cpu_time=True)
    options = parser.parse_args()
    for name, small, large in (("size", 128, 512), ("batch", 16, 2), ("classes", 31, 1203), ("steps", 3, 1)):
        if getattr(options, name) is None:
            setattr(options, name, large if options.r50 else small)
    return options


def step_of(kind: str, recipe: Recipe, options: argparse.Namespace) -> Callable[[], object]:
    """A whole training step of one of the two detectors."""
    torch.manual_seed(0)
    stats = counted(options.classes)
    model: nn.Module = build_detector(recipe, stats)[0]
    images, targets = workload(options)
    if kind == "transformers":
        assert isinstance(model, DeformableDETR)
        model = transformers_twin(model, recipe, options.classes)
    model = model.to(options.device).train()
    if recipe.schedule.channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), 1e-5)
    enabled = options.precision == "bf16"

    def loss() -> Tensor:
        if kind == "tailfin":
            return torch.stack(list(model(images, targets).values())).sum()
        batch = batch_images(images, channels_last=recipe.schedule.channels_last)
        mask = torch.ones((len(images), *batch.tensors.shape[-2:]), dtype=torch.int64, device=options.device)
        labels = [
            {"class_labels": t["labels"], "boxes": box_convert(t["boxes"], "xyxy", "cxcywh") / options.size}
            for t in targets
        ]
        return model(batch.tensors, pixel_mask=mask, labels=labels).loss  # type: ignore[no-any-return]

    def step() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=enabled):
            value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Backbone(nn.Module):
    """Our body with the interface of transformers' backbone."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, pixels: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        maps = self.body(pixels).values()
        return [(m, nn.functional.interpolate(mask[None].float(), size=m.shape[-2:])[0].bool()) for m in maps]


def transformers_twin(model: DeformableDETR, recipe: Recipe, classes: int) -> nn.Module:
    """transformers' detector in the same size around the same backbone."""
    config = transformers_config(recipe.detector)  # type: ignore[arg-type]
    config.num_labels, config.auxiliary_loss = classes, True
    config.two_stage_num_proposals = config.num_queries
    config.class_cost, config.bbox_cost, config.giou_cost = 2, 5, 2
    widths = [projection[0].in_channels for projection in model.input_proj][:3]
    config.backbone_config = ResNetConfig(
        embedding_size=32, hidden_sizes=[32, *widths], depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    twin = DeformableDetrForObjectDetection(config)
    twin.model.backbone = Backbone(model.backbone)
    with torch.no_grad():  # the same start: likely classes and boxes that stay where they are
        for heads in {id(h): h for h in (*twin.class_embed, *(twin.model.decoder.class_embed or ()))}.values():
            heads.bias.fill_(-4.6)
        for heads in {id(h): h for h in (*twin.bbox_embed, *(twin.model.decoder.bbox_embed or ()))}.values():
            heads.layers[-1].weight.zero_()
            heads.layers[-1].bias.zero_()
    return twin


def workload(options: argparse.Namespace) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Seeded pictures of coloured rectangles with their boxes and labels."""
    generator = torch.Generator().manual_seed(0)
    images, targets = [], []
    for _ in range(options.batch):
        image = 0.4 + 0.2 * torch.rand((3, options.size, options.size), generator=generator)
        sides = (options.size * (0.15 + 0.3 * torch.rand((4, 2), generator=generator))).round()
        low = ((options.size - sides) * torch.rand((4, 2), generator=generator)).round()
        boxes = torch.cat([low, low + sides], dim=1)
        labels = torch.randint(0, options.classes, (4,), generator=generator)
        for (left, top, right, bottom), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            colour = torch.tensor([label * 37 % 101, label * 61 % 101, label * 17 % 101]) / 100
            image[:, top:bottom, left:right] = colour[:, None, None]
        images.append(image.to(options.device))
        targets.append({"boxes": boxes.to(options.device), "labels": labels.to(options.device)})
    return images, targets


def overfit(options: argparse.Namespace) -> None:
    """Learn sixteen pictures with a small two-stage detector and print AP50 on them every fifty steps."""
    options.batch, options.classes = 16, 3
    recipe = load_recipe(SMALL)
    torch.manual_seed(0)
    model = build_detector(recipe, counted(3))[0].to(options.device).train()
    images, targets = workload(options)
    optimizer = torch.optim.AdamW(model.parameters(), 6e-4)
    began = time.perf_counter()
    for step in range(1, 401):
        if step == 300:
            optimizer.param_groups[0]["lr"] *= 0.1
        value = torch.stack(list(model(images, targets).values())).sum()
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            found = ap50(model, images, targets)
            print(
                f"step {step}: loss {value.item():.2f}, AP50 {found:.3f}, {time.perf_counter() - began:.0f} s",
                flush=True,
            )


def ap50(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> float:
    """COCO's AP at IoU 0.5 on the pictures."""
    model.eval()
    with torch.inference_mode():
        found = model(images)
    model.train()
    sizes = [{"id": row, "width": image.shape[2], "height": image.shape[1]} for row, image in enumerate(images)]
    truth = [{**entry, "area": entry["bbox"][2] * entry["bbox"][3], "iscrowd": 0} for entry in entries(targets)]
    classes = [{"id": number, "name": str(number)} for number in range(3)]
    with tempfile.TemporaryDirectory() as folder:
        annotations, results = Path(folder, "truth.json"), Path(folder, "results.json")
        annotations.write_text(json.dumps({"images": sizes, "annotations": truth, "categories": classes}))
        results.write_text(json.dumps(entries(found)))
        return float(evaluate(annotations, results, protocol="coco")["bbox"]["AP50"])


def entries(per_picture: list[dict[str, Tensor]]) -> list[dict[str, Any]]:
    """Boxes of all pictures as COCO writes them."""
    found: list[dict[str, Any]] = []
    for row, own in enumerate(per_picture):
        scores = own.get("scores", torch.ones(len(own["labels"]))).tolist()
        boxes = box_convert(own["boxes"], "xyxy", "xywh").tolist()
        for box, label, score in zip(boxes, own["labels"].tolist(), scores, strict=True):
            found.append({"id": len(found) + 1, "image_id": row, "category_id": label, "bbox": box, "score": score})
    return found


def counted(classes: int) -> ClassStats:
    return ClassStats(image_count=[100] * classes, instance_count=[200] * classes, num_images=1000)


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
