"""Class logits and box deltas under autocast: their values, not their types, are those of float32."""

from __future__ import annotations

import pytest
import torch

from tailfin import losses
from tailfin.models.heads.cosine import NormedLinear, WeightNormCosine
from tailfin.models.heads.forest import ForestPredictor, GrownForest
from tailfin.models.heads.roi_heads import BoxPredictor
from tailfin.models.heads.tde import TDEHead
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[40, 20, 9, 5, 3], instance_count=[50, 30, 9, 6, 3], num_images=60)
LOSS = losses.build("softmax", STATS)


def forest():
    loss = GrownForest(STATS, parents=(2, 2, 2))
    return ForestPredictor(64, loss)


PREDICTORS = {
    "linear": lambda: BoxPredictor(64, LOSS, False),
    "cosine": lambda: BoxPredictor(64, LOSS, False, NormedLinear(64, 6)),
    "weight_cosine": lambda: BoxPredictor(64, LOSS, True, WeightNormCosine(64, 6)),
    "tde": lambda: BoxPredictor(64, LOSS, False, TDEHead(64, 5)),
    "forest": forest,
}


@pytest.mark.parametrize("name", PREDICTORS)
def test_values_are_those_of_float32(name):
    torch.manual_seed(0)
    predictor = PREDICTORS[name]().eval()
    for parameter in predictor.parameters():  # logits of some size: where half precision has steps of 0.1
        torch.nn.init.normal_(parameter, std=0.6)
    features = torch.randn(300, 64).bfloat16()  # as a shared layer under autocast leaves them
    with torch.no_grad():
        expected = predictor(features.float())
        with torch.autocast("cpu", torch.bfloat16):
            found = predictor(features)
    for own, other in zip(found, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5)
    logits = found[0]
    assert len(logits.flatten().unique()) > 0.99 * logits.numel()  # no ties


def test_a_detector_scores_without_ties():
    """300 proposals x 1,203 classes in bf16: nearly no two scores are equal; rounded logits would leave thousands."""
    torch.manual_seed(0)
    counts = torch.randint(1, 500, (1203,)).tolist()
    stats = ClassStats(image_count=counts, instance_count=counts, num_images=9000)
    loss = losses.build("softmax", stats)
    predictor = BoxPredictor(64, loss, True)
    torch.nn.init.normal_(predictor.cls_score.weight, std=0.5)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logits = predictor(torch.randn(300, 64).bfloat16())[0]
    assert len(logits.unique()) > 0.9 * logits.numel() > 0.9 * 300 * 1203
    assert len(logits.bfloat16().unique()) < 0.1 * logits.numel()
