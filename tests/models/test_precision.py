"""Under autocast: class logits, box deltas and depthwise convolutions have float32's values, not its type alone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tailfin import losses
from tailfin.config import load_recipe
from tailfin.models import build_detector
from tailfin.models.dense import DenseDetector
from tailfin.models.heads.cosine import NormedLinear, WeightNormCosine
from tailfin.models.heads.disalign import align
from tailfin.models.heads.forest import ForestPredictor, GrownForest
from tailfin.models.heads.mask import MaskPredictor
from tailfin.models.heads.roi_heads import BoxPredictor
from tailfin.models.heads.simcal import DualPredictor, with_twin
from tailfin.models.heads.tde import TDEHead
from tailfin.models.localizer import Localizer
from tailfin.models.precision import depthwise_in_float32
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


# ---- whole detectors -------------------------------------------------------------------------------------------------

RECIPES = {
    "linear": ("fod/faster_rcnn_r18_softmax", []),
    "one box for all": ("fod/faster_rcnn_r18_softmax", ["detector.box_regression=class_agnostic"]),
    "cosine": ("fod/faster_rcnn_r18_softmax", ["detector.classifier=cosine"]),
    "weight_cosine": ("fod/faster_rcnn_r18_softmax", ["detector.classifier=weight_cosine"]),
    "tde": ("fod/faster_rcnn_r18_softmax", ["detector.classifier=tde"]),
    "forest": ("fod/faster_rcnn_r18_softmax", ["detector.classifier=forest"]),
    "pcb": ("fod/faster_rcnn_r18_softmax", ["detector.classifier=pcb", "loss=pcb"]),
    "cascade": ("road12/cascade_mask_rcnn_r18", []),
    "retinanet": ("fod/retinanet_r18", []),
    "atss": ("fod/atss_r18", []),
    "localizer": ("fod/localizer_r18", []),
    "deformable_detr": ("fod/deformable_detr_tiny", []),
    "deformable_detr two-stage": ("fod/deformable_detr_tiny", ["detector.two_stage=true", "detector.refine=true"]),
}
SECOND = {
    "disalign": lambda heads: align(heads, STATS),
    "disalign on cosine": lambda heads: align(heads, STATS),
    "simcal": lambda heads: with_twin(heads, STATS),
}


def detector(name):
    if name in RECIPES:
        recipe, overrides = RECIPES[name]
        return build_detector(load_recipe(recipe, [*overrides, "weights=none"]), STATS, start=False)[0]
    model = detector("cosine" if "cosine" in name else "linear")
    model.roi_heads = SECOND[name](model.roi_heads)
    return model


def class_and_box_layers(model):
    """The modules with weights that give logits, deltas and qualities."""
    if isinstance(model, DenseDetector):
        return {own for own in (model.head.classifier, model.head.box, model.head.quality) if own is not None}
    if isinstance(model, Localizer):
        return {model.roi_heads.iou, model.roi_heads.box}
    predictor = getattr(getattr(model, "roi_heads", None), "predictor", None)
    if isinstance(predictor, DualPredictor):
        parts = [predictor.predictor, predictor.calibrated_classifier]
    else:
        parts = [model.parts()[name] for name in ("classifier", "box")]
    return {own for part in parts for own in part.modules() if next(own.parameters(recurse=False), None) is not None}


@pytest.mark.parametrize("name", [*RECIPES, *SECOND])
def test_every_layer_of_classes_and_boxes_computes_in_float32(name):
    """Under autocast each gives what it gives without, on the very features that it had: to the last bit."""
    torch.manual_seed(0)
    model = detector(name).eval()
    layers = class_and_box_layers(model)
    found, busy = [], []

    def compare(layer, given, output):
        if busy:
            return
        busy.append(layer)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            expected = layer(*(own.float() if own.is_floating_point() else own for own in given))
        busy.pop()
        found.append(layer)
        torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6, check_dtype=True)

    for layer in layers:
        for parameter in layer.parameters(recurse=False):  # logits of some size: where half precision has large steps
            torch.nn.init.normal_(parameter, std=0.2)
        layer.register_forward_hook(compare)
    half = []
    model.backbone.register_forward_hook(lambda *_: half.append(torch.is_autocast_enabled("cpu")))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 64, 80), torch.rand(3, 64, 64)])
    assert half and layers and set(found) == layers


@pytest.mark.parametrize("temperature", [None, 20.0])
def test_logits_of_masks(temperature):
    """Of each row's class and of all of them; features as the mask head leaves them under autocast."""
    torch.manual_seed(0)
    predictor = MaskPredictor(32, 5, temperature)
    torch.nn.init.normal_(predictor.conv.weight, std=0.6)
    features, labels = torch.randn(6, 32, 7, 7).bfloat16(), torch.tensor([0, 4, 1, 1, 2, 3])
    with torch.no_grad():
        expected = predictor(features.float())
        with torch.autocast("cpu", torch.bfloat16):
            every, own = predictor(features), predictor.own(features, labels)
    torch.testing.assert_close(every, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(own, expected[torch.arange(6), labels], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [NormedLinear, WeightNormCosine])
def test_cosines_alone(make):
    """In a classifier of one's own, without a box head around it."""
    torch.manual_seed(0)
    classifier, features = make(32, 9), torch.randn(40, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        found = classifier(features)
    torch.testing.assert_close(found, classifier(features.float()), rtol=1e-5, atol=1e-5)


def test_depthwise_convolutions_compute_in_float32():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(8, 8, 5, 2, 2, groups=8), nn.Conv2d(8, 6, 1, groups=2), nn.Conv2d(6, 3, 1))
    network = copy.deepcopy(plain)
    depthwise_in_float32(network)
    depthwise_in_float32(network)  # once more changes nothing
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert [isinstance(module, nn.Conv2d) for module in network] == [True] * 3
    x = torch.randn(2, 8, 9, 9).bfloat16()
    for own in (network, copy.deepcopy(network)):
        with torch.no_grad():
            own[0].weight.mul_(1.001)  # its own weights, which bfloat16 could not tell from the former ones
        with torch.autocast("cpu", torch.bfloat16):
            found = own[0](x)
            assert own[1](found).dtype == torch.bfloat16
        exact = own[0](x.float())
        assert found.dtype == torch.bfloat16
        assert torch.equal(found, exact.bfloat16())  # rounded once, at the end
        own(x.float()).sum().backward()
        assert own[0].weight.grad is not None


def test_a_backbone_of_depthwise_convolutions_has_them_in_float32():
    recipe = load_recipe("road12/packaged", ["weights=none", "detector.norm=bn", "detector.frozen_layers=0"])
    model = build_detector(recipe, STATS, start=False)[0]
    depthwise = [one for one in model.modules() if isinstance(one, nn.Conv2d) and 1 < one.groups == one.in_channels]
    assert len(depthwise) > 10
    whole = copy.deepcopy(depthwise[0])
    x = torch.randn(1, whole.in_channels, 9, 9).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(whole(x), whole(x.float()).bfloat16())
