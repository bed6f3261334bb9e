"""atss, max_iou, centerness: reference vectors, cases by hand, nothing at all, mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tailfin.models.assigners import atss, candidate_threshold, centerness, iou, max_iou, max_iou_batch

DTYPES = (torch.float64, torch.float32)
ATSS = ("a_typical", "b_overlap_tiny", "c_no_gt", "d_same_anchor_two_gt")
RETINANET = ("a_typical", "b_smooth_l1", "c_no_gt", "d_tiny")


@pytest.fixture(scope="module")
def vectors(golden_dir):
    return {name: dict(np.load(golden_dir / f"{name}.npz")) for name in ("atss", "retinanet")}


def levels(file, case, dtype):
    count = len(file[f"{case}/strides"])
    return [torch.from_numpy(file[f"{case}/level{level}/anchors"]).to(dtype) for level in range(count)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ATSS)
def test_atss(vectors, case, dtype):
    file = vectors["atss"]
    anchors = levels(file, case, dtype)
    for image in range(file[f"{case}/num_images"]):
        prefix = f"{case}/img{image}"
        boxes = torch.from_numpy(file[f"{prefix}/gt_boxes"]).to(dtype)
        before = [level.clone() for level in anchors], boxes.clone()
        assigned = atss(anchors, boxes, topk=int(file[f"{case}/hp/topk"]))
        np.testing.assert_array_equal(assigned, file[f"{prefix}/assigned_gt_index"])
        assert all(map(torch.equal, anchors, before[0])) and torch.equal(boxes, before[1])
        positive = torch.from_numpy(file[f"{prefix}/pos_index"])
        assert torch.equal((assigned >= 0).nonzero()[:, 0], positive)
        if len(positive):
            found = centerness(torch.cat(anchors)[positive], boxes[assigned[positive]])
            assert found.dtype == dtype
            np.testing.assert_allclose(
                found, file[f"{prefix}/pos_centerness_target"], rtol=1e-9 if dtype == torch.float64 else 1e-4
            )


def test_atss_thresholds(vectors):
    file, case = vectors["atss"], "b_overlap_tiny"
    anchors, boxes = levels(file, case, torch.float64), torch.from_numpy(file[f"{case}/img0/gt_boxes"]).double()
    overlaps, start = [], 0
    for level in anchors:
        centres = (level[:, :2] + level[:, 2:]) / 2
        near = torch.cdist(centres, (boxes[:, :2] + boxes[:, 2:]) / 2).argsort(dim=0)[:9]
        overlaps.append(iou(level, boxes).gather(0, near))
        start += len(level)
    found = candidate_threshold(torch.cat(overlaps))
    np.testing.assert_allclose(found, file[f"{case}/img0/iou_threshold_per_gt"], rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ignored_regions(vectors, dtype):
    for name in ("atss", "retinanet"):
        values = {key.removeprefix("e_ignore_option/"): vectors[name][key] for key in vectors[name] if "e_ign" in key}
        anchors, boxes, regions = (
            torch.from_numpy(values[key]).to(dtype) for key in ("anchors", "gt_boxes", "ignore_boxes")
        )
        share = float(values["hp/ignore_iof_thr"])
        parts = list(anchors.split(values["level_sizes"].tolist()))
        if name == "atss":
            found, off = atss(parts, boxes, 9, regions, share), atss(parts, boxes, 9, regions)
        else:
            found = max_iou(anchors, boxes, ignore_boxes=regions, ignore_iof=share)
            off = max_iou(anchors, boxes, ignore_boxes=regions)
        np.testing.assert_array_equal(found, values["assigned_gt_index"])
        assert not torch.equal(found, off)  # a region alone has no effect


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", RETINANET)
def test_max_iou(vectors, case, dtype):
    file = vectors["retinanet"]
    anchors = torch.cat(levels(file, case, dtype))
    for image in range(file[f"{case}/num_images"]):
        prefix = f"{case}/img{image}"
        boxes = torch.from_numpy(file[f"{prefix}/gt_boxes"]).to(dtype)
        found = max_iou(
            anchors,
            boxes,
            *(float(file[f"{case}/hp/{name}"]) for name in ("pos_iou", "neg_iou", "min_pos_iou")),
        )
        sure = ~file.get(f"{prefix}/ambiguous_anchor", np.zeros(len(anchors), dtype=bool))
        assert case == "d_tiny" or sure.all()  # where IoUs tie and rounding decides
        np.testing.assert_array_equal(found.numpy()[sure], file[f"{prefix}/assigned_gt_index"][sure])


def test_max_iou_of_the_cascade(golden_dir):
    file = dict(np.load(golden_dir / "cascade.npz"))
    seen = 0
    for key in file:
        if not key.endswith("/assigned_gt_index"):
            continue
        prefix, (case, _, stage, image, _) = key.removesuffix("/assigned_gt_index"), key.split("/")
        bound = float(file[f"{case}/hp/iou_thr"][int(stage[-1])])
        boxes = torch.from_numpy(file[f"{prefix}/boxes_in"])
        gt_boxes = torch.from_numpy(file[f"{case}/{image}/gt_boxes"]).double()
        found = max_iou(boxes, gt_boxes, bound, bound, bound, low_quality=False)
        np.testing.assert_array_equal(found, file[key])
        seen += 1
    assert seen > 10


def test_low_quality_by_hand():
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [0, 0, 10, 4], [100, 100, 110, 110]])
    boxes = torch.tensor([[0.0, 0, 10, 10], [25, 25, 35, 35], [200, 200, 210, 210]])
    # the third object touches nothing: with low_quality all that it does not touch is its own
    assert max_iou(anchors, boxes).tolist() == [2, 2, 2, 2]
    assert max_iou(anchors, boxes[:2]).tolist() == [0, 1, -2, -1]
    assert max_iou(anchors, boxes, min_pos_iou=0.1).tolist() == [0, 1, -2, -1]
    assert max_iou(anchors, boxes, low_quality=False).tolist() == [0, -1, -2, -1]
    assert max_iou(anchors[:1], boxes[[0, 0]]).tolist() == [1]  # later objects last
    regions = torch.tensor([[90.0, 90, 120, 120]])
    assert max_iou(anchors, boxes[:2], ignore_boxes=regions, ignore_iof=0.5).tolist() == [0, 1, -2, -2]


def test_atss_by_hand():
    # 3 anchors of one level on a line, centres 5, 15, 25; IoUs 0, 1, 0: mean 1/3 and deviation 0.577
    anchors = torch.tensor([[0.0, 0, 10, 10], [10, 0, 20, 10], [20, 0, 30, 10]], dtype=torch.float64)
    assert atss([anchors], anchors[1:2]).tolist() == [-1, 0, -1]
    # centre on the side of the box: not inside by more than 0.01
    assert atss([anchors], torch.tensor([[15.0, 0, 25, 10]], dtype=torch.float64)).tolist() == [-1, -1, -1]
    assert atss([anchors[:1]], anchors[:1]).tolist() == [-1]  # one candidate has no deviation
    assert atss([anchors, anchors[:2] + 0.1], anchors[1:2], topk=1).tolist() == [-1, -1, -1, -1, -1]


def test_centerness_by_hand():
    anchors = torch.tensor([[0.0, 0, 4, 4], [0, 0, 2, 2], [0, 0, 40, 40], [0, 0, 0, 0]])
    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 4], [0, 0, 0, 0]])
    np.testing.assert_allclose(centerness(anchors, boxes), [1, (1 / 3) ** 0.5, 0, 0], rtol=1e-6)


def test_nothing_at_all():
    none, anchors = torch.zeros((0, 4)), torch.tensor([[0.0, 0, 8, 8]]).double()
    for found in (atss([anchors, anchors[:0]], none.double()), max_iou(anchors, none.double())):
        assert found.dtype == torch.int64 and found.tolist() == [-1]
    for found in (
        atss([none], none),
        atss([], none),
        atss([none], torch.ones((2, 4))),
        max_iou(none, torch.ones(2, 4)),
    ):
        assert found.shape == (0,)
    assert centerness(none, none).shape == (0,)
    assert max_iou(anchors.half(), anchors.half()).tolist() == [0]


def test_mistakes():
    boxes = torch.zeros((2, 4))
    with pytest.raises(ValueError, match=r"gt_boxes must be floats \[N, 4\]"):
        atss([boxes], torch.zeros((2, 5)))
    with pytest.raises(ValueError, match=r"anchors must be floats \[N, 4\]"):
        max_iou(boxes.long(), boxes)
    with pytest.raises(ValueError, match="topk must be positive"):
        atss([boxes], boxes, topk=0)
    with pytest.raises(ValueError, match="must not be above pos_iou"):
        max_iou(boxes, boxes, 0.4, 0.5)
    with pytest.raises(ValueError, match="one gt box per anchor"):
        centerness(boxes, boxes[:1])


def test_a_broken_box_is_not_hidden():
    """An object of NaN owns anchors, so that the loss is NaN and training stops with a message."""
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    boxes = torch.tensor([[[0.0, 0, 10, 10], [torch.nan] * 4]])
    found = max_iou_batch(anchors, boxes, torch.tensor([[True, True]]))
    assert found.tolist() == [[0, 1]]  # the first anchor is claimed by the object that it is
    assert (max_iou_batch(anchors, boxes, torch.tensor([[True, True]]), low_quality=False) == 1).all()
