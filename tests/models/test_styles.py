"""What torchvision and mmdetection do differently in two stages: `detector.style` and the keys that it sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import roi_align

from tailfin.config import check_recipe, load_recipe
from tailfin.data.transforms import augment
from tailfin.models import build_detector
from tailfin.models.assigners import max_iou, max_iou_batch
from tailfin.models.backbones import resnet_body
from tailfin.models.frozen_norms import FixedStatistics, FrozenNorm
from tailfin.models.roi_align import PyramidRoIAlign
from tailfin.models.rpn import RPN, Float32Anchors, Float32RPNHead, RPNOutputs
from tailfin.schema.data import Data
from tailfin.schema.detectors import STYLES
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[30, 12, 3], instance_count=[50, 20, 4], num_images=40)
STYLE = STYLES["mmdetection"]


def section(**detector):
    """The resolved section of a recipe."""
    values = {"weights": "imagenet", "detector": {"fpn_channels": 16, "head_channels": 32, **detector}}
    return check_recipe(values, "test").detector


def test_a_style_sets_what_is_not_given_and_the_recipe_shows_it():
    plain, styled = section(), section(style="mmdetection")
    told = styled.model_dump()
    assert {key: told[key] for key in STYLE} == STYLE
    assert all(plain.model_dump()[key] != value for key, value in STYLE.items())  # each key says something
    own = section(style="mmdetection", roi_sampling=2, norm="bn").model_dump()
    assert (own["roi_sampling"], own["norm"], own["roi_aligned"]) == (2, "bn", True)
    again = check_recipe({"weights": "imagenet", "detector": styled.model_dump(mode="json")}, "again").detector
    assert again == styled


@pytest.mark.parametrize("name", ["mask_rcnn", "cascade_rcnn"])
def test_further_two_stage_detectors_have_the_style(name):
    assert section(name=name, style="mmdetection").roi_aligned


@pytest.mark.parametrize(
    "recipe",
    [
        *("lvis_v1/faster_rcnn_r50", "lvis_v1/faster_rcnn_r50_bacl", "lvis_v1/mask_rcnn_r50_decoupled"),
        *("lvis_v1/cascade_faster_rcnn_r50", "lvis_v0.5/faster_rcnn_r50", "coco_lt/mask_rcnn_r50"),
        *("coco/faster_rcnn_r50_softmax", "bacl/XIII/bacl/lvis_v1/r101"),
    ],
)
def test_recipes_of_published_rows(recipe):
    detector = load_recipe(recipe).detector.model_dump()
    assert {key: detector[key] for key in STYLE} == STYLE


def test_rows_of_repeat_factors_round_up():
    assert load_recipe("2drcl/3b/rfs/lvis_v1/r50").sampler.rounding == "ceil"
    first = load_recipe("bacl/XIII/bacl/lvis_v1/r101").data
    assert (first.canvas, first.resize, first.sizes) == (True, "jitter", (1280,))


def test_the_detector_is_built_so():
    values = {"weights": "none", "backbone": "resnet18", "detector": {"fpn_channels": 16, "head_channels": 32}}
    values["detector"] |= {"style": "mmdetection", "norm": "bn", "frozen_layers": 0}
    model, _ = build_detector(check_recipe(values, "test"), STATS)
    assert model.roi_heads.pool.aligned and model.roi_heads.pool.sampling_ratio == 0
    assert (model.rpn.box_loss, model.rpn.min_pos_iou, model.rpn.low_quality) == ("l1", 0.3, "take")
    lateral, shared = model.backbone.fpn.inner_blocks[3][0].weight, model.roi_heads.head.fc6.weight
    for weight, inputs, outputs in ((lateral, 512, 16), (shared, 16 * 49, 32)):
        bound = math.sqrt(6 / (inputs + outputs))  # Glorot and Bengio, eq. 16
        assert 0.95 * bound < weight.abs().max() <= bound
    assert not model.roi_heads.head.fc6.bias.any()
    targets = [{"boxes": torch.tensor([[5.0, 8, 40, 50]]), "labels": torch.tensor([1])}]
    losses = model.train()([torch.rand(3, 64, 64)], targets)
    torch.stack(list(losses.values())).sum().backward()
    assert all(torch.isfinite(value) for value in losses.values())


# ---- RoIAlign --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 2])
def test_half_pixel_correction(samples):
    """That of torchvision's operator, level by level; a box smaller than a cell keeps its size."""
    generator = torch.Generator().manual_seed(0)
    features = {str(k): torch.randn(2, 3, 64 >> k, 64 >> k, generator=generator, dtype=torch.float64) for k in (0, 1)}
    corner = 200 * torch.rand(12, 2, generator=generator, dtype=torch.float64)
    sides = torch.tensor([1.0, 30, 220], dtype=torch.float64).repeat(4)[:, None]
    boxes = torch.cat([corner, corner + sides], 1).clamp(max=256)
    pool = PyramidRoIAlign(["0", "1"], [4, 8], 3, samples, aligned=True)
    found = pool(features, [boxes[:5], boxes[5:]], [(256, 256)] * 2)
    levels = pool.levels(boxes)
    assert set(levels.tolist()) == {0, 1}
    picture = (torch.arange(12) >= 5).double()[:, None]
    for row, level in enumerate(levels.tolist()):
        rois = torch.cat([picture, boxes], 1)[row : row + 1]
        wanted = roi_align(features[str(level)], rois, 3, 1 / (4 << level), samples, aligned=True)
        torch.testing.assert_close(found[row : row + 1], wanted)


