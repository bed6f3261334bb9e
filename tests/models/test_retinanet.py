"""RetinaNet: reference vectors, torchvision's detector with equal weights, what each option changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from dense_vectors import assigned, check_detections, check_gradients, detector, outputs, targets

CASES = ("a_typical", "b_smooth_l1", "c_no_gt", "d_tiny")


@pytest.fixture(scope="module")
def file(golden_dir):
    return dict(np.load(golden_dir / "retinanet.npz"))


def model_of(file, case, **options):
    beta = float(file[f"{case}/hp/smooth_l1_beta"])
    box = {"box_loss": "smooth_l1", "smooth_l1_beta": beta} if beta else {}
    return detector(file, case, "retinanet", **box, **options)


@pytest.mark.parametrize("case", CASES)
def test_losses(file, case):
    model = model_of(file, case)
    found = outputs(file, case, torch.float64)
    given = assigned(file, case) if case == "d_tiny" else None  # equal overlaps, which rounding decides
    losses = model.losses(found, targets(file, case), given)
    np.testing.assert_allclose(losses["loss_classifier"].item(), file[f"{case}/loss/loss_cls"], rtol=1e-5)
    np.testing.assert_allclose(losses["loss_box_reg"].item(), file[f"{case}/loss/loss_bbox"], rtol=1e-5)
    check_gradients(found, losses, file, case)


@pytest.mark.parametrize("case", CASES)
def test_detections(file, case):
    check_detections(model_of(file, case), file, case)


@pytest.mark.parametrize("case", CASES)
def test_anchors(file, case):
    model = model_of(file, case)
    shapes = [file[f"{case}/level{level}/cls_logits"].shape[-2:] for level in range(model.anchors.levels)]
    for level, own in enumerate(model.anchors(shapes, file[f"{case}/pad_shape"])):
        np.testing.assert_allclose(own, file[f"{case}/level{level}/anchors"], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("case", ["a_typical", "b_smooth_l1"])
def test_anchors_that_keep_their_object(file, case):
    """detectron2's matching: the label of mmdetection's, the object of the largest overlap."""
    model = model_of(file, case, low_quality="keep_owner")
    found = outputs(file, case, torch.float32)
    levels = range(len(found.anchors))  # in another order within the cell
    found = found._replace(anchors=[torch.from_numpy(file[f"{case}/d2/anchors_level{level}"]) for level in levels])
    matched = model.match(found, targets(file, case))
    for picture, own in enumerate(matched.labels):
        wanted = torch.from_numpy(file[f"{case}/d2/img{picture}/match_label"])
        assert torch.equal(torch.where(own == model.loss.num_classes, 0, torch.where(own < 0, -1, 1)), wanted.long())
        here = matched.picture == picture
        wanted = torch.from_numpy(file[f"{case}/d2/img{picture}/matched_gt"])
        assert torch.equal(matched.objects[here], wanted[matched.place[here]])
