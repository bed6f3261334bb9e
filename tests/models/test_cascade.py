"""refine_boxes and the box deltas: reference vectors of the cascade, in training and at test time; mistakes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchvision.models.detection._utils import BoxCoder

from tailfin import losses
from tailfin.models.box_deltas import decode_deltas, encode_deltas
from tailfin.models.cascade import refine_boxes

CASES = ("a_agnostic_ce", "b_class_specific_ce", "c_agnostic_seesaw", "d_sampled_16", "e_no_gt")


@pytest.fixture(scope="module")
def file(golden_dir) -> dict[str, np.ndarray]:
    return dict(np.load(golden_dir / "cascade.npz"))


def foreground_scores(file, case, logits, stats_of):
    """What decides about the class of a row: softmax scores, or Seesaw's."""
    classes = int(file[f"{case}/num_classes"])
    name = "seesaw" if str(file[f"{case}/hp/cls_loss"]) == "seesaw" else "softmax"
    return losses.build(name, stats_of(np.ones(classes))).scores(logits)


@pytest.fixture
def stats_of():
    from tailfin.stats import ClassStats

    return lambda counts: ClassStats(image_count=counts, instance_count=counts, num_images=10)


@pytest.mark.parametrize("case", CASES)
def test_refined_boxes_in_training(file, case, stats_of):
    agnostic = bool(file[f"{case}/class_agnostic_boxes"])
    seen = 0
    for stage in range(3):
        prefix = f"{case}/train/stage{stage}"
        rois, deltas = (torch.from_numpy(file[f"{prefix}/{name}"]).double() for name in ("rois", "box_deltas"))
        logits, labels = (torch.from_numpy(file[f"{prefix}/{name}"]) for name in ("cls_logits", "labels"))
        scores = foreground_scores(file, case, logits.double(), stats_of)
        classes = torch.where(labels < int(file[f"{case}/num_classes"]), labels, scores.argmax(1))
        for image in range(file[f"{case}/num_images"]):
            rows = (rois[:, 0] == image).nonzero()[:, 0]
            size = tuple(file[f"{case}/img{image}/shape"].tolist())
            stds = file[f"{case}/hp/target_stds"][stage]
            before = rois.clone(), deltas.clone()
            found = refine_boxes(
                rois[rows, 1:], deltas[rows], None if agnostic else classes[rows], size, stds, agnostic
            )
            assert torch.equal(rois, before[0]) and torch.equal(deltas, before[1])
            added = torch.zeros(len(rows), dtype=torch.bool)
            own = torch.from_numpy(file[f"{prefix}/img{image}/pos_is_gt"].astype(bool))
            added[: len(own)] = own
            expected = file.get(f"{prefix}/img{image}/refined_boxes")
            if expected is None:  # the last stage refines nothing
                continue
            assert found.dtype == torch.float64
            np.testing.assert_allclose(found[~added], expected, atol=1e-9)
            seen += 1
    assert seen >= 2


