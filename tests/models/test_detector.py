"""The contract that all detectors keep: three steps, limits as arguments, parts, one rule for frozen norms."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models.detector import Detector, Limits
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
PYRAMID = {
    "norm": "bn", "frozen_layers": 0, "fpn_channels": 16, "fpn_layers": [2, 3], "fpn_pool": False,
    "anchor_sizes": [12, 24], "roi_size": 3, "roi_batch": 16, "head_channels": 32,
}  # fmt: skip
DETECTORS = {
    "faster_rcnn": {"name": "faster_rcnn", **PYRAMID, "rpn_post_nms": [50, 50]},
    "localizer": {"name": "localizer", **PYRAMID, "rpn_proposals": 60},
    "deformable_detr": {
        "name": "deformable_detr", "norm": "bn", "frozen_layers": 0, "widths": [32] * 5, "blocks": [1] * 4, "levels": 2,
        "channels": 32, "encoder_layers": 1, "decoder_layers": 2, "heads": 4, "points": 2, "feedforward": 32,
        "queries": 12,
    },
}  # fmt: skip
DENSE = {"norm": "bn", "frozen_layers": 0, "fpn_channels": 32, "fpn_layers": [2, 3], "head_convs": 1}
DETECTORS["retinanet"] = {"name": "retinanet", **DENSE, "fpn_convs": "none", "anchor_scale": 2}
DETECTORS["atss"] = {"name": "atss", **DENSE, "anchor_scales": [3]}
generator = torch.Generator().manual_seed(0)
IMAGES = [torch.rand((3, 64, 96), generator=generator), torch.rand((3, 80, 64), generator=generator)]
TARGETS = [
    {"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0], [40.0, 10.0, 70.0, 50.0]]), "labels": torch.tensor([0, 2])},
    {"boxes": torch.zeros((0, 4)), "labels": torch.zeros(0, dtype=torch.int64)},
]


@pytest.fixture(params=DETECTORS)
def model(request) -> Detector:
    torch.manual_seed(0)
    recipe = check_recipe({"weights": "none", "backbone": "resnet18", "detector": DETECTORS[request.param]}, "test")
    return build_detector(recipe, STATS)[0]


def test_forward_is_the_three_steps(model):
    model.train()
    torch.manual_seed(1)
    whole = model(IMAGES, TARGETS)
    torch.manual_seed(1)
    steps = model.losses(model.outputs(IMAGES, TARGETS), TARGETS)
    assert list(whole) == list(steps) and all(torch.equal(whole[name], steps[name]) for name in whole)
    with pytest.raises(ValueError, match="training needs targets"):
        model(IMAGES)
    model.eval()
    with torch.inference_mode():
        outputs = model.outputs(IMAGES)
        for limits in (model.limits, Limits(0.0, 3, 0.5)):
            found, expected = model.detections(outputs, limits), model(IMAGES, limits=limits)
            for own, other in zip(found, expected, strict=True):
                assert all(torch.equal(own[key], other[key]) for key in ("boxes", "scores", "labels"))
                assert limits.max_dets < 0 or len(own["scores"]) <= limits.max_dets
    assert model.kinds == ("bbox",)


def test_parts_and_freezing(model):
    parts = model.parts()
    assert set(model.class_specific()) <= set(parts) and {"box", "backbone"} <= set(parts)
    frozen = next(parts["box"].parameters())
    frozen.requires_grad_(False)
    model.train()
    model.freeze_but(["box"])
    trains = {id(p) for p in model.parameters() if p.requires_grad}
    assert trains == {id(p) for p in parts["box"].parameters()} - {id(frozen)}  # what was frozen stays so
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(norm.training for norm in norms)
    assert not any(norm.training for norm in norms if model.train() is model)
    with pytest.raises(UserError, match='there is no part "bxo".*box'):
        model.freeze_but(["bxo"])


def test_frozen_norms_keep_their_statistics(model):
    """Also a localizer's: what does not train does not drift."""
    for parameter in model.backbone.body.parameters():
        parameter.requires_grad_(False)
    before = {key: value.clone() for key, value in model.backbone.body.state_dict().items()}
    model.train()
    torch.stack(list(model(IMAGES, TARGETS).values())).sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.body.state_dict().items())