def test_a_traced_pooling_takes_any_boxes():
    pool = PyramidRoIAlign(["0", "1"], [4, 8], 3, 2, aligned=True)
    features = {"0": torch.randn(1, 2, 64, 64), "1": torch.randn(1, 2, 32, 32)}

    def pooled(fine, coarse, boxes):
        return pool({"0": fine, "1": coarse}, [boxes], [(256, 256)])

    small, large = (
        torch.tensor([[2.0, 3, 30, 40]]),
        torch.tensor([[0.0, 0, 250, 240], [9, 9, 20, 20], [1, 2, 200, 230]]),
    )
    traced = torch.jit.trace(pooled, (*features.values(), small))
    torch.testing.assert_close(traced(*features.values(), large), pooled(*features.values(), large))


# ---- norms -----------------------------------------------------------------------------------------------------------


def test_fixed_statistics_with_a_trained_scale_and_shift():
    body = resnet_body("resnet18", norm="frozen_stats")
    frozen = resnet_body("resnet18", norm="frozen_bn")
    body.load_state_dict(frozen.state_dict())  # the same names
    body.freeze(2)
    picture = torch.randn(1, 3, 64, 64)
    assert torch.equal(body.train().layers(picture)["layer4"], frozen.layers(picture)["layer4"])
    norms = {name: module for name, module in body.named_modules() if isinstance(module, FixedStatistics)}
    assert len(norms) == 20 and all(isinstance(module, FrozenNorm) for module in norms.values())
    body.layers(picture)["layer4"].square().sum().backward()
    for name, module in norms.items():
        below = name.startswith(("bn1", "layer1"))  # stem and layer1 are frozen
        assert (module.weight.grad is None) == below and (module.bias.grad is None) == below
        assert not module.running_mean.requires_grad and not module.running_mean.any()


def test_scale_and_shift_under_autocast():
    norm = FixedStatistics(4)
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(nn.Conv2d(4, 4, 1)(x)).dtype == torch.bfloat16


# ---- RPN -------------------------------------------------------------------------------------------------------------


def network(**options) -> RPN:
    anchors = Float32Anchors(((8,),), ((1.0,),))
    given = {"fg_iou_thresh": 0.7, "bg_iou_thresh": 0.3, "batch_size_per_image": 4, "positive_fraction": 0.5}
    limits = {"training": 10, "testing": 10}
    given |= {"pre_nms_top_n": limits, "post_nms_top_n": limits, "nms_thresh": 0.7}
    return RPN(anchors, Float32RPNHead(4, 1), **given, **options)


def test_rpn_box_loss_by_hand():
    """One object on the first of two anchors, half a side to the right: dx = 0.5, all else 0; two rows are sampled."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    raw = RPNOutputs(torch.zeros(1, 2), torch.zeros(1, 2, 4), anchors, [2])
    target = [{"boxes": torch.tensor([[1.0, 0, 11, 10]]), "labels": torch.tensor([0])}]
    smooth = network().losses(raw, target)
    plain = network(box_loss="l1").losses(raw, target)
    assert plain["loss_rpn_box_reg"].item() == pytest.approx(0.1 / 2)
    assert smooth["loss_rpn_box_reg"].item() == pytest.approx(0.5 * 0.1**2 * 9 / 2)  # below beta = 1/9
    assert plain["loss_rpn_objectness"].item() == pytest.approx(math.log(2))


@pytest.mark.parametrize(
    "options, positives", [({}, 1), ({"min_pos_iou": 0.3}, 0), ({"min_pos_iou": 0.2}, 1), ({"low_quality": "none"}, 0)]
)
def test_low_quality_matches(options, positives):
    """The only object overlaps its best anchor by a quarter."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    raw = RPNOutputs(torch.tensor([[2.0, -2.0]]), torch.zeros(1, 2, 4), anchors, [2])
    target = [{"boxes": torch.tensor([[0.0, 0, 5, 5]]), "labels": torch.tensor([0])}]
    losses = network(**options).losses(raw, target)
    assert (losses["loss_rpn_box_reg"].item() > 0) == bool(positives)
    logits, truth = torch.tensor([2.0, -2.0]), torch.tensor([float(positives), 0.0])
    wanted = nn.functional.binary_cross_entropy_with_logits(logits, truth)
    assert losses["loss_rpn_objectness"].item() == pytest.approx(wanted.item())