@pytest.mark.parametrize("case", CASES)
def test_boxes_at_test_time(file, case, stats_of):
    if f"{case}/test/stage0/rois" not in file:
        pytest.skip("this case is about training")
    agnostic = bool(file[f"{case}/class_agnostic_boxes"])
    for stage in range(2):
        prefix = f"{case}/test/stage{stage}"
        rois, deltas, logits = (
            torch.from_numpy(file[f"{prefix}/{name}"]).double() for name in ("rois", "box_deltas", "cls_logits")
        )
        scores = foreground_scores(file, case, logits, stats_of)
        following = file[f"{case}/test/stage{stage + 1}/rois"]
        for image in range(file[f"{case}/num_images"]):
            rows = rois[:, 0] == image
            size = tuple(file[f"{case}/img{image}/shape"].tolist())
            stds = file[f"{case}/hp/target_stds"][stage]
            found = refine_boxes(rois[rows, 1:], deltas[rows], scores[rows], size, stds, agnostic)
            np.testing.assert_allclose(found, following[following[:, 0] == image][:, 1:], atol=1e-9)
    prefix = f"{case}/test/stage2"
    rois, deltas = (torch.from_numpy(file[f"{prefix}/{name}"]).double() for name in ("rois", "box_deltas"))
    per_class = deltas.view(len(rois), -1, 4)
    boxes = rois[:, None, 1:].expand_as(per_class).reshape(-1, 4)
    last = decode_deltas(boxes, per_class.reshape(-1, 4), file[f"{case}/hp/target_stds"][2])
    np.testing.assert_allclose(last.view(len(rois), -1), file[f"{case}/test/final_boxes_unclipped"], atol=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_encoded_targets(file, case):
    for stage in range(3):
        prefix = f"{case}/train/stage{stage}"
        foreground = file[f"{prefix}/labels"] < file[f"{case}/num_classes"]
        targets = np.zeros_like(file[f"{prefix}/box_targets"])
        row = 0
        for image in range(file[f"{case}/num_images"]):
            boxes = torch.from_numpy(file[f"{prefix}/img{image}/pos_boxes"])
            objects = torch.from_numpy(file[f"{case}/img{image}/gt_boxes"]).double()
            matched = objects[torch.from_numpy(file[f"{prefix}/img{image}/pos_assigned_gt"])]
            found = encode_deltas(boxes, matched, file[f"{case}/hp/target_stds"][stage])
            targets[row : row + len(found)] = found
            row += len(found) + len(file[f"{prefix}/img{image}/neg_boxes"])
        np.testing.assert_allclose(targets, file[f"{prefix}/box_targets"], atol=1e-9)
        assert not targets[~foreground].any()


def test_deltas_there_and_back_and_their_clamp():
    generator = torch.Generator().manual_seed(0)
    boxes = torch.rand((2, 20, 4), generator=generator, dtype=torch.float64) * 50
    boxes[..., 2:] += boxes[..., :2] + 1
    stds = (0.1, 0.1, 0.2, 0.2)
    deltas = encode_deltas(boxes[0], boxes[1], stds)
    torch.testing.assert_close(decode_deltas(boxes[0], deltas, stds), boxes[1])
    torch.testing.assert_close(BoxCoder((10, 10, 5, 5)).encode_single(boxes[1], boxes[0]), deltas)
    wild = torch.tensor([[0.0, 0.0, 9.0, -9.0]], dtype=torch.float64)
    found = decode_deltas(torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=torch.float64), wild)
    np.testing.assert_allclose(found, [[1 - 62.5, 1 - 0.016, 1 + 62.5, 1 + 0.016]], rtol=1e-12)
    references = boxes[0].clone().requires_grad_()
    torch.autograd.gradcheck(lambda r, d: decode_deltas(r, d, stds), (references, deltas.requires_grad_()))


def test_classes_scores_and_nothing():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 9, 9]])
    deltas = torch.tensor([[0.0, 0, 0, 0, 1, 0, 0, 0], [0.0, 0, 0, 0, 1, 0, 0, 0]], requires_grad=True)
    stds = (0.1, 0.1, 0.2, 0.2)
    by_label = refine_boxes(boxes, deltas, torch.tensor([1, 0]), (20, 20), stds, False)
    by_score = refine_boxes(boxes, deltas, torch.tensor([[0.1, 0.9], [0.5, 0.2]]), (20, 20), stds, False)
    np.testing.assert_allclose(by_label, [[1, 0, 11, 10], [5, 5, 9, 9]])
    assert torch.equal(by_label, by_score) and not by_label.requires_grad
    assert refine_boxes(boxes[:0], deltas[:0], torch.zeros((0, 2)), (20, 20), stds, False).shape == (0, 4)
    assert refine_boxes(boxes[:0], deltas[:0, :4], None, (20, 20), stds, True).shape == (0, 4)
    clipped = refine_boxes(boxes, deltas[:, 4:], None, (6, 8), stds, True)
    assert clipped[:, 2:].max() == 8 and clipped[:, 3].max() == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"boxes": torch.zeros((2, 5))}, r"boxes must be \[N, 4\]"),
        ({"deltas": torch.zeros((2, 7))}, r"deltas must be \[2, 4 x classes\]"),
        ({"class_agnostic": True}, r"deltas must be \[2, 4\]"),
        ({"labels_or_scores": None}, "need the class of each row"),
        ({"labels_or_scores": torch.zeros((2, 3))}, r"scores must be \[2, 2\]"),
        ({"labels_or_scores": torch.tensor([0])}, r"labels must be \[2\]"),
        ({"labels_or_scores": torch.tensor([0, 2])}, r"labels must lie in 0\.\.1"),
        ({"stds": (1.0, 1.0)}, "stds must be four numbers"),
    ],
)
def test_mistakes(arguments, message):
    given = {
        "boxes": torch.zeros((2, 4)),
        "deltas": torch.zeros((2, 8)),
        "labels_or_scores": torch.tensor([0, 1]),
        "image_size": (5, 5),
        "stds": (1.0, 1.0, 1.0, 1.0),
        "class_agnostic": False,
    } | arguments
    with pytest.raises(ValueError, match=message):
        refine_boxes(**given)
