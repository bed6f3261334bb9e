"""`tailfin train --dry-run`: the plan, an estimate of the memory, and one augmented batch as a picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import nn

from tailfin.data.dataset import TrainingDataset, open_source
from tailfin.data.smooth_tail import ALL, divide, planned_steps
from tailfin.errors import UserError
from tailfin.inference import category_ids_for
from tailfin.methods.stepwise import class_specific
from tailfin.models import build_detector
from tailfin.report.draw import draw_detections
from tailfin.run import batch_plan
from tailfin.schedule import learning_rate
from tailfin.schema.recipe import Recipe
from tailfin.schema.stepwise import Stepwise
from tailfin.stats import ClassStats

SHOWN = 16  # pictures of the batch
SMALLEST_DRAWING = 320  # pixels of the long side, so that names can be read


def show_plan(recipe: Recipe, out: Path | None) -> None:
    """Print what `train` would do and write `dry-run.jpg` (beside `out` where it is given)."""
    train = open_source(recipe.data.train, recipe.data.root, "train")
    stats = ClassStats.from_index(train.index, group_bounds=recipe.evaluation.group_bounds)
    if recipe.data.val.annotations:  # what training would refuse, the plan refuses too
        category_ids_for(stats.names, open_source(recipe.data.val, recipe.data.root, "val").index)
    dataset = TrainingDataset(train, recipe.data, recipe.seed)
    plan = batch_plan(recipe, dataset, stats)
    model, _ = build_detector(recipe, stats, start=recipe.weights not in ("imagenet", "none"))
    first = [dataset.sample(*key) for key in next(plan.keys(0, slice(0, 1), 1))]

    table = Table("", "", title=f"plan of {recipe.name}", title_justify="left", show_header=False)
    groups = {group: stats.frequency.count(group) for group in ("r", "c", "f")}
    schedule = recipe.schedule
    milestones = [plan.iteration_at(epoch) for epoch in schedule.milestones]
    lengths = np.diff(plan.boundaries)
    table.add_row("training images", f"{len(dataset.rows())} of {len(train.index)} in {train.index.path}")
    table.add_row("classes", f"{stats.num_classes} (rare {groups['r']}, common {groups['c']}, frequent {groups['f']})")
    stages = planned_stages(recipe, dataset, stats)
    table.add_row("method", f"{recipe.method}: {len(stages)} stage{'s' * (len(stages) > 1)}")
    for number, (name, text) in enumerate(stages, start=1):
        table.add_row(f"stage {number}, {name}", text)
    if len(stages) > 1:
        table.add_section()
        table.add_row("below", "the recipe's own schedule and detector: its stage on all annotations")
    table.add_row("iterations", f"{plan.iterations} of {schedule.batch} images, {lengths[0]} in the first epoch")
    rates = [learning_rate(i, plan.iterations, milestones, schedule) for i in (0, schedule.warmup, plan.iterations - 1)]
    table.add_row("learning rate", f"{rates[0]:.2g} at first, {rates[1]:.2g} after the warm-up, {rates[2]:.2g} at last")
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    table.add_row("parameters", f"{parameters / 1e6:.1f} M, {trainable / 1e6:.1f} M of them train")
    weights, activations = memory_estimate(model, recipe, first)
    table.add_row(
        "memory, one process",
        f"about {(weights + activations) / 2**30:.2f} GiB: {weights / 2**30:.2f} for weights, gradients and optimiser, "
        f"{activations / 2**30:.2f} for {schedule.batch // schedule.accumulation} images in float32",
    )
    picture = Path(f"{out}-dry-run.jpg") if out is not None else Path("dry-run.jpg")
    picture.parent.mkdir(parents=True, exist_ok=True)
    _batch_picture(first, list(stats.names)).save(picture, quality=90)
    table.add_row("first batch", str(picture))
    Console().print(table)


def planned_stages(recipe: Recipe, dataset: TrainingDataset, stats: ClassStats) -> list[tuple[str, str]]:
    """Name and plan of every stage that `recipe` trains, in order; names are those of the stages' folders."""

    def described(stage: Recipe, own: TrainingDataset = dataset) -> str:
        order = batch_plan(stage, own, stats)
        return (
            f"{stage.schedule.epochs:g} epochs, {order.iterations} iterations of {stage.schedule.batch}, lr "
            f"{stage.schedule.lr:g}, loss {stage.loss.name}, sampler {stage.sampler.name}"
        )

    stages = []
    if recipe.pretraining is not None:
        stages.append(("pretrain", f"{recipe.pretraining.preset}: {described(recipe.pretraining_stage())}"))
    if recipe.stepwise is not None:
        return stages + _steps(recipe, recipe.stepwise, dataset, stats, described)
    if recipe.second is None:
        return [*stages, ("train", described(recipe))]
    trains = f"trains {', '.join(recipe.second.trains)}"
    second = f"{described(recipe.second_stage())}, {trains}"
    return [*stages, ("representation", described(recipe)), ("classifier", second)]


