"""`tailfin train --dry-run`: the plan, an estimate of the memory, and one augmented batch as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tailfin.data.dataset import TrainingDataset, open_source, unchecked_note
from tailfin.data.index import AnnotationIndex
from tailfin.data.smooth_tail import ALL, PlannedStep, planned_steps
from tailfin.errors import printable
from tailfin.files import writing
from tailfin.inference import check_kinds, check_validation
from tailfin.memory import TrainingMemory, training_memory, watched_step
from tailfin.methods.plan import StageModel, stage_models
from tailfin.methods.stepwise import class_parts
from tailfin.plan_notes import plan_notes, shared_pictures_note
from tailfin.processes import check_trackers
from tailfin.report.draw import draw_detections
from tailfin.run import batch_plan, run_folder
from tailfin.schedule import learning_rate
from tailfin.schema.data import Data
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import CLASS_SPECIFIC, PRETRAIN, stages
from tailfin.stats import ClassStats

SHOWN = 16  # pictures of the batch
SMALLEST_DRAWING = 320  # pixels of the long side, so that names can be read


def show_plan(recipe: Recipe, out: Path | None, *, overwrite: bool = False) -> None:
    """Print what `train` would do and write `dry-run.jpg` (beside `out` where it is given); what training would refuse
    before its first iteration is refused here too."""
    run_folder(out, recipe, overwrite=overwrite)
    check_trackers(recipe)
    train = open_source(recipe.data.train, recipe.data.root, "train")
    stats = ClassStats.from_index(train.index, group_bounds=recipe.evaluation.group_bounds)
    leak = ""
    if recipe.data.val.annotations:
        val = open_source(recipe.data.val, recipe.data.root, "val")
        check_validation(stats, val.index, recipe.evaluation.iou)
        leak = shared_pictures_note(train, val)
    made, memories = [], []
    for stage in stage_models(recipe, train, stats):
        check_kinds(stage.detector, recipe.evaluation.iou, "evaluation.iou")
        samples = [stage.dataset.sample(*key) for key in next(stage.plan.keys(0, slice(0, 1), 1))]
        if stage.stage.number:  # else it is given, and not trained
            memories.append((memory_estimate(stage, samples), stage.stage))
        made.append((stage, samples))
    start = made[0][0].start
    # the recipe's own sections are those of the first stage that is no pre-training
    own, first = next(pair for pair in made if pair[0].stage.name != PRETRAIN)
    model, dataset, plan = own.detector, own.dataset, own.plan

    table = Table("", "", title=Text(f"plan of {recipe.name}"), title_justify="left", show_header=False)

    def row(name: str, text: str) -> None:
        table.add_row(name, Text(printable(text, lines=False)))  # names of classes and paths are no markup

    groups = {group: stats.frequency.count(group) for group in ("r", "c", "f")}
    schedule = recipe.schedule
    milestones = [plan.iteration_at(epoch) for epoch in schedule.milestones]
    lengths = np.diff(plan.boundaries)
    row("training images", f"{len(dataset.rows())} of {len(train.index)} in {train.index.path}")
    for note in (dataset.missing_masks(), dataset.misplaced_masks()):
        if note:
            row("masks", note.removeprefix("masks: "))
    if note := unchecked_note(train, recipe.data):
        row("unchecked classes", note)
    row("classes", f"{stats.num_classes} (rare {groups['r']}, common {groups['c']}, frequent {groups['f']})")
    planned = planned_stages(recipe, dataset, stats, model.class_specific())
    for number, note in enumerate(start):
        row("start" if not number else "", note.strip())
    row("method", f"{recipe.method}: {len(planned)} stage{'s' * (len(planned) > 1)}")
    for number, (name, text) in enumerate(planned, start=1):
        row(f"stage {number}, {name}", text)
    if len(planned) > 1:
        table.add_section()
        row("below", "the recipe's own schedule and detector: its stage on all annotations")
    row("iterations", f"{plan.iterations} of {schedule.batch} images, {lengths[0]} in the first epoch")
    last = plan.iterations - 1
    rates = [learning_rate(i, plan.iterations, milestones, schedule) for i in (0, min(schedule.warmup, last), last)]
    warmed = f"{rates[1]:.2g} after the warm-up" if schedule.warmup < last else "in its warm-up to the end"
    row("learning rate", f"{rates[0]:.2g} at first, {warmed}, {rates[2]:.2g} at last")
    row("picture size", picture_size(recipe.data, train.index, first))
    if told := schedule.rate_told():
        row("its rule", told)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    row("parameters", f"{parameters / 1e6:.1f} M, {trainable / 1e6:.1f} M of them train")
    memory, largest = max(memories, key=lambda pair: pair[0].total)
    rates_of = largest.recipe.schedule
    row(
        "memory, one process",
        f"about {memory.total / 2**30:.2f} GiB{f' in stage {largest.name}' if len(planned) > 1 else ''}: "
        f"{memory.held / 2**30:.2f} for weights, gradients and optimiser, "
        f"{memory.activations / 2**30:.2f} for {rates_of.batch // rates_of.accumulation} images in float32",
    )
    picture = Path(f"{out}-dry-run.jpg") if out is not None else Path("dry-run.jpg")
    with writing(picture):
        picture.parent.mkdir(parents=True, exist_ok=True)
        _batch_picture(first, list(stats.names)).save(picture, quality=90)
    row("first batch", str(picture))
    for note in stage_notes(recipe, dataset, stats):
        row("warning", note)
    if leak:
        row("warning", leak)
    Console().print(table)


def picture_size(data: Data, index: AnnotationIndex, first: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> str:
    """At which sizes the recipe works, and which the pictures have."""
    sizes = " or ".join(map(str, data.sizes)) if len(data.sizes) < 3 else f"{min(data.sizes)} to {max(data.sizes)}"
    trained = {
        "multiscale": f"short side {sizes}, long side at most {data.max_size}",
        "square": f"fitted into {data.sizes[0]} x {data.sizes[0]}",
        "stretch": f"stretched to {data.sizes[0]} x {data.sizes[0]}",
        "jitter": f"scaled by {data.jitter_scale[0]:g} to {data.jitter_scale[1]:g}, cropped to {data.sizes[0]}",
        "detr": f"short side {sizes}, long side at most {data.max_size}, half of them cropped before",
    }[data.resize]
    short, bound = data.inference_size
    height, width = (max(image.shape[axis] for image, _ in first) for axis in (1, 2))
    usual = f"{np.median(index.widths):.0f} x {np.median(index.heights):.0f}"
    return (
        f"training: {trained} (first batch: up to {width} x {height}); test: short side {short}, long side at most "
        f"{bound}; the file's pictures: {usual} on the median"
    )


def stage_notes(recipe: Recipe, whole: TrainingDataset, stats: ClassStats) -> list[str]:
    """What to say of the stages' plans (`tailfin.plan_notes`), each thing once."""
    notes = []
    for stage in stages(recipe):
        if stage.number:
            notes += plan_notes(stage, batch_plan(stage.recipe, whole, stats))
    return list(dict.fromkeys(notes))


