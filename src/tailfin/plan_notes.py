"""What a plan of training does that its recipe cannot have meant: told before training, and by the dry run.

    plan_notes(stage, plan)   ["sampler rfs repeats no picture: ...", ...]
    shared_pictures_note(train, val)   "671 of the training pictures are validation pictures, too: ...", or ""

A sampler whose threshold is below every class's share; a warm-up that takes up much of a short run; steps of the rate
behind its end; a flip of pictures whose classes are named left and right; pictures that are mixed in one stage and not
in another; pictures that are trained on and measured on.
"""

from __future__ import annotations

import os

import numpy as np

from tailfin.data.advice import sided
from tailfin.data.dataset import Source
from tailfin.joins import listed
from tailfin.samplers.plan import BatchPlan
from tailfin.samplers.repeat_factor import class_shares, repeating_threshold
from tailfin.schedule import learning_rate
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import PRETRAIN, Stage

REPEATING = ("rfs", "irfs", "dynamic")  # samplers that repeat pictures by a threshold
LONGEST_WARMUP = 0.1  # of a run
# stages with a schedule and a sampler of the recipe -> where these are
PREFIXES = {"train": "", "representation": "", "base": "", "classifier": "second.", PRETRAIN: "pretraining."}
EVEN = 3.0  # imbalance below which nothing has to be repeated, as `data stats` says


def plan_notes(stage: Stage[Recipe], plan: BatchPlan, processes: int = 1) -> list[str]:
    """Lines about a stage of a recipe and the order of its pictures, trained by so many processes; the steps of
    step-wise learning have none."""
    if stage.name not in PREFIXES:
        return []
    prefix, recipe = PREFIXES[stage.name], stage.recipe
    found = (
        _sampler_note(plan, prefix),
        _warmup_note(recipe, plan, prefix),
        _milestones_note(recipe, prefix),
        _flip_note(recipe, plan),
        _pairs_note(recipe, prefix, processes),
        _mixing_note(stage),
    )
    return [note for note in found if note]


def shared_pictures_note(train: Source, val: Source) -> str:
    """How many pictures are in both sets; empty where none is."""
    both = shared_pictures(train, val)
    if not both:
        return ""
    return f"{both} of the training pictures are validation pictures, too: they measure nothing learnt"


def shared_pictures(one: Source, other: Source) -> int:
    """How many picture files two sets have in common."""
    return len(_picture_files(one) & _picture_files(other))


def _picture_files(source: Source) -> set[str]:
    """The files of a set's pictures, without looking whether they are there."""
    folder = os.path.realpath(source.images)
    return {os.path.join(folder, source.index.file_name(row)) for row in range(len(source.index))}  # noqa: PTH118


def _sampler_note(plan: BatchPlan, prefix: str) -> str | None:
    sampler, stats = plan.sampler, plan.stats
    if plan.factors is not None or sampler.name not in REPEATING:
        return None
    more = plan.image_factors(0) - 1
    if sampler.rounding != "stochastic":
        more = {"floor": np.floor, "ceil": np.ceil, "round": np.rint}[sampler.rounding](more)
    if more.sum() >= 1:
        return None
    share = class_shares(stats, sampler.name)
    share = np.where(stats.image_count > 0, share, np.nan)
    rarest = int(np.nanargmin(share))
    threshold = repeating_threshold(share)
    count = int(np.count_nonzero(share < threshold))
    if np.nanmax(share) < EVEN * np.nanmin(share):
        remedy = f"the classes are nearly even, {prefix}sampler=plain does the same"
    else:
        classes = "class" if count == 1 else "classes"
        remedy = f"{prefix}sampler.threshold={threshold:g} would repeat those of {count} {classes}"
    return (
        f"sampler {sampler.name} repeats no picture with its threshold {sampler.threshold:g}: the rarest class, "
        f'"{stats.names[rarest]}", is in {stats.image_count[rarest]} of {stats.num_images} images (share '
        f"{share[rarest]:.2g}); {remedy}"
    )


def _warmup_note(recipe: Recipe, plan: BatchPlan, prefix: str) -> str | None:
    schedule, total = recipe.schedule, plan.iterations
    if schedule.warmup <= max(LONGEST_WARMUP * total, 1):
        return None
    milestones = [plan.iteration_at(epoch) for epoch in schedule.milestones]
    rates = [learning_rate(iteration, total, milestones, schedule) for iteration in range(total)]
    reached = (
        f"the rate comes to {max(rates):.2g} of {schedule.lr:g} at most, " if max(rates) < 0.9 * schedule.lr else ""
    )
    part = f"{schedule.warmup / total:.0%} of" if schedule.warmup < total else "as long as, or longer than,"
    return (
        f"the warm-up of {schedule.warmup} iterations is {part} the run's {total}: "
        f"{reached}{prefix}schedule.warmup={max(1, total // 10)} is a tenth"
    )


def _mixing_note(stage: Stage[Recipe]) -> str | None:
    """Views of a pre-training are of single pictures; its recipe's `data` is that of the stages behind it."""
    data = stage.recipe.data
    mixed = [name for name in ("copy_paste", "mosaic", "mixup") if getattr(data, name)]
    if stage.name != PRETRAIN or not mixed:
        return None
    return f"the pre-training shows single pictures: data.{', data.'.join(mixed)} begin with the stage behind it"


def _milestones_note(recipe: Recipe, prefix: str) -> str | None:
    schedule, shared = recipe.schedule, recipe.pretraining is not None and recipe.pretraining.one_curve
    behind = [epoch for epoch in schedule.milestones if epoch >= schedule.epochs]
    if schedule.decay != "multistep" or not behind or len(behind) < len(schedule.milestones) or shared:
        return None
    listed_epochs = ", ".join(f"{epoch:g}" for epoch in behind)
    two_thirds = f"{schedule.epochs * 2 / 3:.3g}, {schedule.epochs * 11 / 12:.3g}"
    return (
        f"the rate never falls: {prefix}schedule.milestones=[{listed_epochs}] are not before the end of the "
        f"{schedule.epochs:g} epochs; {prefix}schedule.milestones=[{two_thirds}] are at the shares of a 1x schedule"
    )


def _flip_note(recipe: Recipe, plan: BatchPlan) -> str | None:
    names = sided(plan.stats.names)
    if not names or not recipe.data.flip:
        return None
    return (
        f"data.flip={recipe.data.flip:g} mirrors pictures and keeps their classes, of which {listed(names)} "
        f"{'has' if len(names) == 1 else 'have'} a side in the name: data.flip=0 turns it off"
    )


def _pairs_note(recipe: Recipe, prefix: str, processes: int) -> str | None:
    """BAGS' means are over every two pictures of a call; a picture that is alone has one to itself."""
    schedule, loss = recipe.schedule, recipe.loss
    pictures = schedule.batch // (schedule.accumulation * processes)
    if loss.name != "bags" or loss.options.get("per", "batch") != "batch" or pictures != 1:
        return None
    return (
        "loss bags: a process has one picture at a time, so its means are over one and not over two, and few of them "
        f"have rows of a rare bin: a larger {prefix}schedule.batch, or a smaller {prefix}schedule.accumulation"
    )
