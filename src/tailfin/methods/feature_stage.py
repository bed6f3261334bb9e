"""A stage as its feature module wants it: a memory that is full at the start, a second stream of balanced pictures.

Most feature modules live in the box head alone (`models/features/`). Two need something of the training around:

    feature_memory    before a second stage its memory is filled, class by class, with features of the frozen detector
    meta_reweighting  every training picture brings a partner, drawn so that classes come about equally often: with
                      probability in proportion to 1 / images of its rarest class; its rows are the balanced rows
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tailfin.checkpoint import resume_point
from tailfin.data.dataset import Source, TrainingDataset, training_loader
from tailfin.engine import seed_iteration
from tailfin.errors import UserError
from tailfin.models.detector import Detector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.features import LearntWeights, RememberedRows
from tailfin.models.features.box_generator import COPIES
from tailfin.run import Run, batch_plan
from tailfin.samplers.repeat_factor import training_labels
from tailfin.schedule import learning_rate
from tailfin.schema.data import Data
from tailfin.schema.recipe import Recipe

PARTNER = "balanced_"  # what a partner's picture, boxes and labels are called in its training picture's target


def feature_stage(run: Run, name: str, model: Detector, recipe: Recipe | None = None, **options: Any) -> Detector:
    """`run.stage` with what the feature module of `model` needs; without one, or with another, just that."""
    recipe = recipe or run.recipe
    module = model.roi_heads.extra_rows if isinstance(model, FasterRCNN) else None
    if isinstance(module, RememberedRows):
        assert isinstance(model, FasterRCNN) and recipe.feature_memory is not None
        if not module.pooled and any(value.requires_grad for value in model.roi_heads.head.parameters()):
            raise UserError(
                "feature_memory.stores: the shared layers train in this stage, so what is stored behind them grows "
                "stale; set it to pooled"
            )
        if recipe.feature_memory.prefill and run.stages_done and not _begun(run.out, run.stages_done + 1, name):
            fill_memory(run, model, module, recipe)
    if isinstance(module, LearntWeights):
        dataset = PartneredDataset(run.train, recipe.data, recipe.seed)
        plan = batch_plan(recipe, dataset, run.stats)
        milestones = [plan.iteration_at(epoch) for epoch in recipe.schedule.milestones]

        def rate(epoch: float) -> float:
            return learning_rate(plan.iteration_at(epoch), plan.iterations, milestones, recipe.schedule)

        def step(model: nn.Module, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            wrapped: Any = model
            with run.accelerator.autocast():
                rows = partner_rows(getattr(wrapped, "module", wrapped), targets)
            return model(images, [{**targets[0], **rows}, *targets[1:]])

        module.rate = rate
        options = {**options, "dataset": dataset, "plan": plan, "step": step}
    return run.stage(name, model, recipe=recipe, **options)


class PartneredDataset(TrainingDataset):
    """Training samples with a second picture each, from a class-balanced stream, in the target."""

    def __init__(self, source: Source, config: Data, seed: int) -> None:
        super().__init__(source, config, seed)
        image_of, labels = np.unique(np.stack(training_labels(source.index)), axis=1)
        weights = np.zeros(len(source.index))
        np.maximum.at(weights, image_of, 1.0 / np.bincount(labels)[labels])
        self.cumulative = weights.cumsum()

    def sample(self, epoch: int, row: int, copy: int) -> tuple[Tensor, dict[str, Tensor]]:
        """As the plain one, and the partner's picture uint8 [3, h, w], boxes [m, 4] and labels [m]."""
        image, target = super().sample(epoch, row, copy)
        rng = np.random.default_rng([self.seed, 5, epoch, row, copy])
        drawn = np.searchsorted(self.cumulative, rng.random() * self.cumulative[-1], side="right")
        partner, own = self._augmented(int(drawn), rng)
        more = {"image": partner.contiguous(), "boxes": own["boxes"], "labels": own["labels"]}
        return image, {**target, **{PARTNER + key: value for key, value in more.items()}}


@torch.no_grad()
def partner_rows(model: FasterRCNN, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Shared features [M, D] and labels [M] of the partners' sampled rows; nothing in `model` changes."""
    own = [{key: target[PARTNER + key] for key in ("boxes", "labels")} for target in targets]
    pictures = [target[PARTNER + "image"] for target in targets]
    shared, labels = model.sampled_rows(pictures, own)
    return {PARTNER + "features": shared, PARTNER + "labels": labels}


@torch.no_grad()
def fill_memory(run: Run, model: FasterRCNN, module: RememberedRows, recipe: Recipe) -> None:
    """Store features of the detector as it is, until each class has had enough objects to fill its ring."""
    run.say("filling the feature memory")
    model.to(run.accelerator.device).eval()
    module.memory.train()
    dataset = TrainingDataset(run.train, recipe.data, recipe.seed)
    plan = batch_plan(recipe, dataset, run.stats)
    draws = int((run.stats.image_count > 0).sum()) * -(-module.memory.size // COPIES)
    plan = replace(plan, sampler=plan.sampler.model_copy(update={"name": "class_aware"}), epochs=draws / len(plan.rows))
    rank = run.accelerator.process_index
    batches = training_loader(
        dataset, plan, start=0, rank=rank, processes=run.accelerator.num_processes, accumulation=1
    )
    for iteration, (images, targets) in enumerate(batches):
        seed_iteration(recipe.seed, iteration, rank)
        device = run.accelerator.device
        own = [{key: target[key].to(device) for key in ("boxes", "labels")} for target in targets]
        with run.accelerator.autocast():
            _remember(model, module, [image.to(device) for image in images], own)
    model.train()


def _remember(
    model: FasterRCNN, module: RememberedRows, images: list[Tensor], targets: list[dict[str, Tensor]]
) -> None:
    pool, sizes = model.pooler(images)
    module.remember(pool, model.roi_heads.head, targets, sizes)


def _begun(out: Path, number: int, name: str) -> bool:
    """Whether the stage has a resume point or is finished: it brings its own memory."""
    folder = out / "stages" / f"{number}-{name}"
    return resume_point(folder) is not None or (folder / "model.safetensors").exists()
