"""Mask R-CNN: equal to torchvision's with its settings, to the vectors through the head; every part learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign

from same_draws import recorded
from tailfin.config import check_recipe
from tailfin.errors import UserError
from tailfin.models import build_detector
from tailfin.models.backbones import pyramid_backbone, resnet_body
from tailfin.models.convert_torchvision import convert_faster_rcnn, convert_mask_rcnn
from tailfin.models.heads.mask import MaskBranch, MaskHead, MaskPredictor
from tailfin.models.mask_ops import mask_loss, mask_targets
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.stats import ClassStats

CLASSES = 5
SIZES = ((96, 128), (128, 96), (100, 90))
DETECTOR = {
    "name": "mask_rcnn",
    "norm": "bn",
    "frozen_layers": 0,
    "fpn_channels": 32,
    "anchor_sizes": [8, 16, 32, 64, 128],
    "rpn_batch": 64,
    "rpn_pre_nms": [300, 200],
    "rpn_post_nms": [150, 100],
    "roi_batch": 48,
    "head_channels": 64,
    "mask_channels": 16,
    "mask_layers": 2,
}


def stats(classes: int = CLASSES) -> ClassStats:
    return ClassStats(
        image_count=np.arange(1, classes + 1), instance_count=2 * np.arange(1, classes + 1), num_images=20
    )


def detector(*, loss: str | dict = "softmax", classes: int = CLASSES, features=None, seed: int = 0, **options):
    values = {
        "weights": "none",
        "backbone": "resnet18",
        "detector": {**DETECTOR, **options},
        "loss": loss,
        "features": features,
        "evaluation": {"max_dets": 20, "score_threshold": 0.02},
    }
    torch.manual_seed(seed)
    return build_detector(check_recipe(values, "test"), stats(classes))[0]


def pictures(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand((3, *size), generator=generator) for size in SIZES]


def targets(seed: int = 0, counts: tuple[int, ...] = (3, 1, 5)) -> list[dict[str, Tensor]]:
    """Boxes with an ellipse in each as the mask."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count, (height, width) in zip(counts, SIZES, strict=True):
        corner = 50 * torch.rand((count, 2), generator=generator)
        boxes = torch.cat([corner, corner + 8 + 32 * torch.rand((count, 2), generator=generator)], 1)
        centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
        across = (torch.arange(width) + 0.5 - centre[:, :1]) / half[:, :1]
        down = (torch.arange(height) + 0.5 - centre[:, 1:]) / half[:, 1:]
        masks = (down[:, :, None] ** 2 + across[:, None] ** 2 <= 1).to(torch.uint8)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        found.append({"boxes": boxes, "labels": labels, "masks": masks})
    return found


# ---- torchvision -----------------------------------------------------------------------------------------------------


class _AsGiven(GeneralizedRCNNTransform):
    """Pictures keep their size, masks their 28 x 28 cells."""

    def resize(self, image, target=None):
        return image, target

    def postprocess(self, result, image_shapes, original_image_sizes):
        return result


def torchvision_twin(config) -> TorchvisionMaskRCNN:
    """torchvision's detector with the settings of a recipe's section and random weights that are not small."""
    torch.manual_seed(1)
    backbone = pyramid_backbone(
        resnet_body("resnet18", norm="bn"), layers=config.fpn_layers, channels=config.fpn_channels, pool=True
    )
    levels = [str(level) for level in range(len(config.fpn_layers))]
    twin = TorchvisionMaskRCNN(
        backbone,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in config.anchor_sizes), (tuple(config.anchor_ratios),) * len(config.anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=config.rpn_pre_nms[0],
        rpn_pre_nms_top_n_test=config.rpn_pre_nms[1],
        rpn_post_nms_top_n_train=config.rpn_post_nms[0],
        rpn_post_nms_top_n_test=config.rpn_post_nms[1],
        rpn_batch_size_per_image=config.rpn_batch,
        box_roi_pool=MultiScaleRoIAlign(levels, config.roi_size, 2),
        box_head=TwoMLPHead(config.fpn_channels * config.roi_size**2, config.head_channels),
        box_predictor=FastRCNNPredictor(config.head_channels, CLASSES + 1),
        box_score_thresh=0.02,
        box_detections_per_img=20,
        box_batch_size_per_image=config.roi_batch,
        mask_roi_pool=MultiScaleRoIAlign(levels, config.mask_roi_size, 2),
        mask_head=MaskRCNNHeads(config.fpn_channels, [config.mask_channels] * config.mask_layers, 1),
        mask_predictor=MaskRCNNPredictor(config.mask_channels, config.mask_channels, CLASSES + 1),
    )
    twin.transform = _AsGiven(1, 1, twin.transform.image_mean, twin.transform.image_std)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer, std in (
            (twin.rpn.head.cls_logits, 0.3),
            (twin.rpn.head.bbox_pred, 0.05),
            (twin.roi_heads.box_predictor.cls_score, 0.15),
            (twin.roi_heads.box_predictor.bbox_pred, 0.1),
            (twin.roi_heads.mask_predictor.mask_fcn_logits, 0.3),
        ):
            layer.weight.normal_(0, std, generator=generator)
            layer.bias.normal_(0, 0.1, generator=generator)
    return twin


