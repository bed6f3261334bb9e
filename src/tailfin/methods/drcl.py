"""2DRCL before any method, and the pre-trainings that it is compared with (`pretraining.preset`).

Duan et al., "Long-Tailed Object Detection Pre-training: Dynamic Rebalancing Contrastive Learning with Dual
Reconstruction" (NeurIPS 2024), in the order of its section 3:

    3.1    holistic and local contrast: two views with boxes     data/views.py, pretraining/image.py, box.py
    3.2    dynamic rebalancing, anew each epoch                  samplers/repeat_factor.py
    3.3    dual reconstruction                                   pretraining/reconstruction.py
    eq. 8  their sum with the detector's losses                  pretraining/shell.py
    4.1    fine-tuning goes on from the detector                 `transfer`

`start(run)` is what a method begins with instead of `run.detector()`: where the recipe has a section `pretraining`, it
is stage 1 of the run, and the detector that it returns has all parts of that stage, but a new classifier and box layer
where the recipe's loss is not that of the pre-training (`keeps_predictor`). RUN/pretrained.safetensors holds the same
for other recipes (`weights: FILE`).
"""

from __future__ import annotations

import io
from collections import Counter
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from tailfin.checkpoint import save_model
from tailfin.data.dataset import Source
from tailfin.data.proposals import ProposalSource, open_proposals
from tailfin.data.views import PretrainingDataset
from tailfin.files import write_atomic
from tailfin.models import build_detector
from tailfin.models.dense import DenseDetector
from tailfin.models.detector import Detector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.pretraining.look import look, unexplained
from tailfin.pretraining.shell import PreTrainer
from tailfin.processes import on_main
from tailfin.run import Run, batch_plan
from tailfin.samplers.plan import BatchPlan
from tailfin.schema.pretraining import Pretraining, Proposals
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import keeps_predictor
from tailfin.stats import ClassStats
from tailfin.weights import load_fitting, state_of

ANEW = ("classifier", "box")  # parts of a detector that fine-tuning starts anew
EMPTY = 0.9  # of the pictures' variance left by the generator: it draws next to nothing
MASKS, MASK_PREDICTOR = "mask.", "mask.predictor."  # the mask branch, which the detector's own losses alone train


def start(run: Run) -> Detector:
    """The detector that a method starts from, pre-trained where the recipe says so."""
    config = run.recipe.pretraining
    if config is None:
        return run.detector()
    recipe = run.planned("pretrain").recipe
    proposals, dataset = views(run.train, recipe, config)  # 3.1
    plan = rebalanced(run.train, run.stats, recipe, config, proposals, dataset)  # 3.2
    shell = terms(run.detector(recipe), recipe, config, plan)  # 3.1, 3.3, eq. 8
    run.say(f"pre-training {config.preset}: {config.described()}")
    if few := config.normed_by_few(recipe.schedule.batch // recipe.schedule.accumulation):
        run.say(f"warning: {few}")
    product = run.stage("pretrain", shell, recipe=recipe, dataset=dataset, plan=plan, product="detector")
    parts = transferred(product, config, keeps_predictor(run.recipe))
    on_main(run.accelerator, lambda: write(run, recipe, config, shell, dataset, product, parts))
    return transfer(run, product, parts)


def transferred(detector: Detector, config: Pretraining, predictor: bool) -> tuple[str, ...]:
    """Names of the weights that fine-tuning goes on with: all that was trained but the classifier, the box layer and
    the last layer of masks; with `predictor` these too."""
    kept = [part for name, part in detector.parts().items() if predictor or name not in ANEW]
    untrained = MASKS if not config.detects or config.det_loss != "class_aware" else MASK_PREDICTOR
    left_out = () if predictor and untrained == MASK_PREDICTOR else (untrained,)
    return tuple(sorted(name for name in state_of(detector, *kept) if not name.startswith(left_out)))


def views(source: Source, recipe: Recipe, config: Pretraining) -> tuple[ProposalSource, PretrainingDataset]:
    """3.1: two views of every picture, and boxes of any class that both show."""
    wanted = config.proposals if config.uses_proposals else Proposals(source="gt")  # image terms need no file
    proposals = open_proposals(wanted, source, recipe.data.root)
    options = {"third": config.third_view, "weak": config.weak_view, "overlap": config.needs_overlap}
    dataset = PretrainingDataset(source, recipe.data, recipe.seed, config.views, proposals, **options)
    return proposals, dataset


def rebalanced(
    source: Source,
    stats: ClassStats,
    recipe: Recipe,
    config: Pretraining,
    proposals: ProposalSource,
    dataset: PretrainingDataset,
) -> BatchPlan:
    """3.2: batches by `sampler`; `dynamic` moves from the share of images to that of instances (eq. 4)."""
    if config.sampler.instance_source == "proposal":
        stats = replace(stats, instance_count=proposals.instances(source.index))
    return batch_plan(recipe, dataset, stats)


def terms(detector: Detector, recipe: Recipe, config: Pretraining, plan: BatchPlan) -> PreTrainer:
    """3.1, 3.3 and eq. 8: the detector with contrast, reconstruction and its own losses around it."""
    return PreTrainer(
        cast(FasterRCNN | DenseDetector, detector),  # the schema lets no other through
        config,
        iterations=plan.iterations,
        accumulation=recipe.schedule.accumulation,
        diagnose_every=recipe.logging.every * recipe.schedule.accumulation,
    )


def write(
    run: Run,
    recipe: Recipe,
    config: Pretraining,
    shell: PreTrainer,
    dataset: PretrainingDataset,
    product: Detector,
    parts: tuple[str, ...],
) -> None:
    """The pictures for the report and the weights for other recipes, each once."""
    pictures = run.out / "stages" / "1-pretrain" / "pictures.npz"
    if not pictures.exists() and int(shell.step):  # a stage that was finished before has no shell any more
        arrays: dict[str, Any] = look(shell, dataset)
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(pictures, buffer.getvalue())
        if config.weights.sr and (left := unexplained(arrays)) is not None and left > EMPTY:
            run.say(
                f"warning: the generator leaves {left:.2f} of the pictures' variance, 1 is a flat colour: SR compared "
                "features with those of an empty picture; raise pretraining.weights.ar, train longer, or leave SR out "
                "(pretraining.weights.sr=0)"
            )
    exported = run.out / "pretrained.safetensors"
    if not exported.exists():
        save_model(exported, product, recipe, run.stats, parents=run.parents, parts=parts)


def transfer(run: Run, trained: Detector, parts: tuple[str, ...]) -> Detector:
    """A fresh detector of the recipe with the weights of `trained` whose names start with one of `parts`."""
    torch.manual_seed(run.recipe.seed)  # new weights must not depend on whether the stage ran just now or was loaded
    model, _ = build_detector(run.recipe, run.stats, start=False)
    loaded = load_fitting(model, trained.state_dict(), lambda name: name.startswith(parts))
    run.say(f"pre-training: {len(loaded.names)} weights loaded {_parts(loaded.names)}")
    for what, keys in (("dropped", loaded.dropped), ("new", loaded.missing)):
        if keys:
            run.say(f"  {what}: {len(keys)} {_parts(keys)}")
    return model


def _parts(keys: Any) -> str:
    """How many of the weights are in which part: "(backbone.body 102, rpn 6)"."""
    depth = {"backbone": 2, "roi_heads": 3}
    names = Counter(".".join(key.split(".")[: depth.get(key.split(".")[0], 1)]) for key in sorted(keys))
    return "(" + ", ".join(f"{name} {count}" for name, count in names.items()) + ")"
