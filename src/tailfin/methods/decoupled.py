"""Decoupled training: learn features with one loss, then the classifier with another on frozen features.

Kang et al. (ICLR'20) showed it for classification; BAGS, ACSL, LOCE and DisAlign train detectors this way. Stage 1 is
the recipe's own loss, sampler and schedule; stage 2 is its section `second`, which also names the parts that train.
"""

from __future__ import annotations

import torch
from torch import nn

from tailfin.models import build_detector
from tailfin.models.faster_rcnn import FasterRCNN
from tailfin.run import Run


def train(run: Run) -> None:
    """Both stages; the second starts from the first one's weights."""
    representation = run.stage("representation", run.detector())
    run.finish(run.stage("classifier", classifier_stage(run, representation), recipe=run.recipe.second_stage()))


def classifier_stage(run: Run, trained: nn.Module) -> nn.Module:
    """The second stage's detector: weights of `trained`, the second loss, and only the named parts training."""
    second = run.recipe.second
    assert second is not None
    torch.manual_seed(run.recipe.seed)  # new weights must not depend on whether stage 1 ran just now or was loaded
    model, _ = build_detector(run.recipe.second_stage(), run.stats, start=False)
    weights = {key: value for key, value in trained.state_dict().items() if not key.startswith("roi_heads.loss.")}
    if second.fresh_classifier:
        weights = {key: value for key, value in weights.items() if ".cls_score." not in key}
    own = model.state_dict()
    model.load_state_dict({key: value for key, value in weights.items() if own[key].shape == value.shape}, strict=False)
    assert isinstance(model, FasterRCNN)
    model.freeze_all_but(second.trains)
    return model
