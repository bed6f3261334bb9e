"""Decoupled training: learn features with one loss, then the classifier with another on frozen features.

Kang et al. (ICLR'20) showed it for classification; BAGS, ACSL, LOCE and DisAlign train detectors this way. Stage 1 is
the recipe's own loss, sampler and schedule; stage 2 is its section `second`, which also names the parts that train.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tailfin.errors import UserError
from tailfin.methods.drcl import start
from tailfin.methods.feature_stage import feature_stage
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.models.heads import calibrate, uncalibrated
from tailfin.run import Run
from tailfin.samplers.episodes import EpisodeDataset, EpisodePlan
from tailfin.schema.detectors import FasterRCNN as FasterRCNNConfig
from tailfin.schema.recipe import Recipe


def train(run: Run) -> None:
    """Both stages; the second starts from the first one's weights."""
    model: Detector = start(run)
    classifier_stage(run, model)  # a second stage that cannot be built is told before the first one has trained
    representation = feature_stage(run, "representation", model)
    second = run.recipe.second_stage()
    model = classifier_stage(run, representation)
    run.finish(feature_stage(run, "classifier", model, second, **samples(run, second)))


def classifier_stage(run: Run, trained: nn.Module) -> FasterRCNN:
    """The second stage's detector: weights of `trained`, the second loss, and only the named parts training."""
    second = run.recipe.second
    assert second is not None
    torch.manual_seed(run.recipe.seed)  # new weights must not depend on whether stage 1 ran just now or was loaded
    recipe = run.recipe.second_stage()
    # a classifier that calibrates the first stage's is put around it once that has its weights
    model, _ = build_detector(uncalibrated(recipe), run.stats, start=False)
    anew = ("roi_heads.loss.", "roi_heads.extra_rows.")  # a method's state is that of its stage
    weights = {key: value for key, value in trained.state_dict().items() if not key.startswith(anew)}
    if second.fresh_classifier:
        weights = {key: value for key, value in weights.items() if ".cls_score." not in key}
    own = model.state_dict()
    taken = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    model.load_state_dict(taken, strict=False)
    assert isinstance(model, FasterRCNN) and isinstance(recipe.detector, FasterRCNNConfig)
    untrained = {id(value) for key, value in model.named_parameters() if key not in taken and not key.startswith(anew)}
    calibrate(model, recipe.detector.classifier, run.stats)
    model.freeze_but(second.trains)
    for name, value in model.named_parameters():
        if id(value) in untrained and not value.requires_grad:
            why = "second.fresh_classifier starts it anew" if second.fresh_classifier else "the first stage has none"
            raise UserError(f"the second stage freezes {name} untrained ({why}): change second.classifier or trains")
    return model


def samples(run: Run, recipe: Recipe) -> dict[str, Any]:
    """Data set and order of the second stage where they are not the usual ones: SimCal's episodes."""
    assert isinstance(recipe.detector, FasterRCNNConfig)
    if recipe.detector.classifier.name != "simcal" or recipe.sampler.name != "class_aware":
        return {}
    dataset = EpisodeDataset(run.train, recipe.data, recipe.seed)
    schedule = recipe.schedule
    plan = EpisodePlan(
        run.train.index,
        dataset.rows(),
        run.stats,
        recipe.sampler,
        schedule.batch,
        schedule.epochs,
        recipe.seed,
        recipe.data.group_by_aspect,
    )
    return {"dataset": dataset, "plan": plan}