def test_proposals_of_any_class(model):
    model.eval()
    with torch.inference_mode():
        found = model.proposals(IMAGES, 20, 0.6)
    for own in found:
        assert 0 < len(own["boxes"]) <= 20 and own["boxes"].shape[1] == 4
        assert (own["scores"].diff() <= 0).all()
        assert (box_iou(own["boxes"], own["boxes"]).fill_diagonal_(0) <= 0.6).all()
    with torch.inference_mode():  # asking has changed nothing
        again = model.proposals(IMAGES, 20, 0.6)
    assert all(torch.equal(own["boxes"], same["boxes"]) for own, same in zip(found, again, strict=True))


def test_scores_of_annotations(model):
    model.eval()
    if model.loss is None:
        with pytest.raises(UserError, match="cannot say how sure"):
            model.annotation_scores(IMAGES, TARGETS)
        return
    with torch.inference_mode():
        scores, place = model.annotation_scores(IMAGES, TARGETS)
    assert scores.shape == (2, 3) and sorted(place.tolist()) == [0, 1]


def overrides(model, name):
    return getattr(type(model), name) is not getattr(Detector, name)


def test_rehearsed_outputs_make_detections(model):
    model.eval()
    with torch.inference_mode():
        outputs = model.rehearsed(IMAGES)
        found = model.detections(outputs, model.limits)
        count = model.candidates(outputs, model.limits)
    assert len(found) == 2 and (count is None) == (not overrides(model, "candidates"))


def test_scores_pass_the_calibration(model):
    if model.loss is None:
        return

    class Half(nn.Module):
        def forward(self, scores):
            return scores / 2

    model.eval()
    with torch.inference_mode():
        outputs = model.outputs(IMAGES)
        limits = Limits(0.0, 10, 0.5)
        before = model.detections(outputs, limits)
        model.rescore = Half()
        after = model.detections(outputs, limits)
    for plain, halved in zip(before, after, strict=True):
        torch.testing.assert_close(halved["scores"], plain["scores"] / 2)


def test_a_class_that_nobody_looked_for_does_not_train(model):
    """`known` of the targets: the classifier's row of such a class gets no gradient, those of the others do."""
    if model.loss is None:
        pytest.skip("finds objects of any class")
    model.train()
    gradients = {}
    for case, looked_for in (("all", [True, True, True]), ("some", [True, False, True])):
        targets = [{**target, "known": torch.tensor(looked_for)} for target in TARGETS]
        model.zero_grad()
        torch.manual_seed(1)
        sum(model(IMAGES, targets).values()).backward()
        width = model.loss.num_logits
        biases = [p for name, p in model.parts()["classifier"].named_parameters() if name.endswith("bias")]
        trained = [p.grad.view(-1, width)[:, :3] for p in biases if p.grad is not None and p.numel() % width == 0]
        gradients[case] = torch.cat(trained)
    assert gradients["all"].bool().all()
    assert not gradients["some"][:, 1].any() and gradients["some"][:, [0, 2]].bool().all()


def test_a_loss_without_a_logit_per_class_cannot_ignore_classes():
    recipe = {"weights": "none", "backbone": "resnet18", "detector": DETECTORS["faster_rcnn"], "loss": "bags"}
    recipe["data"] = {"unchecked_classes": "ignore"}
    with pytest.raises(UserError, match="unchecked_classes: ignore needs a loss with a logit for each class, bags"):
        build_detector(check_recipe(recipe, "test"), STATS)
    # nor can a classifier whose own loss has them elsewhere
    forest = {**DETECTORS["faster_rcnn"], "classifier": "forest"}
    with pytest.raises(UserError, match="with a logit for each class, that of detector.classifier forest has none"):
        build_detector(check_recipe({**recipe, "detector": forest, "loss": "softmax"}, "test"), STATS)