def test_matching_a_batch_is_matching_each_picture(golden_dir):
    """mmdetection's vectors of its IoU rule, all pictures at once, anchors shared or each picture's own."""
    file = np.load(golden_dir / "retinanet.npz")
    cases = sorted({key.split("/")[0] for key in file if "/img0/gt_boxes" in key})
    assert cases
    generator = torch.Generator().manual_seed(0)
    corner = 90 * torch.rand(200, 2, generator=generator)
    anchors = torch.cat([corner, corner + 4 + 30 * torch.rand(200, 2, generator=generator)], 1)
    for case in cases:
        images = range(int(file[f"{case}/num_images"]))
        boxes = [torch.from_numpy(file[f"{case}/img{image}/gt_boxes"]).float().view(-1, 4) for image in images]
        most = max(1, *(len(own) for own in boxes))
        truth = torch.stack([nn.functional.pad(own, (0, 0, 0, most - len(own))) for own in boxes])
        valid = torch.arange(most) < torch.tensor([len(own) for own in boxes])[:, None]
        for rule in ((0.7, 0.3, 0.3, True), (0.5, 0.5, 0.5, False), (0.5, 0.4, 0.0, True)):
            wanted = torch.stack([max_iou(anchors, own, *rule) for own in boxes])
            every = anchors.expand(len(boxes), -1, -1)
            counts = [len(own) for own in boxes]
            assert torch.equal(max_iou_batch(anchors, truth, valid, *rule), wanted)
            assert torch.equal(max_iou_batch(every, truth, valid, *rule, counts=counts), wanted)


def test_pictures_are_taken_some_at_a_time(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    corner = 90 * torch.rand(50, 2, generator=generator)
    anchors = torch.cat([corner, corner + 20], 1)
    truth, valid = anchors[:15].view(5, 3, 4) + 2, torch.arange(3) < torch.tensor([3, 0, 1, 2, 3])[:, None]
    wanted = max_iou_batch(anchors, truth, valid)
    for pairs in (1, 300):
        monkeypatch.setattr("tailfin.models.assigners.MOST_PAIRS", pairs)
        assert torch.equal(max_iou_batch(anchors, truth, valid, counts=[3, 0, 1, 2, 3]), wanted)


def test_exact_anchors():
    """mmdetection's: sides 32 * sqrt(ratio), centred on multiples of the stride that is given."""
    made = Float32Anchors(((32,),), ((0.5, 1.0, 2.0),), exact=True, strides=[64])
    images = ImageList(torch.zeros(1, 3, 96, 96), [(90, 96)])
    anchors = made(images, [torch.zeros(1, 1, 2, 2)])[0]
    assert anchors.shape == (12, 4)
    width, height = 32 * math.sqrt(2), 32 / math.sqrt(2)
    wanted = torch.tensor([64 - width / 2, -height / 2, 64 + width / 2, height / 2])
    torch.testing.assert_close(anchors[3], wanted)


# ---- canvas ----------------------------------------------------------------------------------------------------------


def test_canvas():
    config = Data(resize="jitter", sizes=(64,), jitter_scale=(0.5, 0.5), canvas=True, flip=0.0)
    image = torch.full((3, 40, 80), 200, dtype=torch.uint8)
    target = {"boxes": torch.tensor([[8.0, 4, 40, 24]]), "labels": torch.tensor([0])}
    target["masks"] = torch.ones(1, 40, 80, dtype=torch.uint8)
    found, moved = augment(image, target, config, np.random.default_rng(0))
    assert found.shape == (3, 64, 64) and moved["masks"].shape == (1, 64, 64)
    assert (found[:, :16, :32] == 200).all() and not found[:, 16:].any() and not found[:, :, 32:].any()
    assert not moved["masks"][:, 16:].any()
    torch.testing.assert_close(moved["boxes"], target["boxes"] * 0.4)
    free = config.model_copy(update={"canvas": False})
    assert augment(image, target, free, np.random.default_rng(0))[0].shape == (3, 16, 32)
