"""NMS resampling: the greedy rule, both schemes, and the RPN that uses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import batched_nms, box_iou

from same_draws import recorded
from tailfin.models.rpn import RPN, ResamplingRPN
from tailfin.samplers.nms_resampling import (
    class_groups,
    discrete_resampling,
    linear_resampling,
    linear_thresholds,
    nms_with_thresholds,
)
from tailfin.stats import ClassStats

STATS = ClassStats(image_count=[5, 50, 500, 0], instance_count=[5, 60, 900, 0], num_images=600)


def crowd(seed, n, centres=6):
    """Many boxes around few places, distinct scores, two levels."""
    generator = torch.Generator().manual_seed(seed)
    corner = 100 * torch.rand((centres, 2), generator=generator)
    place = torch.randint(0, centres, (n,), generator=generator)
    top_left = corner[place] + 6 * torch.randn((n, 2), generator=generator)
    boxes = torch.cat([top_left, top_left + 30 + 6 * torch.rand((n, 2), generator=generator)], dim=1)
    truth = torch.cat([corner, corner + 33], dim=1)
    return boxes, torch.randperm(n, generator=generator) / n, torch.randint(0, 2, (n,), generator=generator), truth


def greedy(boxes, scores, levels, thresholds):
    """The rule box by box."""
    overlap = box_iou(boxes, boxes)
    kept = []
    for row in scores.argsort(descending=True).tolist():
        if all(levels[k] != levels[row] or overlap[k, row] <= thresholds[k] for k in kept):
            kept.append(row)
    return kept


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), n=st.integers(0, 80))
def test_thresholds_per_box_follow_the_greedy_rule(seed, n):
    boxes, scores, levels, _ = crowd(seed, n)
    thresholds = 0.3 + 0.6 * torch.rand(n, generator=torch.Generator().manual_seed(seed))
    assert nms_with_thresholds(boxes, scores, levels, thresholds).tolist() == greedy(boxes, scores, levels, thresholds)


def test_one_threshold_is_plain_suppression():
    boxes, scores, levels, _ = crowd(0, 400)
    found = nms_with_thresholds(boxes, scores, levels, torch.full((400,), 0.6))
    assert found.tolist() == batched_nms(boxes, scores, levels, 0.6).tolist()


def test_discrete_keeps_more_around_rare_objects():
    boxes, scores, levels, truth = crowd(1, 500)
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    kept = discrete_resampling(boxes, scores, levels, truth, groups)
    assert (scores[kept].diff() < 0).all()
    overlap = box_iou(boxes, truth)
    on_rare, on_common = (overlap[:, groups == group].amax(1) >= 0.3 for group in (0, 1))
    survivors = [set(batched_nms(boxes, scores, levels, threshold).tolist()) for threshold in (0.9, 0.8, 0.7)]
    for row in range(500):
        expected = (
            (on_rare[row] and row in survivors[0])
            or (on_common[row] and row in survivors[1])
            or (not on_rare[row] and not on_common[row] and row in survivors[2])
        )
        assert bool(expected) == (row in set(kept.tolist()))
    assert len(set(kept.tolist())) == len(kept)
    plain = batched_nms(boxes, scores, levels, 0.7)
    assert on_rare[kept].sum() > 2 * on_rare[plain].sum()


@pytest.mark.parametrize("groups", [[], [2, 2, 2, 2, 2, 2]])
def test_without_rare_or_common_objects_nothing_changes(groups):
    boxes, scores, levels, truth = crowd(2, 200)
    kept = discrete_resampling(boxes, scores, levels, truth[: len(groups)], torch.tensor(groups, dtype=torch.int64))
    assert kept.tolist() == batched_nms(boxes, scores, levels, 0.7).tolist()


def test_linear_uses_the_threshold_of_the_object_below():
    boxes, scores, levels, truth = crowd(3, 300)
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    thresholds = linear_thresholds(STATS)
    kept = linear_resampling(boxes, scores, levels, truth, labels, thresholds)
    overlap, owner = box_iou(boxes, truth).max(1)
    own = torch.where(overlap >= 0.3, thresholds[labels[owner]], thresholds[-1])
    assert kept.tolist() == greedy(boxes, scores, levels, own)
    nothing = torch.zeros((0, 4))
    background = linear_resampling(boxes, scores, levels, nothing, labels[:0], thresholds)
    assert background.tolist() == batched_nms(boxes, scores, levels, 0.7).tolist()


def test_thresholds_fall_with_the_image_count():
    thresholds = linear_thresholds(STATS).tolist()
    share = np.log([5, 50, 500, 1]) / np.log(500)
    assert thresholds == pytest.approx([*(0.9 - 0.2 * share), 0.7])
    assert class_groups(STATS).tolist() == [0, 1, 2, 2]
    alike = ClassStats(image_count=[1, 1], instance_count=[1, 1], num_images=2)
    assert linear_thresholds(alike, (0.8, 0.7, 0.6)).tolist() == pytest.approx([0.8, 0.8, 0.6])


def rpn_inputs():
    torch.manual_seed(0)
    anchors = AnchorGenerator(sizes=((32,), (48,)), aspect_ratios=((0.5, 1.0, 2.0),) * 2)
    head = RPNHead(8, 3)
    options = {
        "fg_iou_thresh": 0.7,
        "bg_iou_thresh": 0.3,
        "batch_size_per_image": 32,
        "positive_fraction": 0.5,
        "pre_nms_top_n": {"training": 300, "testing": 200},
        "post_nms_top_n": {"training": 150, "testing": 60},
        "nms_thresh": 0.7,
    }
    images = ImageList(torch.zeros((2, 3, 128, 128)), [(128, 128), (120, 128)])
    features = {"0": torch.randn((2, 8, 32, 32)), "1": torch.randn((2, 8, 16, 16))}
    targets = [
        {"boxes": torch.tensor([[20.0, 20.0, 52.0, 52.0], [70.0, 60.0, 120.0, 110.0]]), "labels": torch.tensor([0, 2])},
        {"boxes": torch.zeros((0, 4)), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    return (anchors, head), options, images, features, targets


@pytest.mark.parametrize("scheme", ["discrete", "linear"])
def test_rpn(scheme):
    parts, options, images, features, targets = rpn_inputs()
    plain = RegionProposalNetwork(*parts, **options)
    resampling = ResamplingRPN(STATS, *parts, scheme=scheme, **options)
    assert set(resampling.state_dict()) == set(plain.state_dict())
    for ours in (RPN(*parts, **options), resampling):
        raw, proposals = ours(images, features, targets)
        found, _ = proposals.split()
        with recorded() as draws:
            same_losses = ours.losses(raw, targets)
        draws.give(plain, 0)
        expected, losses = plain(images, features, targets)
        for name, value in losses.items():
            assert same_losses[name.replace("loss_obj", "loss_rpn_obj")].item() == pytest.approx(value.item(), rel=1e-5)
    rare = targets[0]["boxes"][:1]
    near = [int((box_iou(boxes[0], rare) >= 0.3).sum()) for boxes in (found, expected)]
    assert near[0] > near[1] > 0
    assert len(found[0]) <= 150
    torch.testing.assert_close(found[1], expected[1])  # an image without objects
    found, expected = resampling.eval()(images, features)[1].split()[0], plain.eval()(images, features)[0]
    torch.testing.assert_close(found[0], expected[0])


def test_options():
    parts, options, *_ = rpn_inputs()
    with pytest.raises(ValueError, match="scheme must be"):
        ResamplingRPN(STATS, *parts, scheme="cubic", **options)
    with pytest.raises(ValueError, match="three IoUs"):
        ResamplingRPN(STATS, *parts, thresholds=(0.7,), **options)