def planned_stages(
    recipe: Recipe, whole: TrainingDataset, stats: ClassStats, class_specific: Sequence[str]
) -> list[tuple[str, str]]:
    """Name and plan of every stage that `recipe` trains, in order.

    Which pictures the exemplars of step-wise learning are in is known once step 0 is trained: the number of annotations
    is that which the step's counts allow.
    """
    settings, later = recipe.stepwise, {}
    if settings is not None:
        parts = class_parts(recipe, stats)
        later = {step.name: step for step in planned_steps(settings, parts, stats.instance_count)}
        if settings.base == "head":
            kept = (parts == 0)[whole.source.index.labels]
            whole = TrainingDataset(whole.source, recipe.data, recipe.seed, kept=kept)
    found = []
    for stage in stages(recipe):
        trains = [part for name in stage.trains for part in (class_specific if name == CLASS_SPECIFIC else [name])]
        trained = f", trains {', '.join(trains or ['all'])}"
        if stage.name in later:
            found.append((stage.name, _step(later[stage.name], stats, stage.recipe.schedule.rate, trained)))
        elif stage.number:  # else nothing is trained
            preset = f"{recipe.pretraining.preset}: " if recipe.pretraining and stage.name == PRETRAIN else ""
            found.append((stage.name, preset + _described(stage.recipe, whole, stats) + trained * bool(trains)))
    return found


def _described(recipe: Recipe, dataset: TrainingDataset, stats: ClassStats) -> str:
    return (
        f"{recipe.schedule.epochs:g} epochs, {batch_plan(recipe, dataset, stats).iterations} iterations of "
        f"{recipe.schedule.batch}, lr {recipe.schedule.rate:.4g}, loss {recipe.loss.name}, "
        f"sampler {recipe.sampler.name}"
    )


def _step(step: PlannedStep, stats: ClassStats, rate: float, trained: str) -> str:
    config, own = step.config, int(step.own.sum())
    counts = np.where(step.counts == ALL, stats.instance_count, np.minimum(step.counts, stats.instance_count))
    taught = config.distillation is not None and step.old.any()
    return (
        f"{config.epochs:g} epochs, lr {rate:.4g}, {own} classes of its own, at most {int(counts.sum())} "
        f"annotations, repeat factors {config.rfs.name}{trained}{', taught by the step before' if taught else ''}"
    )


def memory_estimate(planned: StageModel, samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]) -> TrainingMemory:
    """At the peak of a step of a stage on a micro-batch in float32, from the largest picture of its first batch."""
    image, target = max(samples, key=lambda sample: sample[0].shape[-1] * sample[0].shape[-2])
    schedule = planned.stage.recipe.schedule
    states = 2 if schedule.optimizer == "adamw" else 1
    step = watched_step(planned.module, image, target)
    found = training_memory(planned.module, step, schedule.batch // schedule.accumulation, states)
    beside = sum(t.numel() * t.element_size() for t in planned.beside.state_dict().values()) if planned.beside else 0
    return found._replace(held=found.held + beside)


def _batch_picture(samples: list[tuple[torch.Tensor, dict[str, torch.Tensor]]], names: list[str]) -> Image.Image:
    """The augmented pictures of a batch with their boxes, and masks where they are learnt, in a grid."""
    drawn = [
        draw_detections(
            image.permute(1, 2, 0).numpy(),
            target["boxes"].numpy(),
            target["labels"].numpy(),
            names,
            masks=target["masks"].bool() & target["mask_valid"][:, None, None] if "masks" in target else None,
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
