"""Losses and detections of RetinaNet and ATSS on stored maps: reference vectors with gradients; nothing at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tailfin import losses
from tailfin.models.assigners import atss, max_iou
from tailfin.models.dense_ops import (
    atss_losses,
    dense_detections,
    dense_labels,
    flatten_map,
    retinanet_losses,
)
from tailfin.stats import ClassStats

CASES = {
    "atss": ("a_typical", "b_overlap_tiny", "c_no_gt", "d_same_anchor_two_gt"),
    "retinanet": ("a_typical", "b_smooth_l1", "c_no_gt", "d_tiny"),
}
KINDS = [(name, case) for name, cases in CASES.items() for case in cases]


class Case:
    def __init__(self, golden_dir, name, case, dtype=torch.float64) -> None:
        vectors = np.load(golden_dir / f"{name}.npz")
        self.values = {
            key.removeprefix(f"{case}/"): vectors[key] for key in vectors.files if key.startswith(f"{case}/")
        }
        self.name, self.dtype = name, dtype
        self.levels, self.images = range(len(self["strides"])), range(int(self["num_images"]))
        self.classes = int(self["num_classes"])
        self.anchors = [self.tensor(f"level{level}/anchors") for level in self.levels]
        keys = {"cls": "cls_logits", "box": "box_deltas"} | (
            {"centerness": "centerness_logits"} if name == "atss" else {}
        )
        self.maps = {
            part: [self.tensor(f"level{level}/{key}").requires_grad_() for level in self.levels]
            for part, key in keys.items()
        }
        self.columns = {"cls": self.classes, "box": 4, "centerness": 1}
        self.gt_boxes = [self.tensor(f"img{image}/gt_boxes") for image in self.images]
        self.gt_labels = [torch.from_numpy(self[f"img{image}/gt_labels"]) for image in self.images]

    def __getitem__(self, key):
        return self.values[key]

    def tensor(self, key):
        return torch.from_numpy(self[key]).to(self.dtype)

    def flat(self, part) -> torch.Tensor:
        return torch.cat([flatten_map(level, self.columns[part]) for level in self.maps[part]], dim=1)

    def assigned(self):
        """Own assignment; the stored one where two IoUs tie and rounding decides."""
        found = []
        for image, boxes in enumerate(self.gt_boxes):
            own = atss(self.anchors, boxes) if self.name == "atss" else max_iou(torch.cat(self.anchors), boxes)
            stored = torch.from_numpy(self[f"img{image}/assigned_gt_index"])
            ambiguous = self.values.get(f"img{image}/ambiguous_anchor")
            found.append(own if ambiguous is None else torch.where(torch.from_numpy(ambiguous), stored, own))
        return found

    def losses(self):
        counts = np.ones(self.classes)
        focal = losses.build("focal", ClassStats(image_count=counts, instance_count=counts, num_images=10))
        given = torch.cat(self.anchors), self.assigned(), self.gt_boxes, self.gt_labels, focal
        stds = self["hp/target_stds"]
        if self.name == "atss":
            return atss_losses(self.flat("cls"), self.flat("box"), self.flat("centerness")[..., 0], *given, stds=stds)
        beta = float(self["hp/smooth_l1_beta"])
        return retinanet_losses(self.flat("cls"), self.flat("box"), *given, stds=stds, beta=beta)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("name", "case"), KINDS)
def test_losses_and_gradients(golden_dir, name, case, dtype):
    one = Case(golden_dir, name, case, dtype)
    parts = one.losses()
    exact = dtype == torch.float64
    for part, key in (("cls", "loss_cls"), ("box", "loss_bbox"), ("centerness", "loss_centerness")):
        if part not in one.maps:
            continue
        value = parts[f"loss_{part}"]
        assert value.item() == pytest.approx(float(one[f"loss/{key}"]), rel=1e-6 if exact else 1e-4)
        gradients = torch.autograd.grad(value, one.maps[part], retain_graph=True)
        for level, found in enumerate(gradients):
            np.testing.assert_allclose(found, one[f"level{level}/grad_{part}"], atol=1e-6 if exact else 1e-5)


@pytest.mark.parametrize(("name", "case"), KINDS)
def test_labels(golden_dir, name, case):
    one = Case(golden_dir, name, case)
    for image, assigned in enumerate(one.assigned()):
        labels = dense_labels(assigned, one.gt_labels[image], one.classes)
        weights = one[f"img{image}/label_weights"]
        np.testing.assert_array_equal(labels >= 0, weights > 0)
        np.testing.assert_array_equal(labels[labels >= 0], one[f"img{image}/labels"][weights > 0])


@pytest.mark.parametrize(("name", "case"), KINDS)
def test_detections(golden_dir, name, case):
    one = Case(golden_dir, name, case)
    for image in one.images:

        def of(part, image=image):
            return [flatten_map(level.detach(), one.columns[part])[image] for level in one.maps[part]]

        quality = [level[:, 0].sigmoid() for level in of("centerness")] if name == "atss" else None
        found = dense_detections(
            [level.sigmoid() for level in of("cls")],
            of("box"),
            one.anchors,
            tuple(one[f"img{image}/shape"].tolist()),
            stds=one["hp/target_stds"],
            quality=quality,
            score_threshold=float(one["hp/score_thr"]),
            pre_nms=int(one["hp/nms_pre"]),
            nms_iou=float(one["hp/nms_iou"]),
            max_dets=int(one["hp/max_per_img"]),
        )
        prefix = f"img{image}/test"
        np.testing.assert_array_equal(found["labels"], one[f"{prefix}/det_labels"])
        np.testing.assert_allclose(found["scores"], one[f"{prefix}/det_scores"], rtol=1e-9)
        np.testing.assert_allclose(found["boxes"], one[f"{prefix}/det_boxes"], atol=2e-5)  # anchors are float32
        assert found["boxes"].dtype == torch.float64
        if quality is not None:
            np.testing.assert_allclose(found["scores"].sqrt(), one[f"{prefix}/det_scores_sqrt"], rtol=1e-9)


def test_a_batch_without_objects_stays_attached():
    counts = np.ones(3)
    focal = losses.build("focal", ClassStats(image_count=counts, instance_count=counts, num_images=10))
    anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8]])
    logits, deltas, central = (torch.zeros(shape, requires_grad=True) for shape in ((2, 2, 3), (2, 2, 4), (2, 2)))
    none, labels = [torch.zeros((0, 4))] * 2, [torch.zeros(0, dtype=torch.int64)] * 2
    assigned = [max_iou(anchors, boxes) for boxes in none]
    for parts in (
        retinanet_losses(logits, deltas, anchors, assigned, none, labels, focal),
        atss_losses(logits, deltas, central, anchors, assigned, none, labels, focal),
    ):
        sum(parts.values()).backward()
        # 12 elements of 0.75 x 0.25 log 2, divided by 2: an image counts at least one positive
        assert parts["loss_cls"].item() == pytest.approx(12 * 0.75 * 0.25 * np.log(2) / 2)
        assert all(value.item() == 0 for key, value in parts.items() if key != "loss_cls")
    assert all(value.grad is not None for value in (logits, deltas, central))


def test_nothing_above_the_threshold():
    found = dense_detections(
        [torch.zeros((4, 2))], [torch.zeros((4, 4))], [torch.rand((4, 4))], (9, 9), stds=(1, 1, 1, 1)
    )
    assert [len(value) for value in found.values()] == [0, 0, 0]


def test_flatten_map_order_and_mistakes():
    values = torch.arange(2 * 6 * 2 * 3).view(2, 6, 2, 3)  # two anchors of three columns
    flat = flatten_map(values, 3)
    assert flat.shape == (2, 12, 3)
    assert flat[1, 2 * (1 * 3 + 2) + 1].tolist() == values[1, 3:, 1, 2].tolist()
    with pytest.raises(ValueError, match="6 channels are no multiple of 4"):
        flatten_map(values, 4)
