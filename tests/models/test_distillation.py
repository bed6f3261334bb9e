"""Distillation terms: the stored vectors of the released code, and what must hold for any student and teacher."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tailfin.models.distillation import box_masks, class_distillation, feature_distillation

CASES = ("case0", "case1")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-5}


@pytest.fixture(scope="module")
def golden(golden_dir):
    with np.load(golden_dir / "stepwise.npz") as file:
        return {key: file[key] for key in file.files}


def head_boxes(golden, case: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Boxes of head classes per picture, xyxy in fractions."""
    head, boxes = golden[f"{case}/head_classes"], []
    for image in range(golden[f"{case}/logits"].shape[0]):
        own = torch.from_numpy(golden[f"{case}/img{image}/boxes_cxcywh"]).to(dtype)
        keep = torch.from_numpy(np.isin(golden[f"{case}/img{image}/labels"], head))
        boxes.append(torch.cat([own[:, :2] - own[:, 2:] / 2, own[:, :2] + own[:, 2:] / 2], 1)[keep])
    return boxes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
class TestGolden:
    def test_class_term(self, golden, case, dtype):
        student = torch.from_numpy(golden[f"{case}/logits"]).to(dtype).requires_grad_()
        teacher = torch.from_numpy(golden[f"{case}/teacher_logits"]).to(dtype)
        value = class_distillation(student[None], teacher[None], torch.from_numpy(golden[f"{case}/head_classes"]))
        value.backward()
        assert value.item() == pytest.approx(golden[f"{case}/kl_loss"].item(), rel=TOLERANCE[dtype])
        np.testing.assert_allclose(student.grad, golden[f"{case}/kl_grad"], atol=TOLERANCE[dtype])

    def test_feature_term(self, golden, case, dtype):
        def levels(name: str) -> list[torch.Tensor]:
            return [torch.from_numpy(golden[f"{case}/feat_{name}{level}"]).to(dtype) for level in (0, 1)]

        student = [level.requires_grad_() for level in levels("student")]
        boxes = head_boxes(golden, case, dtype)
        masks = [box_masks(boxes, level.shape[-2:], rounding="released") for level in student]
        value = feature_distillation(student, levels("teacher"), masks)
        value.backward()
        assert value.item() == pytest.approx(golden[f"{case}/feature_loss"].item(), rel=TOLERANCE[dtype])
        for level, own in enumerate(student):
            np.testing.assert_allclose(own.grad, golden[f"{case}/feat_grad{level}"], atol=TOLERANCE[dtype])


@given(
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=6),
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from(["outer", "released"]),
)
@settings(max_examples=80, deadline=None)
def test_masks_are_the_union_of_the_boxes(values, height, width, rounding):
    boxes = torch.tensor([[min(a, c), min(b, d), max(a, c), max(b, d)] for a, b, c, d in values]).reshape(-1, 4)
    expected = np.zeros((height, width), dtype=bool)
    for x1, y1, x2, y2 in (boxes * torch.tensor([width, height, width, height])).numpy():
        if rounding == "released":
            expected[int(np.ceil(y1)) : int(np.ceil(y2)), int(x1) : int(x2)] = True
        else:
            expected[int(y1) : int(np.ceil(y2)), int(x1) : int(np.ceil(x2))] = True
    # the picture is the second of a batch whose first and last have no boxes
    masks = box_masks([boxes[:0], boxes, boxes[:0]], (height, width), rounding=rounding)
    np.testing.assert_array_equal(masks[1], expected)
    assert not masks[0].any() and not masks[2].any()


def test_small_boxes_are_never_emptied_by_outer_rounding():
    box = torch.tensor([[0.51, 0.51, 0.52, 0.52]])
    assert box_masks([box], (4, 4)).sum() == 1
    assert box_masks([box], (4, 4), rounding="released").sum() == 0


def test_boxes_lie_in_the_valid_part():
    """A picture that fills the left half of a padded batch: its whole box is that half, not the grid."""
    valid = torch.zeros(1, 4, 8, dtype=torch.bool)
    valid[:, :3, :4] = True
    whole = [torch.tensor([[0.0, 0.0, 1.0, 1.0]])]
    assert torch.equal(box_masks(whole, (4, 8), valid), valid)
    assert box_masks(whole, (4, 8), valid, rounding="released").all()


def levels(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, size, size, generator=generator, dtype=torch.float64) for size in (8, 4)]


def test_feature_term_sees_nothing_outside_the_boxes():
    student, teacher = levels(0), levels(1)
    boxes = [torch.tensor([[0.0, 0.0, 0.5, 0.25]], dtype=torch.float64), torch.zeros(0, 4, dtype=torch.float64)]
    masks = [box_masks(boxes, level.shape[-2:]) for level in student]
    value = feature_distillation(student, teacher, masks)
    changed = [torch.where(mask[:, None], level, level + 7) for level, mask in zip(student, masks, strict=True)]
    assert feature_distillation(changed, teacher, masks) == value > 0
    empty = [torch.zeros_like(mask) for mask in masks]
    assert feature_distillation(student, teacher, empty) == 0


def test_feature_term_of_a_constant_difference():
    """The channels' sum over two: delta^2 d / 2 where no mask is empty."""
    teacher = levels(0)
    boxes = [torch.tensor([[0.1, 0.1, 0.6, 0.9]], dtype=torch.float64)] * 2
    masks = [box_masks(boxes, level.shape[-2:]) for level in teacher]
    value = feature_distillation([level + 0.3 for level in teacher], teacher, masks)
    assert value.item() == pytest.approx(0.3**2 * 5 / 2)


def test_equal_networks_have_no_distance():
    features, logits = levels(0), torch.randn(3, 2, 7, 6)
    masks = [torch.ones(2, *level.shape[-2:], dtype=torch.bool) for level in features]
    assert feature_distillation(features, features, masks) == 0
    assert class_distillation(logits, logits, torch.arange(4)) == 0


def test_class_term_leaves_other_classes_and_the_teacher_alone():
    student = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 3, 4, 6, dtype=torch.float64, requires_grad=True)
    class_distillation(student, teacher, torch.tensor([0, 2, 5])).backward()
    assert student.grad[..., [1, 3, 4]].abs().max() == 0
    assert student.grad[..., [0, 2, 5]].abs().min() > 0
    assert teacher.grad is None


def test_layers_are_summed_and_rows_averaged():
    student, teacher = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 6)
    classes = torch.tensor([1, 2, 4])
    log_student, log_teacher = (value[..., classes].log_softmax(-1).flatten(1, 2) for value in (student, teacher))
    by_torch = [
        torch.nn.functional.kl_div(own, taught, reduction="batchmean", log_target=True)
        for own, taught in zip(log_student, log_teacher, strict=True)
    ]
    assert class_distillation(student, teacher, classes).item() == pytest.approx(sum(by_torch).item(), rel=1e-5)


def test_nothing_to_distil_is_zero_and_in_the_graph():
    logits = torch.randn(2, 0, 6, requires_grad=True)
    class_distillation(logits, logits, torch.arange(3)).backward()
    logits = torch.randn(2, 4, 6, requires_grad=True)
    value = class_distillation(logits, logits, torch.zeros(0, dtype=torch.int64))
    value.backward()
    assert value == 0 and logits.grad.abs().max() == 0