def _steps(
    recipe: Recipe, settings: Stepwise, whole: TrainingDataset, stats: ClassStats, described: Callable[..., str]
) -> list[tuple[str, str]]:
    """The steps of step-wise learning. Which pictures the exemplars are in is known once step 0 is trained: the number
    of annotations is that which the step's counts allow."""
    parts = divide(stats.image_count, settings.division, settings.boundary)
    stages, source = [], whole.source
    if settings.base != "given":
        kept = (parts == 0)[source.index.labels] if settings.base == "head" else None
        base = recipe.base_step()
        stages = [("base", described(base, TrainingDataset(source, base.data, base.seed, kept=kept)))]
    for step in planned_steps(settings, parts):
        config, own = step.config, int(step.own.sum())
        trains = ", ".join(config.trains or class_specific(recipe))
        counts = np.where(step.counts == ALL, stats.instance_count, np.minimum(step.counts, stats.instance_count))
        text = (
            f"{config.epochs:g} epochs, lr {config.lr:g}, {own} classes of its own, at most {int(counts.sum())} "
            f"annotations, repeat factors {config.rfs.name}, trains {trains}"
        )
        taught = config.distillation is not None and step.old.any()
        stages.append((step.name, text + (", taught by the step before" if taught else "")))
    return stages


def memory_estimate(
    model: nn.Module, recipe: Recipe, samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
) -> tuple[int, int]:
    """(bytes of weights, gradients and optimiser; bytes that the backward pass keeps for a micro-batch, float32).

    The second is measured on the largest picture of the first batch and multiplied; what a kernel needs for the moment,
    and the allocator's waste, come on top.
    """
    weights = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    trainable = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    states = 2 if recipe.schedule.optimizer == "adamw" else 1
    image, target = max(samples, key=lambda sample: sample[0].shape[-1] * sample[0].shape[-2])
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    model.train()
    held = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held.append(model([image], [target]))
    activations = sum(size for pointer, size in kept.items() if pointer not in own)
    if not held:
        raise UserError("the detector returned no losses")
    return weights + trainable * (1 + states), activations * (recipe.schedule.batch // recipe.schedule.accumulation)


def _batch_picture(samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]], names: list[str]) -> Image.Image:
    """The augmented pictures of a batch with their boxes, in a grid."""
    drawn = [
        draw_detections(
            image.permute(1, 2, 0).numpy(),
            target["boxes"].numpy(),
            target["labels"].numpy(),
            names,
            size=max(SMALLEST_DRAWING, *image.shape[-2:]),
        )
        for image, target in samples[:SHOWN]
    ]
    height, width = max(p.height for p in drawn), max(p.width for p in drawn)
    padded = torch.zeros((len(drawn), 3, height, width), dtype=torch.uint8)
    for row, picture in zip(padded, drawn, strict=True):
        row[:, : picture.height, : picture.width] = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    grid = torchvision.utils.make_grid(padded, nrow=max(1, round(len(drawn) ** 0.5)), padding=4, pad_value=255)
    return Image.fromarray(grid.permute(1, 2, 0).numpy())