@pytest.fixture(scope="module")
def pair():
    """tailfin's detector with the weights of torchvision's."""
    model = detector(box_loss="smooth_l1", mask_targets="torchvision")
    config = check_recipe({"weights": "none", "detector": DETECTOR}, "test").detector
    twin = torchvision_twin(config)
    state = convert_mask_rcnn(twin.state_dict())
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert not [name for name in missing if ".loss." not in name]
    return model, twin


@pytest.mark.parametrize("counts", [(3, 1, 5), (2, 0, 9)], ids=["objects everywhere", "one picture without objects"])
def test_losses_are_those_of_torchvision(pair, counts):
    model, twin = pair
    model.train(), twin.train()
    wanted = targets(counts=counts)
    theirs_wanted = [{**target, "labels": target["labels"] + 1} for target in wanted]
    with recorded() as draws:
        ours = model(pictures(), wanted)
    draws.give(twin.rpn, 0)
    draws.give(twin.roi_heads, 1, objects=list(counts))
    theirs = twin(pictures(), theirs_wanted)
    ours["loss_objectness"] = ours.pop("loss_rpn_objectness")
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert value > 0
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name} {text}"
        )
    model.zero_grad(), twin.zero_grad()
    ours["loss_mask"].backward()
    theirs["loss_mask"].backward()
    gradients = {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}
    own = dict(model.named_parameters())
    compared = 0
    for name, value in convert_mask_rcnn(gradients).items():
        if name.startswith(("mask.", "backbone.fpn")):
            found = own[name].grad if own[name].grad is not None else torch.zeros_like(value)  # a level without boxes
            error = (found - value).norm() / value.norm().clamp(min=1e-9)
            assert error < 2e-3, f"{name}: {error:.2e}"
            compared += 1
    assert compared > 10


