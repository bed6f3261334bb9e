"""Decoupled training: learn features with one loss, then the classifier with another on frozen features.

Kang et al. (ICLR'20) showed it for classification; BAGS, ACSL, LOCE and DisAlign train detectors this way. Stage 1 is
the recipe's own loss, sampler and schedule; stage 2 is its section `second`, which also names the parts that train.
"""

from __future__ import annotations

from typing import Any

import torch

from tailfin.data.dataset import Source
from tailfin.errors import UserError
from tailfin.methods.drcl import start
from tailfin.methods.feature_stage import feature_stage
from tailfin.models import build_detector
from tailfin.models.detector import Detector
from tailfin.models.heads import stage_samples, wrap_trained
from tailfin.run import Run
from tailfin.schema.recipe import Recipe
from tailfin.schema.stages import unwrapped
from tailfin.stats import ClassStats
from tailfin.weights import load_fitting, state_of


def train(run: Run) -> None:
    """Both stages; the second starts from the first one's weights."""
    model = start(run)
    classifier_stage(run, model)  # a second stage that cannot be built is told before the first one has trained
    representation = feature_stage(run, "representation", model)
    model = classifier_stage(run, representation)
    own = samples(run.recipe, run.planned("classifier").recipe, run.train, run.stats)
    run.finish(feature_stage(run, "classifier", model, **own))


def classifier_stage(run: Run, trained: Detector) -> Detector:
    """The second stage's detector: weights of `trained`, the second loss, and only the named parts training."""
    return second_detector(run.recipe, run.planned("classifier").recipe, run.stats, trained)


def second_detector(whole: Recipe, recipe: Recipe, stats: ClassStats, trained: Detector) -> Detector:
    """`classifier_stage` of the recipe `whole`, whose second stage has the recipe `recipe`."""
    second = whole.second
    assert second is not None
    torch.manual_seed(recipe.seed)  # new weights must not depend on whether stage 1 ran just now or was loaded
    # a classifier that goes around the first stage's is put there once that has its weights
    first = recipe if second.classifier is None else unwrapped(recipe)
    model, _ = build_detector(first, stats, start=False)
    anew = state_of(model, *model.method_state())  # a method's state is that of its stage
    fresh = state_of(model, model.parts()["classifier"]) if second.fresh_classifier else frozenset()
    loaded = load_fitting(model, trained.state_dict(), lambda name: name not in anew | fresh)
    untrained = {id(value) for name, value in model.named_parameters() if name in set(loaded.missing) - anew}
    if second.classifier is not None:
        wrap_trained(model, second.classifier, stats)
    model.freeze_but(second.trains)
    for name, value in model.named_parameters():
        if id(value) in untrained and not value.requires_grad:
            why = "second.fresh_classifier starts it anew" if second.fresh_classifier else "the first stage has none"
            raise UserError(f"the second stage freezes {name} untrained ({why}): change second.classifier or trains")
    if model.features is not None:
        model.features.check(model)
    return model


def samples(whole: Recipe, recipe: Recipe, source: Source, stats: ClassStats) -> dict[str, Any]:
    """Data set and order of the second stage where they are not the usual ones: a classifier's own."""
    second = whole.second
    assert second is not None
    return {} if second.classifier is None else stage_samples(second.classifier, source, recipe, stats)
