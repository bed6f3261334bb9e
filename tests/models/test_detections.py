"""The fast selection of detections gives exactly what NMS over every candidate gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import nms

from tailfin.models import detections
from tailfin.models.detections import nms_per_class, select_detections
from tailfin.models.detector import Limits

CODER = BoxCoder((10.0, 10.0, 5.0, 5.0))


def random_boxes(generator: torch.Generator, n: int, size: float = 100) -> torch.Tensor:
    corner = size * torch.rand((n, 2), generator=generator)
    return torch.cat([corner, corner + 1 + 0.5 * size * torch.rand((n, 2), generator=generator)], dim=1)


def plain_selection(proposals, scores, deltas, size, threshold, iou, max_dets):
    """Class by class over all candidates, then the best of all."""
    found = []
    for label in range(scores.shape[1]):
        rows = torch.where(scores[:, label] > threshold)[0]
        boxes = CODER.decode_single(deltas[rows, label if deltas.shape[1] > 1 else 0], proposals[rows]).view(-1, 4)
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, size[1])
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, size[0])
        solid = ((boxes[:, 2:] - boxes[:, :2]) >= detections.MIN_SIDE).all(1)
        boxes, own = boxes[solid], scores[rows, label][solid]
        for kept in nms(boxes.double(), own.double(), iou).tolist():
            found.append((own[kept].item(), label, tuple(boxes[kept].tolist())))
    found.sort(key=lambda entry: -entry[0])
    return found if max_dets < 0 else found[:max_dets]


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(0, 60),
    classes=st.integers(1, 40),
    agnostic=st.booleans(),
    max_dets=st.sampled_from([-1, 1, 7, 300]),
)
def test_equals_nms_over_all_candidates(seed, rows, classes, agnostic, max_dets):
    generator = torch.Generator().manual_seed(seed)
    proposals = random_boxes(generator, rows)
    scores = torch.rand((rows, classes), generator=generator)
    deltas = 0.5 * torch.randn((rows, 1 if agnostic else classes, 4), generator=generator)
    first = detections.FIRST_CANDIDATES
    found = select_detections(proposals, scores, deltas, CODER, (90, 110), Limits(0.05, max_dets, 0.5))
    expected = plain_selection(proposals, scores, deltas, (90, 110), 0.05, 0.5, max_dets)
    assert first == detections.FIRST_CANDIDATES
    assert [score for score, *_ in expected] == found["scores"].tolist()
    # equal scores have no order of their own
    rows = zip(found["scores"].tolist(), found["labels"].tolist(), found["boxes"].tolist(), strict=True)
    ours, theirs = sorted(rows, key=lambda row: row[:2]), sorted(expected, key=lambda row: row[:2])
    assert max_dets >= 0 or [row[:2] for row in ours] == [row[:2] for row in theirs]
    alone = [
        place for place, score in enumerate(found["scores"].tolist()) if found["scores"].tolist().count(score) == 1
    ]
    assert found["labels"][alone].tolist() == [expected[place][1] for place in alone]
    boxes = torch.tensor([expected[place][2] for place in alone]).reshape(-1, 4)
    torch.testing.assert_close(found["boxes"][alone], boxes)


def test_candidates_grow_where_nms_removes_many(monkeypatch):
    monkeypatch.setattr(detections, "FIRST_CANDIDATES", 1)
    generator = torch.Generator().manual_seed(0)
    # 1500 near copies of one box score best, so that the first 1000 candidates leave one detection
    copies = torch.tensor([[10.0, 10, 60, 60]]) + 0.1 * torch.rand((1500, 4), generator=generator)
    proposals = torch.cat([copies, random_boxes(generator, 400)])
    scores = torch.cat([0.9 + 0.1 * torch.rand(1500, generator=generator), 0.5 * torch.rand(400, generator=generator)])[
        :, None
    ]
    deltas = torch.zeros((1900, 1, 4))
    found = select_detections(proposals, scores, deltas, CODER, (100, 100), Limits(0.01, 50, 0.5))
    expected = plain_selection(proposals, scores, deltas, (100, 100), 0.01, 0.5, 50)
    assert len(expected) == 50
    assert found["scores"].tolist() == [score for score, *_ in expected]


def test_equal_scores_are_never_parted(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    proposals = random_boxes(generator, 3000, 1000)
    scores = torch.full((3000, 1), 0.5)
    found = select_detections(proposals, scores, torch.zeros((3000, 1, 4)), CODER, (1500, 1500), Limits(0.1, 20, 0.5))
    kept = nms(proposals.double(), scores[:, 0].double(), 0.5)[:20]
    torch.testing.assert_close(found["boxes"], proposals[kept])


def test_classes_far_apart_keep_full_resolution():
    # two boxes of class 1202 that overlap by just more than half: offsets in float32 would blur what decides
    boxes = torch.tensor([[0.0, 0, 3, 1], [0.98, 0, 3.98, 1], [0, 0, 1333, 1333]])
    labels = torch.tensor([1202, 1202, 0])
    assert nms_per_class(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, 0.5).tolist() == [0, 2]
    boxes[1] += torch.tensor([0.04, 0, 0.04, 0])
    assert nms_per_class(boxes, torch.tensor([0.9, 0.8, 0.7]), labels, 0.5).tolist() == [0, 1, 2]


def test_no_candidate():
    found = select_detections(
        torch.zeros((0, 4)),
        torch.zeros((0, 5)),
        torch.zeros((0, 5, 4)),
        CODER,
        (10, 10),
        Limits(0.1, 3, 0.5),
    )
    assert {key: tuple(value.shape) for key, value in found.items()} == {
        "boxes": (0, 4),
        "scores": (0,),
        "labels": (0,),
    }


@pytest.mark.parametrize("classes", [1203])
def test_many_classes_stay_small(classes):
    """1000 proposals x 1203 classes: the candidates alone are decoded, not [R, C, 4]."""
    generator = torch.Generator().manual_seed(2)
    scores = 0.01 * torch.rand((1000, classes), generator=generator)
    proposals = random_boxes(generator, 1000, 800)
    deltas = torch.zeros((1000, 1, 4)).expand(1000, classes, 4)  # a view: materialised it would be 19 MB
    found = select_detections(proposals, scores, deltas, CODER, (1333, 1333), Limits(1e-4, 300, 0.5))
    assert len(found["scores"]) == 300
    assert (found["scores"].diff() <= 0).all()
