"""ATSS: reference vectors of mmdetection's head and of EFL's one-stage detector, what each option changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_vectors import assigned, check_detections, check_gradients, detector, outputs, targets, tensor

from tailfin.models.dense import Outputs

CASES = ("a_typical", "b_overlap_tiny", "c_no_gt", "d_same_anchor_two_gt")


@pytest.fixture(scope="module")
def file(golden_dir):
    return dict(np.load(golden_dir / "atss.npz"))


@pytest.mark.parametrize("case", CASES)
def test_losses(file, case):
    model = detector(file, case, "atss")
    found = outputs(file, case, torch.float64)
    losses = model.losses(found, targets(file, case))
    for name, key in (("classifier", "cls"), ("box_reg", "bbox"), ("centerness", "centerness")):
        np.testing.assert_allclose(losses[f"loss_{name}"].item(), file[f"{case}/loss/loss_{key}"], rtol=1e-5)
    again = model.losses(found, targets(file, case), assigned(file, case))
    assert all(torch.equal(losses[name], again[name]) for name in losses)
    check_gradients(found, losses, file, case)


@pytest.mark.parametrize("case", CASES)
def test_detections(file, case):
    check_detections(detector(file, case, "atss"), file, case)


@pytest.mark.parametrize("case", CASES)
def test_anchors(file, case):
    model = detector(file, case, "atss")
    shapes = [file[f"{case}/level{level}/cls_logits"].shape[-2:] for level in range(5)]
    for level, own in enumerate(model.anchors(shapes, file[f"{case}/pad_shape"])):
        np.testing.assert_array_equal(own, file[f"{case}/level{level}/anchors"])


EFL = {
    "quality": "iou", "anchor_scales": [6, 8], "topk": 18, "delta_stds": [1, 1, 1, 1], "rank": "product",
    "pre_nms": 6000,
    "normalizer": "positives", "box_loss_weight": 1,
}  # fmt: skip


def test_efl_detector(file):
    """The detector of the equalized focal loss in its aligned form: assignment, IoU branch, losses, scores."""
    case = "efl_aligned"
    limits = {"score_thr": 0.0, "nms_iou": 0.5, "max_per_img": 300}
    values = {**file, **{f"{case}/hp/{key}": np.asarray(value) for key, value in limits.items()}}
    model = detector(values, case, "atss", "efl", **EFL)
    sizes, classes = file[f"{case}/level_sizes"].tolist(), int(file[f"{case}/num_classes"])
    height, width = file[f"{case}/image_hw"].tolist()
    grids = [(-(-height // stride), -(-width // stride)) for stride in file[f"{case}/strides"].tolist()]
    assert [2 * h * w for h, w in grids] == sizes

    def maps(name):
        own = tensor(file[f"{case}/{name}"], torch.float64)
        parts = (own[..., None] if own.ndim == 2 else own).split(sizes, dim=1)
        return [
            part.reshape(1, h, w, -1).permute(0, 3, 1, 2).clone().requires_grad_()
            for part, (h, w) in zip(parts, grids, strict=True)
        ]

    anchors = tensor(file[f"{case}/anchors"], torch.float64)
    found = Outputs(
        [(height, width)], {}, list(anchors.split(sizes)), maps("cls_logits"), maps("box_offsets"), maps("iou_logits")
    )
    boxes = {
        "boxes": torch.from_numpy(file[f"{case}/img0/gt_boxes"]),
        "labels": torch.from_numpy(file[f"{case}/img0/gt_labels"]),
    }
    matched = model.match(found, [boxes])
    assert torch.equal(matched.labels[0] < classes, torch.from_numpy(file[f"{case}/positive"][0]))
    losses = model.losses(found, [boxes])
    np.testing.assert_allclose(losses["loss_box_reg"].item(), file[f"{case}/loss_bbox"], rtol=1e-5)
    np.testing.assert_allclose(losses["loss_iou"].item(), file[f"{case}/loss_iou"], rtol=1e-5)
    (losses["loss_box_reg"] + losses["loss_iou"]).backward()
    for name, own in (("grad_box", found.deltas), ("grad_iou", found.quality)):
        wanted = torch.from_numpy(file[f"{case}/{name}"]).double().reshape(1, sum(sizes), -1)
        rows = torch.cat([level.grad.permute(0, 2, 3, 1).reshape(1, -1, wanted.shape[2]) for level in own], 1)
        torch.testing.assert_close(rows, wanted, rtol=1e-4, atol=1e-7)
    with torch.no_grad():
        _, scores, labels, _ = model.best(found, 0.0)
    wanted = torch.from_numpy(file[f"{case}/scores"])[0].flatten()
    assert scores.numel() == wanted.numel()
    torch.testing.assert_close(scores[0].sort().values.float(), wanted.sort().values, rtol=1e-4, atol=1e-7)