def test_detections_are_those_of_torchvision(pair):
    model, twin = pair
    model.eval(), twin.eval()
    with torch.no_grad():
        ours, theirs = model(pictures()), twin(pictures())
    for own, other in zip(ours, theirs, strict=True):
        assert len(own["boxes"]) == 20
        assert torch.equal(own["labels"] + 1, other["labels"])
        torch.testing.assert_close(own["scores"], other["scores"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(own["boxes"], other["boxes"], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(own["masks"], other["masks"][:, 0], rtol=1e-4, atol=1e-4)
        assert own["masks"].std() > 0.05  # not all the same


def test_converter_keeps_chosen_classes_and_tells_foreign_weights(pair):
    _, twin = pair
    state = twin.state_dict()
    some = convert_mask_rcnn(state, classes=[4, 2])
    every = convert_mask_rcnn(state)
    for name in ("mask.predictor.conv.weight", "roi_heads.predictor.cls_score.bias"):
        assert torch.equal(some[name][:2], every[name][[3, 1]])
    assert torch.equal(
        some["roi_heads.predictor.cls_score.weight"][2], every["roi_heads.predictor.cls_score.weight"][5]
    )
    assert some["roi_heads.predictor.bbox_pred.weight"].shape[0] == 8
    with pytest.raises(UserError, match="mask_head"):
        convert_faster_rcnn(state)
    with pytest.raises(UserError, match="labels 1..5, not 9"):
        convert_mask_rcnn(state, classes=[1, 9])


def test_names_of_older_versions(pair):
    """The published Mask R-CNN COCO_V1 file has them."""
    _, twin = pair
    renamed = {
        "rpn.head.conv.0.0.": "rpn.head.conv.",
        **{f"_blocks.{level}.0.": f"_blocks.{level}." for level in range(4)},
        **{f"roi_heads.mask_head.{layer}.0.": f"roi_heads.mask_head.mask_fcn{layer + 1}." for layer in range(2)},
    }
    older = {}
    for name, value in twin.state_dict().items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        older[name] = value
    assert len(older.keys() - twin.state_dict().keys()) == 2 * (1 + 8 + 2)
    expected, found = convert_mask_rcnn(twin.state_dict()), convert_mask_rcnn(older)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_recipe_starts_from_a_file_of_torchvision_s(pair, tmp_path):
    """`weights: FILE.pth`, of Mask R-CNN for both detectors; a classifier that the loss has no use for starts anew, and
    that is said; a number of classes that says nothing of them is refused."""
    _, twin = pair
    path = tmp_path / "maskrcnn.pth"
    torch.save(twin.state_dict(), path)
    expected = convert_mask_rcnn(twin.state_dict())
    for name in ("mask_rcnn", "faster_rcnn"):
        plain = {key: value for key, value in DETECTOR.items() if name == "mask_rcnn" or "mask" not in key}
        values = {"weights": str(path), "backbone": "resnet18", "detector": {**plain, "name": name}}
        model, lines = build_detector(check_recipe(values, "test"), stats())
        found = model.state_dict()
        assert all(torch.equal(found[key], value) for key, value in expected.items() if key in found)
        assert ("mask.predictor.conv.weight" in found) == (name == "mask_rcnn")
        assert str(path) in " ".join(lines)
    _, lines = build_detector(check_recipe({**values, "loss": "sigmoid"}, "test"), stats())
    assert "its classifier is of another kind" in " ".join(lines)
    with pytest.raises(UserError, match="6 classes, the training file 4"):
        build_detector(check_recipe(values, "test"), stats(4))


# ---- the branch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["a_typical", "b_boundary"])
def test_loss_of_vectors_through_the_predictor(golden_dir, case):
    """The logits of each row's own class, its target and the loss are those of the vectors."""
    vectors = np.load(golden_dir / "mask_head.npz")

    def value(name: str) -> Tensor:
        return torch.from_numpy(vectors[f"{case}/{name}"])

    logits, labels = value("logits"), value("labels")
    target = mask_targets(value("bitmaps"), value("proposals"), matched=value("assigned"))
    flipped = target.bool() != value("mmdet_bitmap/target")
    assert not flipped[(value("mmdet_bitmap/target_soft") - 0.5).abs() > 1e-4].any()
    own = logits[torch.arange(len(labels)), labels].double().requires_grad_()
    loss = mask_loss(own[:, None], value("mmdet_bitmap/target").double(), labels)
    loss.backward()
    torch.testing.assert_close(loss.detach(), value("mmdet_bitmap/loss"), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(own.grad.float(), value("mmdet_bitmap/grad_gt_class"), rtol=1e-4, atol=1e-8)


def test_normed_head_of_vectors(golden_dir):
    vectors = np.load(golden_dir / "mask_head.npz")
    head, predictor = MaskHead(8, 8, layers=2).double(), MaskPredictor(8, 6, temperature=20.0).double()
    given = {
        name.removeprefix("head_normed/param/"): torch.from_numpy(vectors[name])
        for name in vectors.files
        if name.startswith("head_normed/param/")
    }
    head.load_state_dict({name.replace(".conv.", "."): value for name, value in given.items() if "logits" not in name})
    predictor.load_state_dict(
        {name.replace("conv_logits", "conv"): value for name, value in given.items() if "logits" in name}
    )
    features = head(torch.from_numpy(vectors["head_normed/x"]).double())
    expected = torch.from_numpy(vectors["head_normed/out"]).double()
    torch.testing.assert_close(predictor(features), expected, rtol=1e-4, atol=1e-5)
    for label in range(6):  # the filter of one class alone
        own = predictor.own(features, torch.full((2,), label))
        torch.testing.assert_close(own, expected[:, label], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("temperature", [None, 20.0])
@pytest.mark.parametrize("filters", [1, 4])
def test_own_filter_is_the_class_s(filters, temperature):
    torch.manual_seed(0)
    predictor = MaskPredictor(8, filters, temperature).double()
    torch.nn.init.normal_(predictor.conv.bias)
    features, labels = torch.randn(6, 8, 4, 4, dtype=torch.float64), torch.tensor([0, 3, 1, 3, 2, 0])
    rows = labels if filters > 1 else torch.zeros_like(labels)
    own, every = predictor.own(features, labels), predictor(features)[torch.arange(6), rows]
    torch.testing.assert_close(own, every)
    weight = torch.randn_like(own)
    grads = torch.autograd.grad((own * weight).sum(), list(predictor.parameters()))
    expected = torch.autograd.grad((every * weight).sum(), list(predictor.parameters()))
    torch.testing.assert_close(grads, expected)


def test_matched_targets_are_those_of_repeated_masks(monkeypatch):
    """Also where the masks are worked on in several parts."""
    target = targets()[2]
    boxes = target["boxes"].repeat(3, 1) + 2 * torch.randn(15, 4, generator=torch.Generator().manual_seed(0))
    matched = torch.arange(5).repeat(3).flip(0)
    for style in ("mmdet_bitmap", "d2_bitmap", "torchvision"):
        whole = mask_targets(target["masks"][matched], boxes, 28, style)
        torch.testing.assert_close(mask_targets(target["masks"], boxes, 28, style, matched=matched), whole)
        with monkeypatch.context() as patch:
            patch.setattr("tailfin.models.mask_ops.CHUNK", 2 * 100 * 90)
            torch.testing.assert_close(mask_targets(target["masks"], boxes, 28, style, matched=matched), whole)
    with pytest.raises(ValueError, match="matched"):
        mask_targets(target["masks"], boxes, matched=matched[:3])


def test_probabilities_in_parts(monkeypatch):
    torch.manual_seed(0)
    branch = MaskBranch(PyramidRoIAlign(["0"], [4], 14, 2), MaskHead(8, 8, 1), MaskPredictor(8, 3))
    features = {"0": torch.randn(2, 8, 32, 32)}
    boxes = [torch.tensor([[0.0, 0, 30, 40], [5, 5, 90, 80]]), torch.tensor([[8.0, 8, 64, 64]])]
    labels, sizes = torch.tensor([0, 2, 1]), [(128, 128)] * 2
    whole = branch.probabilities(features, boxes, labels, sizes)
    monkeypatch.setattr("tailfin.models.heads.mask.CPU_CHUNK", 1)
    torch.testing.assert_close(branch.probabilities(features, boxes, labels, sizes), whole)
    assert branch.probabilities(features, [boxes[0][:0], boxes[1][:0]], labels[:0], sizes).shape == (0, 28, 28)


# ---- the detector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"masks_by_class": "class_agnostic", "mask_predictor": "normed"}])
def test_gradients_reach_every_part(options):
    model = detector(**options).train()
    losses = model(pictures(), targets())
    assert {"loss_classifier", "loss_box_reg", "loss_mask"} < losses.keys()
    sum(losses.values()).backward()
    for name, part in model.parts().items():
        assert all(value.grad is not None for value in part.parameters()), name
        assert any(bool(value.grad.abs().sum() > 0) for value in part.parameters()), name
    for name, value in (*model.mask.named_parameters(), *model.roi_heads.named_parameters()):
        assert bool(value.grad.abs().sum() > 0), name
    assert model.class_specific() == ("classifier", "box", *(() if options else ("mask",)))


def test_without_objects_the_mask_loss_is_zero_and_attached():
    model = detector().train()
    losses = model(pictures(), targets(counts=(0, 0, 0)))
    assert losses["loss_mask"] == 0
    sum(losses.values()).backward()
    assert all(value.grad is not None for value in model.mask.parameters())


def test_objects_without_a_mask_count_for_their_boxes_alone():
    model = detector().train()
    every = targets()
    for target in every:
        target["mask_valid"] = torch.ones(len(target["boxes"]), dtype=torch.bool)
    torch.manual_seed(0)
    whole = model(pictures(), every)
    every[2]["mask_valid"][:4] = False
    every[2]["masks"][:4] = 1 - every[2]["masks"][:4]  # what such a row says is of no meaning
    torch.manual_seed(0)
    without = model(pictures(), every)
    assert without["loss_mask"] != whole["loss_mask"]
    every[2]["masks"][:4] = 0
    torch.manual_seed(0)
    assert model(pictures(), every)["loss_mask"] == without["loss_mask"]
    for name in whole.keys() - {"loss_mask"}:
        assert without[name] == whole[name]


def test_masks_cost_nothing_where_nothing_below_them_trains():
    model = detector().train()
    model.freeze_but(["classifier"])
    assert "loss_mask" not in model(pictures(), targets())
    model.freeze_but(["classifier"])
    other = detector().train()
    other.freeze_but(["classifier", "mask"])
    losses = other(pictures(), targets())
    sum(losses.values()).backward()
    trained = {name.split(".")[0] for name, value in other.named_parameters() if value.grad is not None}
    assert trained == {"roi_heads", "mask"}


def test_many_classes_cost_what_few_do():
    """No tensor of 28 x 28 logits of every class comes about."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    branch = MaskBranch(PyramidRoIAlign(["0"], [4], 14, 2), MaskHead(8, 8, 1), MaskPredictor(8, 1203))
    with Watch(), torch.no_grad():
        masks = branch.probabilities(
            {"0": torch.randn(1, 8, 16, 16)},
            [torch.tensor([[0.0, 0, 30, 40]]).repeat(300, 1)],
            torch.arange(300),
            [(64, 64)],
        )
    assert masks.shape == (300, 28, 28)
    assert largest < 300 * 1203 * 28 * 28 / 50


@pytest.mark.parametrize(
    "loss",
    ["softmax", "objectness", {"name": "fcbl", "alpha": 0.85}, "seesaw", "ecm", "focal", "eqlv2"],
    ids=lambda loss: loss if isinstance(loss, str) else loss["name"],
)
def test_losses_of_the_box_head(loss):
    model = detector(loss=loss, mask_predictor="normed").train()
    sum(model(pictures(), targets()).values()).backward()
    model.eval()
    with torch.no_grad():
        found = model(pictures(), limits=model.limits.replaced(score_threshold=0.0, max_dets=7))
    assert [own["masks"].shape for own in found] == [(7, 28, 28)] * 3


@pytest.mark.parametrize("classifier", ["cosine", "tde", "pcb", "forest", "weight_cosine"])
def test_classifiers_of_the_box_head(classifier):
    model = detector(classifier=classifier, classes=12).train()
    losses = model(pictures(), targets())
    sum(losses.values()).backward()
    assert bool(model.mask.predictor.conv.weight.grad.abs().sum() > 0)


@pytest.mark.parametrize(
    ("features", "loss"),
    [("hallucination", "fcbl"), ("feature_memory", "ebl"), ("fasa", "softmax"), ("rio", "softmax")],
)
def test_feature_modules_of_the_box_head(features, loss):
    model = detector(features={"name": features}, loss=loss).train()
    for _ in range(2):
        losses = model(pictures(), targets())
    assert torch.isfinite(sum(losses.values()))
    assert losses["loss_mask"] > 0


def test_second_stage_may_train_the_masks():
    values = {
        "weights": "none",
        "detector": DETECTOR,
        "method": "decoupled",
        "second": {"trains": ["classifier", "mask"]},
    }
    assert "mask" in check_recipe(values, "test").second.trains
    with pytest.raises(UserError, match="mask"):
        check_recipe({**values, "detector": {**DETECTOR, "name": "faster_rcnn", "mask_channels": 3}}, "test")
    plain = {key: value for key, value in DETECTOR.items() if "mask" not in key and key != "name"}
    with pytest.raises(UserError, match='"mask"'):
        check_recipe({**values, "detector": plain}, "test")
